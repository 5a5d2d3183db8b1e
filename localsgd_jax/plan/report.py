"""The plan as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path

from localsgd_jax import cost
from localsgd_jax.plan.cap import Cap

PERIODS = tuple(2**i for i in range(11))
_MARKERS = "osD^vPX*"


def rows(
    job: cost.Job,
    links: Mapping[str, cost.Link],
    share: float,
    longest: int | None = None,
) -> list[dict]:
    """Plans a job for each link.

    Args:
      job: what is trained.
      links: by name.
      share: of the time that workers may wait.
      longest: period that the statistics allow, None if unknown.

    Returns:
      For each link the time of an exchange, what to do, and the time per step for
      several periods.
    """
    found = []
    for name, link in links.items():
        advice = cost.advise(job, link, share, longest)
        size = job.parameters * job.bits / 8
        found.append(
            {
                "link": name,
                "latency": link.latency,
                "bandwidth": link.bandwidth,
                "exchange": cost.all_reduce_time(link, job.workers, size),
                **advice._asdict(),
                "seconds_per_step": {
                    period: cost.round_time(job, link, period) / period
                    for period in PERIODS
                    if period >= job.overlap
                },
            }
        )
    return found


def table(job: cost.Job, plan: list[dict], share: float, cap: Cap | None = None) -> str:
    """Writes a plan, a line for each link.

    Args:
      job: what is trained.
      plan: rows.
      share: that was asked for.
      cap: what the theory says, None if it was not asked.

    Returns:
      The lines.
    """
    shown = [period for period in (1, 4, 16, 64, 256) if period >= job.overlap]
    heading = ["link", "exchange", "H", "wait", "speedup"]
    heading += [f"step at H={period}" for period in shown]
    cells = [heading]
    for row in plan:
        cells.append(
            [
                row["link"],
                duration(row["exchange"]),
                f"{row['period']}{'*' if row['capped'] else ''}",
                f"{row['share']:.1%}",
                f"{row['speedup']:.3g}",
                *(duration(row["seconds_per_step"][period]) for period in shown),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in cells]
    megabytes = job.parameters * job.bits / 8e6
    overlapped = f", overlap {job.overlap} steps" if job.overlap else ""
    pieces = f", {job.fragments} fragments" if job.fragments > 1 else ""
    return "\n".join(
        [
            f"{job.workers} workers, {duration(job.compute)} a local step, "
            f"{megabytes:.3g} MB a round{pieces}{overlapped}; "
            f"H for at most {share:.0%} of waiting",
            *lines,
            *(
                ["* drift asks for no longer period, whatever the link"]
                if any(row["capped"] for row in plan)
                else []
            ),
            *([_capped(cap)] if cap else []),
        ]
    )


def _capped(cap: Cap) -> str:
    """Says what the theory makes of which constants."""
    names = ("mu", "L", "sigma2", "G2")
    numbers = zip(names, cap.constants, strict=True)
    known = ", ".join(f"{name} = {number:.3g}" for name, number in numbers)
    said = (
        f"drift asks for H of at most {cap.longest}"
        if cap.longest
        else "not strongly convex there, so there is no cap (--mu gives a known mu)"
    )
    return f"constants {'measured' if cap.measured else 'given'}: {known}: {said}"


def duration(seconds: float) -> str:
    """Writes seconds with three digits and a unit that fits.

    Args:
      seconds: at least 0.

    Returns:
      The text.

    Example:
      >>> duration(0.00123), duration(75.3), duration(4e-7)
      ('1.23 ms', '75.3 s', '0.4 µs')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def draw(job: cost.Job, plan: list[dict], path: Path) -> None:
    """Draws the time per step against H, a curve for each link.

    Args:
      job: what is trained.
      plan: rows.
      path: of the PNG.

    Raises:
      OSError: if the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    shades = matplotlib.colormaps["viridis"].resampled(256)
    for i, row in enumerate(plan):
        color = shades(0.87 * i / max(len(plan) - 1, 1))
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
    axes.axhline(job.compute, color="0.5", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(
        xlabel="period H",
        ylabel="seconds for a local step, waiting included",
        xlim=(1, PERIODS[-1]),
    )
    axes.grid(which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.suptitle("What a step costs; dotted: the period advised")
    figure.savefig(path, format="png")
