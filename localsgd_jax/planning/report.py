"""Text table and figure of a plan."""

from collections.abc import Mapping
from pathlib import Path

from localsgd_jax.planning import cost_model
from localsgd_jax.planning.period_bound import PeriodBound

PERIODS = tuple(2**i for i in range(11))
_TABLE_PERIODS = (1, 4, 16, 64, 256)
_MARKERS = "osD^vPX*"


def plan_rows(
    workload: cost_model.Workload,
    links: Mapping[str, cost_model.Link],
    max_fraction: float,
    max_period: int | None = None,
) -> list[dict]:
    """Plans a workload for each link.

    Args:
      workload: the workload.
      links: links by name.
      max_fraction: largest fraction of the time in exposed communication.
      max_period: theoretical bound on the period; None if unknown.

    Returns:
      One dict per link: the link, the seconds of an all-reduce, the recommendation, and
      the seconds per step for several periods.
    """
    rows = []
    for name, link in links.items():
        recommendation = cost_model.recommend_period(
            workload, link, max_fraction, max_period
        )
        size = workload.parameters * workload.bits / 8
        rows.append(
            {
                "link": name,
                **link._asdict(),
                "all_reduce_seconds": cost_model.all_reduce_time(
                    link, workload.workers, size
                ),
                **recommendation._asdict(),
                "seconds_per_step": {
                    period: cost_model.round_time(workload, link, period) / period
                    for period in PERIODS
                    if period >= workload.overlap_steps
                },
            }
        )
    return rows


def format_table(
    workload: cost_model.Workload,
    rows: list[dict],
    max_fraction: float,
    bound: PeriodBound | None = None,
) -> str:
    """Formats a plan as a table, one line per link.

    Args:
      workload: the workload.
      rows: result of `plan_rows`.
      max_fraction: the requested fraction.
      bound: theoretical bound on the period, if any.

    Returns:
      The lines.
    """
    periods = [period for period in _TABLE_PERIODS if period >= workload.overlap_steps]
    heading = ["link", "all-reduce", "H", "exposed", "speedup"]
    cells = [[*heading, *(f"step at H={period}" for period in periods)]]
    cells += [_format_row(row, periods) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_format_workload(workload, max_fraction)]
    lines += ["  ".join(map(str.rjust, line, widths)) for line in cells]
    if any(row["limited_by_theory"] for row in rows):
        lines.append("* limited by the theoretical bound, not by the link")
    if bound:
        lines.append(_format_bound(bound))
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """Formats seconds with three digits and a fitting unit.

    Args:
      seconds: at least 0.

    Returns:
      The text.

    Example:
      >>> format_seconds(0.00123), format_seconds(75.3), format_seconds(4e-7)
      ('1.23 ms', '75.3 s', '0.4 µs')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def plot(workload: cost_model.Workload, rows: list[dict], path: Path) -> None:
    """Plots the seconds per step against the period, one curve per link.

    Args:
      workload: the workload.
      rows: result of `plan_rows`.
      path: path of the PNG file.

    Raises:
      OSError: if the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"].resampled(256)
    for i, row in enumerate(rows):
        color = colors(0.87 * i / max(len(rows) - 1, 1))
        times = row["seconds_per_step"]
        axes.plot(
            [*times],
            [*times.values()],
            color=color,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            label=row["link"],
        )
        axes.axvline(row["period"], color=color, linewidth=0.8, linestyle=":")
    axes.axhline(workload.step_seconds, color="0.5", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(
        xlabel="period H",
        ylabel="seconds per local step with exposed communication",
        xlim=(1, PERIODS[-1]),
    )
    axes.grid(which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.suptitle("Time per step; dotted: recommended period")
    figure.savefig(path, format="png")


def _format_row(row: dict, periods: list[int]) -> list[str]:
    """Formats the cells of a link."""
    return [
        row["link"],
        format_seconds(row["all_reduce_seconds"]),
        f"{row['period']}{'*' if row['limited_by_theory'] else ''}",
        f"{row['communication_fraction']:.1%}",
        f"{row['speedup']:.3g}",
        *(format_seconds(row["seconds_per_step"][period]) for period in periods),
    ]


def _format_workload(workload: cost_model.Workload, max_fraction: float) -> str:
    """Formats the workload and the requested fraction."""
    megabytes = workload.parameters * workload.bits / 8e6
    steps, fragments = workload.overlap_steps, workload.fragments
    step = format_seconds(workload.step_seconds)
    overhead = workload.overhead_seconds
    return (
        f"{workload.workers} workers, {step} per local step, "
        f"{megabytes:.3g} MB per round"
        + (f", overhead {format_seconds(overhead)} per round" if overhead else "")
        + (f", {fragments} fragments" if fragments > 1 else "")
        + (f", overlap {steps} steps" if steps else "")
        + f"; H for at most {max_fraction:.0%} exposed communication"
    )


def _format_bound(bound: PeriodBound) -> str:
    """Formats the theoretical bound and its constants."""
    names = ("mu", "L", "sigma2", "G2")
    values = zip(names, bound.constants, strict=True)
    constants = ", ".join(f"{name} = {value:.3g}" for name, value in values)
    result = (
        f"theoretical bound H <= {bound.max_period}"
        if bound.max_period
        else "not strongly convex there, so there is no bound (--mu sets a known mu)"
    )
    origin = "measured" if bound.measured else "given"
    return f"constants {origin}: {constants}: {result}"
