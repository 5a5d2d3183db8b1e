"""Linear speedup: error × K against K, and where it ends.

Theory allows K ≤ T/(bH²), from a bound on drift by the second moment of gradients. It
errs on the safe side: drift here is noise, which larger batches make smaller too.

Command: localsgd reproduce linear (1 minute; 10 seconds with --quick)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from tqdm import tqdm

from localsgd_jax.reproduce import figures, kinked, output
from localsgd_jax.reproduce.output import Table, Verdict

NAME = "linear"
FACTOR = 1.3
COLUMNS = ("batch", "workers", "error", "deviation", "scaled")
WORKERS = tuple(2**i for i in range(7))
BATCHES = (1, 4, 16)


class Plan(NamedTuple):
    """What is run: every K with every b at one T and H."""

    dimension: int = 4096
    steps: int = 4096
    period: int = 14
    workers: tuple[int, ...] = WORKERS
    batches: tuple[int, ...] = BATCHES


def full() -> Plan:
    """Returns the experiment."""
    return Plan()


def quick() -> Plan:
    """Returns it with fewer coordinates, which are the repetitions."""
    return Plan(dimension=1024)


def run(directory: Path, plan: Plan) -> str:
    """Runs what is missing in the table, then writes the figure and the verdict.

    Args:
      directory: where everything goes.
      plan: what to run.

    Returns:
      The verdict.

    Raises:
      ValueError: if the directory holds a run with other settings.
      OSError: if something cannot be read or written.
    """
    constants = {"mu": kinked.MU, "smoothness": kinked.SMOOTHNESS}
    table = Table(directory, NAME, plan._asdict() | constants, COLUMNS)
    pairs = [(b, k) for b in plan.batches for k in plan.workers]
    missing = pairs[len(table.rows) :]
    total = sum(workers for _, workers in missing)
    with tqdm(total=total, desc=NAME, unit="worker", disable=None) as bar:
        for batch, workers in missing:
            table.append(_row(plan, batch, workers))
            bar.update(workers)
    _draw(directory, plan, table.rows)
    return output.write_verdicts(directory, NAME, _verdicts(plan, table.rows))


def allowed(plan: Plan, batch: int) -> float:
    """Returns up to which K the theory promises linear speedup.

        H ≤ √(T/(Kb))   ⇔   K ≤ T/(bH²)

    Args:
      plan: gives T and H.
      batch: b.

    Returns:
      That K, of which theory gives the order only.

    Example:
      >>> allowed(Plan(steps=4096, period=16), batch=4)
      4.0
    """
    return plan.steps / (batch * plan.period**2)


def _row(plan: Plan, batch: int, workers: int) -> dict:
    """Runs once."""
    run = kinked.Run(workers, plan.period, plan.steps, batch, plan.dimension)
    error = kinked.error(run)
    # σ² = 1 per coordinate: with a linear speedup this is one number for all K and b.
    scaled = error.mean * workers * batch * kinked.MU * plan.steps
    return {
        "batch": batch,
        "workers": workers,
        "error": error.mean,
        "deviation": error.deviation,
        "scaled": scaled,
    }


def _relative(rows: Sequence[dict], batch: int) -> dict[int, float]:
    """Returns error × K by K, as a multiple of that at the least K."""
    mine = {row["workers"]: row["scaled"] for row in rows if row["batch"] == batch}
    return {workers: scaled / mine[min(mine)] for workers, scaled in mine.items()}


def _verdicts(plan: Plan, rows: Sequence[dict]) -> list[Verdict]:
    """Says for each b up to which K the error × K is flat."""
    verdicts = []
    for batch in plan.batches:
        relative = _relative(rows, batch)
        broken = [k for k, ratio in relative.items() if ratio > FACTOR]
        flat = [k for k in relative if not broken or k < min(broken)]
        end = (
            f"{relative[min(broken)]:.2f} × at K = {min(broken)}"
            if broken
            else "no end seen"
        )
        verdicts.append(
            Verdict(
                f"b = {batch}: error × K flat within {FACTOR} × up to the order of "
                f"K = T/(bH²) = {allowed(plan, batch):.3g}",
                f"flat up to K = {max(flat)}; {end}",
            )
        )
    return verdicts


def _draw(directory: Path, plan: Plan, rows: Sequence[dict]) -> None:
    """Draws error × K against K, a panel for each b, with the theory's limit."""
    figure = figures.new(9, 3.4)
    panels = figure.subplots(1, len(plan.batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, plan.batches, strict=True):
        _panel(axes, plan, rows, batch)
        figures.finish(axes, f"b = {batch}", "workers K", "error × K / value at K = 1")
        axes.label_outer()
    panels[0].legend(frameon=False, fontsize="small", loc="lower right")
    figure.suptitle(f"Linear speedup at T = {plan.steps}, H = {plan.period}")
    figures.save(figure, directory, NAME)


def _panel(axes: Axes, plan: Plan, rows: Sequence[dict], batch: int) -> None:
    """Draws the curve of one b."""
    relative = _relative(rows, batch)
    limit = allowed(plan, batch)
    axes.axvspan(1, limit, color="0.93")
    axes.axvline(limit, color="tab:orange", linestyle="--", label="K = T/(bH²)")
    axes.axhline(FACTOR, color="0.6", linestyle=":", label=f"{FACTOR} ×")
    figures.draw(axes, {"measured": (list(relative), list(relative.values()))})
    figures.powers_of_two(axes, "x")
    axes.set_ylim(bottom=0)
