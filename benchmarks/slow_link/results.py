"""Result tables and the figure of held-out loss against wall time."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.reporting import format_table
from benchmarks.slow_link.methods import METHODS, OVERLAPPED_SUFFIX
from benchmarks.slow_link.tasks import TARGET_LOSSES
from localsgd_jax.experiments import plotting

# Smaller fractions of a step are not reported: its time varies as much between runs.
MIN_HIDEABLE_FRACTION = 0.1


def make_row(
    case: tuple[str, str, float],
    step_seconds: float,
    unthrottled: dict,
    throttled: dict,
    predicted: float,
) -> dict:
    """Returns the row of one method on one link.

    Args:
      case: model, method and rate of the link in Mbit/s.
      step_seconds: seconds of a local step.
      unthrottled: result of `worker.train` without a limit on the link.
      throttled: result of `worker.train` on the link.
      predicted: seconds of a round by the cost model.

    Returns:
      The columns of the table, and the losses for the figure.
    """
    model, method, mbit = case
    losses = sorted((int(step), loss) for step, loss in unthrottled["losses"].items())
    target = TARGET_LOSSES[model]
    steps_to_target = next((step for step, loss in losses if loss <= target), None)
    seconds = throttled["seconds"] / throttled["steps"]
    return {
        "model": model,
        "method": method,
        "mbit": mbit,
        "local ms/step": 1e3 * step_seconds,
        "ms/step": 1e3 * seconds,
        "predicted/measured": predicted * throttled["rounds"] / throttled["seconds"],
        "steps": throttled["steps"],
        "steps to target": steps_to_target,
        "s to target": steps_to_target and steps_to_target * seconds,
        "losses": losses,
    }


def with_ratios(rows: Sequence[dict]) -> list[dict]:
    """Adds speedups and hidden fractions to the rows, and removes the losses.

    The speedup is the ratio of the time to the target with an average at every step to
    the time of the method. The hidden fraction of an overlapped method is

        (T_blocking − T_overlapped) / min(c, T_blocking − c)

    with T the seconds of a step of the method with and without overlap, and c the
    seconds of a local step. It is None where the denominator is less than a tenth of
    T_blocking, since the measured times vary as much.
    """

    def find_row(row: dict, method: str) -> dict:
        case = (row["model"], row["mbit"], method)
        matches = (x for x in rows if (x["model"], x["mbit"], x["method"]) == case)
        return next(matches, {})

    def speedup(row: dict) -> float | None:
        reference = find_row(row, "every step").get("s to target")
        seconds = row["s to target"]
        return reference / seconds if reference and seconds else None

    def hidden_fraction(row: dict) -> float | None:
        blocking_name = row["method"].removesuffix(OVERLAPPED_SUFFIX)
        blocking = find_row(row, blocking_name).get("ms/step")
        if not blocking or not row["method"].endswith(OVERLAPPED_SUFFIX):
            return None
        hideable = min(row["local ms/step"], blocking - row["local ms/step"])
        if hideable <= MIN_HIDEABLE_FRACTION * blocking:
            return None
        return (blocking - row["ms/step"]) / hideable

    return [
        {key: value for key, value in row.items() if key != "losses"}
        | {"speedup": speedup(row), "hidden fraction": hidden_fraction(row)}
        for row in rows
    ]


def plot(directory: Path, rows: Sequence[dict]) -> None:
    """Plots held-out loss against wall time, one panel per model and link."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    links = list(dict.fromkeys(row["mbit"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = plotting.new_figure(3.6 * len(links), 3 * len(models) + 0.8)
    panels = figure.subplots(len(models), len(links), squeeze=False)
    for axes_row, model in zip(panels, models, strict=True):
        for axes, mbit in zip(axes_row, links, strict=True):
            selected = [r for r in rows if (r["model"], r["mbit"]) == (model, mbit)]
            _plot_panel(axes, selected, methods)
            axes.axhline(TARGET_LOSSES[model], color="0.6", linewidth=1)
            title = f"{model}, {mbit:g} Mbit/s"
            plotting.label_axes(axes, title, "seconds", "held-out loss")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    plotting.save(figure, directory, "slow_link")


def _plot_panel(axes: Axes, rows: Sequence[dict], methods: Sequence[str]) -> None:
    """Plots the losses of all methods on one link."""
    for row in rows:
        style = plotting.curve_style(methods.index(row["method"]), len(methods))
        axes.plot(
            [step * row["ms/step"] / 1e3 for step, _ in row["losses"]],
            [loss for _, loss in row["losses"]],
            label=row["method"],
            **style | {"markersize": 3},
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def earlier_rows(directory: Path, table: str, rows: Sequence[dict]) -> list[dict]:
    """Returns the rows of an earlier run that this run has not measured.

    Args:
      directory: directory with the results of the earlier run, if there is one.
      table: key of the table in slow_link.json.
      rows: rows of this run.
    """

    def key(row: dict) -> tuple:
        return tuple(row.get(name) for name in ("model", "method", "mbit"))

    path = directory / "slow_link.json"
    earlier = json.loads(path.read_text())[table] if path.exists() else []
    measured = {key(row) for row in rows}
    return [row for row in earlier if key(row) not in measured]


def write(directory: Path, result: dict) -> None:
    """Writes the results as JSON, text tables and a figure.

    Args:
      directory: output directory.
      result: `machine`, and the tables `rows` (from `make_row`) and `torch_comparison`.
    """
    order = list(METHODS)
    result["rows"].sort(
        key=lambda row: (row["model"], order.index(row["method"]), -row["mbit"])
    )
    (directory / "slow_link.json").write_text(json.dumps(result, indent=2) + "\n")
    tables = (with_ratios(result["rows"]), result["torch_comparison"])
    text = "\n\n".join(format_table(rows) for rows in tables if rows) + "\n"
    (directory / "slow_link.txt").write_text(text)
    print(text)
    plot(directory, result["rows"])
