"""How seldom workers may agree: H = ⌊√(T/K)⌋ costs nothing, faster growth does.

On this problem the error only suffers while HK/T is not small, so that T/K is the rate
that fails for good; √(T/K) is what the theorem covers.

Command: localsgd reproduce rounds (3 minutes; 20 seconds with --quick)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from localsgd_jax.reproduce import figures, kinked, output
from localsgd_jax.reproduce.output import Table, Verdict

NAME = "rounds"
FACTOR = 1.3
COLUMNS = ("rule", "steps", "period", "rounds", "error", "deviation", "ratio")
MINI_BATCH, SQRT = "mini-batch", "sqrt(T/K)"
# Periods by K and T. The first is mini-batch SGD, which the others are held against.
RULES = {
    MINI_BATCH: lambda k, t: 1,
    SQRT: lambda k, t: int((t / k) ** 0.5),
    "T^(3/4)/sqrt(K)": lambda k, t: int(t**0.75 / k**0.5),
    "T/K": lambda k, t: t // k,
}
LABELS = {
    MINI_BATCH: "H = 1 (mini-batch)",
    SQRT: "H = ⌊(T/K)$^{1/2}$⌋",
    "T^(3/4)/sqrt(K)": "H = ⌊T$^{3/4}$/K$^{1/2}$⌋",
    "T/K": "H = ⌊T/K⌋",
}


class Plan(NamedTuple):
    """What is run: every T with every rule."""

    steps: tuple[int, ...]
    workers: int = 8
    dimension: int = 512


def full() -> Plan:
    """Returns T over three decades."""
    return Plan((1000, 3162, 10_000, 31_623, 100_000, 316_228, 1_000_000))


def quick() -> Plan:
    """Returns T over two decades."""
    return Plan((1000, 3162, 10_000, 31_623, 100_000))


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
    pairs = [(steps, rule) for steps in plan.steps for rule in RULES]
    missing = pairs[len(table.rows) :]
    with tqdm(
        total=sum(steps for steps, _ in missing), desc=NAME, unit="step", disable=None
    ) as bar:
        for steps, rule in missing:
            table.append(_row(plan, steps, rule, table.rows))
            bar.update(steps)
    _draw(directory, plan, table.rows)
    return output.write_verdicts(directory, NAME, _verdicts(plan, table.rows))


def _row(plan: Plan, steps: int, rule: str, rows: Sequence[dict]) -> dict:
    """Runs once; the rows before hold the mini-batch error for this T."""
    period = max(1, RULES[rule](plan.workers, steps))
    run = kinked.Run(plan.workers, period, steps, 1, plan.dimension)
    error = kinked.error(run)
    base = next(
        (r["error"] for r in rows if (r["steps"], r["rule"]) == (steps, MINI_BATCH)),
        error.mean,
    )
    return {
        "rule": rule,
        "steps": steps,
        "period": period,
        "rounds": -(-steps // period),
        "error": error.mean,
        "deviation": error.deviation,
        "ratio": error.mean / base,
    }


def _verdicts(plan: Plan, rows: Sequence[dict]) -> list[Verdict]:
    """Says which rules keep the error within the factor, and what they save."""
    verdicts = []
    for rule in list(RULES)[1:]:
        mine = [row for row in rows if row["rule"] == rule]
        ratios = [row["ratio"] for row in mine]
        saved = [row["steps"] / row["rounds"] for row in mine]
        within = sum(ratio <= FACTOR for ratio in ratios)
        promise = "at every T" if rule == SQRT else "not at every T"
        verdicts.append(
            Verdict(
                f"K = {plan.workers}, H = {rule}: error within {FACTOR} × of "
                f"mini-batch SGD's {promise}",
                f"within at {within} of {len(mine)} T; ratio {ratios[0]:.2f} at "
                f"T = {mine[0]['steps']} to {ratios[-1]:.2f} at "
                f"T = {mine[-1]['steps']}, {saved[0]:.0f} to {saved[-1]:.0f} times "
                "fewer rounds",
            )
        )
    return verdicts


def _draw(directory: Path, plan: Plan, rows: Sequence[dict]) -> None:
    """Draws the error relative to mini-batch SGD, and the rounds, against T."""
    figure = figures.new(8.4, 3.6)
    left, right = figure.subplots(1, 2)
    for axes, column in ((left, "ratio"), (right, "rounds")):
        curves = {
            label: _curve([r for r in rows if r["rule"] == rule], column)
            for rule, label in LABELS.items()
        }
        figures.draw(axes, curves)
        axes.set_xscale("log")
    left.axhline(FACTOR, color="0.6", linestyle=":")
    left.text(plan.steps[0], FACTOR, f"{FACTOR} ×", color="0.4", va="bottom")
    right.set_yscale("log")
    figures.finish(left, "error / error of mini-batch SGD", "steps T", "ratio")
    figures.finish(right, "synchronisations", "steps T", "rounds")
    right.legend(frameon=False, fontsize="small")
    condition = f"κ = {kinked.SMOOTHNESS / kinked.MU:g}, K = {plan.workers}"
    figure.suptitle(f"How the period may grow with T ({condition})")
    figures.save(figure, directory, NAME)


def _curve(rows: Sequence[dict], column: str) -> figures.Curve:
    """Returns a column against T."""
    return [row["steps"] for row in rows], [row[column] for row in rows]
