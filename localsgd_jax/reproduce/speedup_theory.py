"""The paper's model of the speedup: S(K) for ε = 0 and for positive ε.

Command: localsgd reproduce speedup-theory (2 seconds)
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from localsgd_jax import theory
from localsgd_jax.reproduce import figures, output
from localsgd_jax.reproduce.output import Verdict

NAME = "speedup-theory"
WORKERS = tuple(2**i for i in range(11))
PERIODS = tuple(2**i for i in range(12))
SHOWN = (1, 4, 16, 64, 256, 1024)
EPSILONS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
MODELS = {"published": theory.speedup, "with 4K": theory.corrected_speedup}
# From an independent evaluation of the published form at ρ = 25, by (ε, K): the
# largest S and the period H (a power of two) that gives it.
LARGEST = {
    (1e-4, 2): (0.955, 64),
    (1e-4, 4): (0.982, 128),
    (1e-4, 16): (0.750, 128),
    (1e-5, 2): (1.336, 128),
    (1e-5, 8): (1.932, 256),
    (1e-5, 16): (1.855, 256),
    (1e-6, 2): (1.631, 512),
    (1e-6, 16): (3.959, 512),
    (1e-8, 2): (1.913, 2048),
    (1e-8, 16): (10.2, 2048),
    (1e-8, 128): (17.7, 2048),
}


def run(directory: Path, rho: float = 25.0, epsilon: float = 1e-6) -> str:
    """Writes the table, the figure and the verdict.

    Args:
      directory: where; it is made if it does not exist.
      rho: price of communication ρ.
      epsilon: positive ε of panel (b).

    Returns:
      The verdict.

    Raises:
      ValueError: if ε is not positive or ρ negative.
      OSError: if something cannot be written.
    """
    if not epsilon > 0:
        raise ValueError(f"--epsilon must be positive, got {epsilon:g}")
    rows = table(rho, sorted({*EPSILONS, epsilon}))
    directory.mkdir(parents=True, exist_ok=True)
    output.write_rows(directory / f"{NAME}.csv", rows)
    _draw(directory, rho, epsilon)
    return output.write_verdicts(directory, NAME, _verdicts(rho))


def table(rho: float, epsilons: Sequence[float]) -> list[dict]:
    """Evaluates the model on the whole grid.

    Args:
      rho: ρ.
      epsilons: all ε.

    Returns:
      A row for each form of the model, ε, H and K.
    """
    return [
        {
            "model": name,
            "rho": rho,
            "epsilon": epsilon,
            "period": period,
            "workers": workers,
            "speedup": float(f"{model(workers, period, rho, epsilon):.6g}"),
        }
        for name, model in MODELS.items()
        for epsilon in epsilons
        for period in PERIODS
        for workers in WORKERS
    ]


def largest(workers: int, rho: float, epsilon: float) -> tuple[float, int]:
    """Finds the best period of the published form.

    Args:
      workers: K.
      rho: ρ.
      epsilon: ε.

    Returns:
      The largest S and its H, a power of two.

    Example:
      >>> speed, period = largest(16, rho=25, epsilon=1e-6)
      >>> round(speed, 3), period
      (3.959, 512)
    """
    return max((theory.speedup(workers, h, rho, epsilon), h) for h in PERIODS)


def _verdicts(rho: float) -> list[Verdict]:
    """Compares with the independent numbers, and states the limit at ε = 0."""
    h, k = SHOWN[-1], WORKERS[-1]
    limit = Verdict(
        f"ε = 0: S → H/(2ρ) = {h / (2 * rho):.4g} as K → ∞, for H = {h}"
        if rho
        else "ε = 0 and ρ = 0: S = K",
        f"S({k}) = {theory.speedup(k, h, rho):.4g}",
    )
    if rho != 25:
        return [limit]
    gaps = []
    for (epsilon, workers), (speed, period) in LARGEST.items():
        found, at = largest(workers, rho, epsilon)
        gaps.append(abs(found / speed - 1) if at == period else float("inf"))
    return [
        limit,
        Verdict(
            f"largest S and its H as evaluated independently, at {len(gaps)} pairs "
            "(ε, K), to 1 %",
            f"{sum(gap < 0.01 for gap in gaps)} of {len(gaps)}; largest difference "
            f"{max(gaps):.2%}",
        ),
    ]


def _draw(directory: Path, rho: float, epsilon: float) -> None:
    """Draws S against K, a curve for each H; at ε = 0 both forms are one."""
    figure = figures.new(10.5, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    shown = [
        ("(a) ε = 0", theory.speedup, 0.0),
        (f"(b) ε = {epsilon:g}, published", theory.speedup, epsilon),
        (f"(b) ε = {epsilon:g}, with 4K", theory.corrected_speedup, epsilon),
    ]
    for axes, (title, model, value) in zip(panels, shown, strict=True):
        _panel(axes, model, rho, value)
        figures.finish(axes, title, "workers K", "speedup S(K)")
        axes.label_outer()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Speedup in the model, ρ = {rho:g}")
    figures.save(figure, directory, NAME)


def _panel(axes: Axes, model: Callable, rho: float, epsilon: float) -> None:
    """Draws the curves of one form of the model at one ε."""
    curves = {
        f"H = {h}": (WORKERS, [model(k, h, rho, epsilon) for k in WORKERS])
        for h in SHOWN
    }
    axes.axhline(1, color="0.6", linestyle=":")
    figures.draw(axes, curves)
    figures.powers_of_two(axes)
