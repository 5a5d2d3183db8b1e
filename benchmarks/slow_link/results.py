"""What came out: rows, tables and the figure of loss against wall time."""

import json
from pathlib import Path

from benchmarks import record
from benchmarks.slow_link.methods import METHODS
from benchmarks.slow_link.tasks import TARGETS
from localsgd_jax.reproduce import figures

BESIDE = ", beside"


def row(
    model: str,
    name: str,
    mbit: float,
    alone: float,
    whole: dict,
    found: dict,
    said: float,
) -> dict:
    """One method on one link.

    Args:
      model: name.
      name: of the method.
      mbit: of the link.
      alone: seconds of a local step.
      whole: the run without a limit.
      found: the run on the link.
      said: what the planner predicted for a round.

    Returns:
      What the table, and with the losses the figure, show.
    """
    losses = sorted((int(step), loss) for step, loss in whole["losses"].items())
    needed = next((step for step, loss in losses if loss <= TARGETS[model]), None)
    step = found["seconds"] / found["steps"]
    return {
        "model": model,
        "method": name,
        "mbit": mbit,
        "ms/step alone": 1e3 * alone,
        "ms/step": 1e3 * step,
        "predicted/measured": said * found["rounds"] / found["seconds"],
        "steps": found["steps"],
        "steps to target": needed,
        "s to target": needed and needed * step,
        "losses": losses,
    }


def with_ratios(rows: list[dict]) -> list[dict]:
    """Adds how much sooner the target is reached than with an average at every step.

    And what of the transfer is hidden, for methods that go on in the meantime, with the
    seconds T of a step of the same method that waits, and c of a step alone:

        (T_waits − T_beside) / min(c, T_waits − c)

    Not told where that is less than a tenth of T_waits, which varies as much.
    """

    def peer(one: dict, name: str) -> dict:
        same = (one["model"], one["mbit"], name)
        found = (x for x in rows if (x["model"], x["mbit"], x["method"]) == same)
        return next(found, {})

    def sooner(one: dict) -> float | None:
        plain, here = peer(one, "every step").get("s to target"), one["s to target"]
        return plain / here if plain and here else None

    def hidden(one: dict) -> float | None:
        waits = peer(one, one["method"].removesuffix(BESIDE)).get("ms/step")
        if not waits or not one["method"].endswith(BESIDE):
            return None
        most = min(one["ms/step alone"], waits - one["ms/step alone"])
        return (waits - one["ms/step"]) / most if most > waits / 10 else None

    return [
        {key: value for key, value in one.items() if key != "losses"}
        | {"times sooner": sooner(one), "hidden": hidden(one)}
        for one in rows
    ]


def draw(directory: Path, rows: list[dict]) -> None:
    """Draws held-out loss against wall time, a panel for each model and link."""
    models = list(dict.fromkeys(one["model"] for one in rows))
    links = list(dict.fromkeys(one["mbit"] for one in rows))
    methods = list(dict.fromkeys(one["method"] for one in rows))
    figure = figures.new(3.6 * len(links), 3 * len(models) + 0.8)
    panels = figure.subplots(len(models), len(links), squeeze=False)
    for across, model in zip(panels, models, strict=True):
        for axes, mbit in zip(across, links, strict=True):
            for one in rows:
                if (one["model"], one["mbit"]) != (model, mbit):
                    continue
                look = figures.style(methods.index(one["method"]), len(methods))
                seconds = [step * one["ms/step"] / 1e3 for step, _ in one["losses"]]
                axes.plot(
                    seconds,
                    [loss for _, loss in one["losses"]],
                    label=one["method"],
                    **look | {"markersize": 3},
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.axhline(TARGETS[model], color="0.6", linewidth=1)
            figures.finish(
                axes, f"{model}, {mbit:g} Mbit/s", "seconds", "held-out loss"
            )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figures.save(figure, directory, "slow_link")


def others(directory: Path, part: str, rows: list[dict]) -> list[dict]:
    """Returns the rows that an earlier run has written there and this one has not."""

    def name(one: dict) -> tuple:
        return tuple(one.get(key) for key in ("model", "method", "mbit"))

    path = directory / "slow_link.json"
    before = json.loads(path.read_text())[part] if path.exists() else []
    return [one for one in before if name(one) not in set(map(name, rows))]


def _place(one: dict) -> tuple:
    """Where a row stands: by model, method and speed."""
    return one["model"], [*METHODS].index(one["method"]), -one["mbit"]


def write(directory: Path, result: dict) -> None:
    """Writes what was measured as JSON, as a table and as a picture."""
    result["rows"].sort(key=_place)
    (directory / "slow_link.json").write_text(json.dumps(result, indent=2) + "\n")
    tables = (with_ratios(result["rows"]), result["beside"])
    text = "\n\n".join(record.table(rows) for rows in tables if rows) + "\n"
    (directory / "slow_link.txt").write_text(text)
    print(text)
    draw(directory, result["rows"])
