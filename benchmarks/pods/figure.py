"""Figure of the pods: memory, traffic across slices and predicted speedup."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.pods.prediction import GBIT_PER_HOST
from localsgd_jax.experiments import plotting


def plot(rows: Sequence[dict], directory: Path) -> None:
    """Plots pods.png and pods.svg from the rows of methods."""
    rows = [row for row in rows if not row["failure"]]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if not methods:
        return
    figure = plotting.new_figure(10.5, 3.4)
    memory, traffic, speedup = figure.subplots(1, 3)
    for index, method in enumerate(methods):
        chosen = sorted(
            (row for row in rows if row["method"] == method),
            key=lambda row: (row["chips"] // row["slices"], row["slices"]),
        )
        style = plotting.curve_style(index, len(methods)) | {"label": method}
        style["linestyle"] = ":"
        positions = range(len(chosen))
        memory.plot(positions, [row["peak_bytes"] / 2**30 for row in chosen], **style)
        traffic.plot(positions, [row["dcn_bytes"] / 2**20 for row in chosen], **style)
        largest = chosen[-1]["predicted"]
        links = [largest[str(gbit)]["speedup"] for gbit in GBIT_PER_HOST]
        speedup.plot(GBIT_PER_HOST, links, **style | {"linestyle": "-"})
    labels = [f"{row['slices']}×{row['chips'] // row['slices']}" for row in chosen]
    for axes in (memory, traffic):
        axes.set_xticks(range(len(labels)), labels, fontsize=7)
    memory.set_ylim(0, None)
    traffic.set_yscale("log")
    speedup.set_xscale("log")
    speedup.set_xticks(GBIT_PER_HOST, [str(gbit) for gbit in GBIT_PER_HOST])
    speedup.minorticks_off()
    slices = "slices × chips per slice"
    plotting.label_axes(memory, "peak memory", slices, "GiB per chip")
    plotting.label_axes(traffic, "across slices", slices, "MiB per chip and step")
    title = f"predicted speedup, {labels[-1]} chips"
    plotting.label_axes(speedup, title, "Gbit/s per host", "over data parallel")
    speedup.legend(frameon=False, fontsize=7)
    plotting.save(figure, directory, "pods")
