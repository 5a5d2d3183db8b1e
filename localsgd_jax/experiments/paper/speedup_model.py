"""The paper's model of the speedup: S(K) for ε = 0 and for positive ε.

Command: localsgd reproduce speedup-theory (2 seconds)
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from localsgd_jax import theory
from localsgd_jax.experiments import plotting
from localsgd_jax.experiments.paper import results
from localsgd_jax.experiments.paper.results import Finding

NAME = "speedup-theory"
WORKERS = tuple(2**i for i in range(11))
PERIODS = tuple(2**i for i in range(12))
PLOTTED_PERIODS = (1, 4, 16, 64, 256, 1024)
EPSILONS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
MODELS = {"published": theory.speedup, "with 4K": theory.corrected_speedup}
REFERENCE_RHO, REFERENCE_TOLERANCE = 25, 0.01
# From an independent evaluation of the published form at ρ = 25, by (ε, K): the
# largest S and the period H (a power of two) that attains it.
REFERENCE_MAXIMA = {
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
    """Writes the table and the figure and returns the findings as text.

    The figure shows ε = 0 and one positive ε. Raises a ValueError if ε is not positive
    or ρ is negative.
    """
    if not epsilon > 0:
        raise ValueError(f"--epsilon must be positive, got {epsilon:g}")
    rows = speedup_table(rho, sorted({*EPSILONS, epsilon}))
    directory.mkdir(parents=True, exist_ok=True)
    results.write_rows(directory / f"{NAME}.csv", rows)
    _plot(directory, rho, epsilon)
    return results.write_findings(directory, NAME, _findings(rho))


def speedup_table(rho: float, epsilons: Sequence[float]) -> list[dict]:
    """Returns a row for each form of the model, ε, H and K."""
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


def max_speedup(workers: int, rho: float, epsilon: float) -> tuple[float, int]:
    """Returns the largest speedup of the published form and its period.

    Args:
      workers: K.
      rho: ρ.
      epsilon: ε.

    Returns:
      The largest S and its H, a power of two.

    Example:
      >>> speedup, period = max_speedup(16, rho=25, epsilon=1e-6)
      >>> round(speedup, 3), period
      (3.959, 512)
    """
    return max((theory.speedup(workers, h, rho, epsilon), h) for h in PERIODS)


def _findings(rho: float) -> list[Finding]:
    """Returns the limit at ε = 0 and the comparison with the reference values."""
    h, k = PLOTTED_PERIODS[-1], WORKERS[-1]
    limit = Finding(
        f"ε = 0: S → H/(2ρ) = {h / (2 * rho):.4g} as K → ∞, for H = {h}"
        if rho
        else "ε = 0 and ρ = 0: S = K",
        f"S({k}) = {theory.speedup(k, h, rho):.4g}",
    )
    if rho != REFERENCE_RHO:
        return [limit]
    deviations = []
    for (epsilon, workers), (speedup, period) in REFERENCE_MAXIMA.items():
        maximum, best_period = max_speedup(workers, rho, epsilon)
        deviations.append(
            abs(maximum / speedup - 1) if best_period == period else float("inf")
        )
    num_equal = sum(deviation < REFERENCE_TOLERANCE for deviation in deviations)
    return [
        limit,
        Finding(
            "largest S and its H equal to independently computed values at "
            f"{len(deviations)} pairs (ε, K), to 1 %",
            f"{num_equal} of {len(deviations)}; largest deviation "
            f"{max(deviations):.2%}",
        ),
    ]


def _plot(directory: Path, rho: float, epsilon: float) -> None:
    """Plots S against K, one curve per H; at ε = 0 both forms are equal."""
    figure = plotting.new_figure(10.5, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    forms = [
        ("(a) ε = 0", theory.speedup, 0.0),
        (f"(b) ε = {epsilon:g}, published", theory.speedup, epsilon),
        (f"(b) ε = {epsilon:g}, with 4K", theory.corrected_speedup, epsilon),
    ]
    for axes, (title, model, value) in zip(panels, forms, strict=True):
        _plot_panel(axes, model, rho, value)
        plotting.label_axes(axes, title, "workers K", "speedup S(K)")
        axes.label_outer()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(f"Speedup in the model, ρ = {rho:g}")
    plotting.save(figure, directory, NAME)


def _plot_panel(axes: Axes, model: Callable, rho: float, epsilon: float) -> None:
    """Plots the curves of one form of the model at one ε."""
    curves = {
        f"H = {h}": (WORKERS, [model(k, h, rho, epsilon) for k in WORKERS])
        for h in PLOTTED_PERIODS
    }
    axes.axhline(1, color="0.6", linestyle=":")
    plotting.plot_curves(axes, curves)
    plotting.set_log2_scale(axes)
