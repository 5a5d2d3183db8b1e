"""Each measurement runs, tiny, so that none rots; none of its numbers is asserted."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from benchmarks import accelerator, models, peers, record, timing  # noqa: E402
from benchmarks.peers import contestants, crew, problem  # noqa: E402

COLUMNS = {
    "overhead": {"devices", "model", "parameters", "round ms", "steps ms", "ratio"},
    "scaling": {
        *("K", "H", "parameters", "us/worker-step", "compile s"),
        *("planned/minimum", "peak/minimum"),
    },
    "startup": {"what", "library s", "plain s", "ratio"},
    "prediction": {
        *("K", "model", "H", "predicted ms", "measured ms", "predicted/measured")
    },
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_tiny_version(name):
    module = importlib.import_module(f"benchmarks.{name}")
    for devices in module.DEVICES:
        rows = module.run(devices, tiny=True)
        for row in rows:
            assert set(row) == COLUMNS[name]
            assert all(x > 0 for x in row.values() if not isinstance(x, str))
        assert record.table(rows)
        assert module.__doc__.splitlines()[0].endswith(".")


def compared(*names):
    """Rows of a tiny comparison of the contestants that are named."""
    chosen = [one for one in contestants.CONTESTANTS if one.name in names]
    assert {one.name for one in chosen} == set(names)
    return peers.compare(problem.make("logistic", tiny=True), True, chosen)


def check_row(row):
    columns = {"model", "algorithm", "contestant", "with"}
    assert set(row) == columns | {"us/step", "over ours", "differs"}
    assert row["us/step"] > 0 and row["over ours"] > 0
    assert row["differs"] <= peers.TOLERANCE


def test_the_library_beside_plain_jax():
    rows = compared("fused rounds", "gated steps", "gated, H = 1", "data-parallel loop")
    for row in rows:
        check_row(row)
    # The same algorithm in another order of sums, and not the same program twice.
    assert 0 < rows[-1]["differs"]


def test_the_library_in_two_processes():
    for row in compared("fused rounds", "two processes"):
        check_row(row)


@pytest.mark.parametrize(
    "one",
    [one for one in contestants.CONTESTANTS if one.needs],
    ids=lambda one: one.name,
)
def test_a_peer(one):
    for package in one.needs:
        if not contestants.installed(package):
            pytest.skip(f"{package} is not installed: it is in the extra peers")
    for row in compared("fused rounds", one.name):
        check_row(row)


def test_a_peer_that_is_not_installed_is_named():
    missing = contestants.CONTESTANTS[0]._replace(name="someone", needs=("no-such",))
    given = problem.make("logistic", tiny=True)
    *_, row = peers.compare(given, True, [contestants.CONTESTANTS[0], missing])
    assert row["contestant"] == "someone" and row["us/step"] == "not installed"


def test_who_ends_elsewhere_is_refused():
    first = contestants.CONTESTANTS[0]

    def elsewhere(given, tiny, folder):
        return first.enter(given._replace(rate=0.101), tiny, folder)

    with pytest.raises(ValueError, match="^cheat: local SGD must end where"):
        peers.compare(
            problem.make("logistic", tiny=True),
            True,
            [first, first._replace(name="cheat", enter=elsewhere)],
        )


def test_a_process_that_ends_is_quoted():
    with pytest.raises(RuntimeError, match="(?s)^rank 0 ended.*no good"):
        crew.Crew(["-c", "raise SystemExit('no good')"], 1)


def test_lanes_on_an_accelerator():
    rows = accelerator.run(1, tiny=True)
    assert [(row["K"], row["lanes"]) for row in rows] == [(2, "vmap"), (2, "map")]
    for row in rows:
        assert set(row) == {"K", "lanes", "counted/formula", *accelerator.COLUMNS}
        assert row["of peak"] == "unknown for cpu"
        assert row["steps"] + row["sync"] == pytest.approx(1)
        assert row["tokens/s"] > 0 and row["memory GB"] > 0
    assert record.table(rows)


def test_lanes_without_room_are_reported(monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(accelerator, "measure", full)
    monkeypatch.setattr(accelerator, "by_compiler", lambda shape: None)
    for row in accelerator.run(1, tiny=True):
        assert row["tokens/s"] == "no room"
        assert row["counted/formula"] == "not counted"


def test_operations_by_formula_and_by_compiler():
    shape = {"width": 128, "layers": 4, "heads": 4, "vocabulary": 512, "length": 64}
    counted, formula = accelerator.by_compiler(shape), accelerator.by_formula(shape)
    assert counted == pytest.approx(formula, rel=0.1)


def test_the_batch_leaves_room_for_eight_lanes():
    # JAX takes three quarters of a device's memory unless told otherwise.
    found = [accelerator.size(False, gb * 0.75e9).batch for gb in (150, 85, 42)]
    assert found == [32, 16, 8]
    largest = accelerator.size(False, 2**37)
    assert all(largest.batch % workers == 0 for workers in largest.workers)


def test_the_command_writes_what_it_shows(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "scaling", "--tiny", "--out"]
    done = subprocess.run(
        [*command, tmp_path], cwd=HERE, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert result["tiny"] and result["machine"]["jax"] and result["rows"]
    assert (tmp_path / "scaling.txt").read_text().strip() in done.stdout


def test_the_command_refuses_a_cpu_as_an_accelerator(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "accelerator", "--out", tmp_path]
    done = subprocess.run(
        command,
        cwd=HERE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("accelerator: it needs a GPU or a TPU")


def test_the_sizes_that_the_tables_name():
    found = {model.name: model.size for model in (models.mlp(), models.gpt())}
    assert found["mlp"] == pytest.approx(1e6, rel=0.02)
    assert found["gpt"] == pytest.approx(1e7, rel=0.02)


def test_contestants_take_turns():
    turns = []

    def call(name):
        return lambda: turns.append(name)

    times, ratio = timing.alternate({"a": call("a"), "b": call("b")}, 3, least=0)
    assert turns[-6:] == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and ratio > 0


def test_a_table():
    rows = [{"K": 2, "ratio": 1.23456}, {"K": 16, "ratio": 10.0}]
    assert record.table(rows).splitlines() == [" K  ratio", " 2  1.235", "16     10"]
