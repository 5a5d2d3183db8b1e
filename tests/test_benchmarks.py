"""Each measurement runs, tiny, so that none rots; none of its numbers is asserted."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

from benchmarks import models, record, timing  # noqa: E402

COLUMNS = {
    "overhead": {"devices", "model", "parameters", "round ms", "steps ms", "ratio"},
    "scaling": {
        *("K", "H", "parameters", "us/worker-step", "memory/minimum", "compile s")
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


def test_the_command_writes_what_it_shows(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "scaling", "--tiny", "--out"]
    done = subprocess.run(
        [*command, tmp_path], cwd=HERE, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert result["tiny"] and result["machine"]["jax"] and result["rows"]
    assert (tmp_path / "scaling.txt").read_text().strip() in done.stdout


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
