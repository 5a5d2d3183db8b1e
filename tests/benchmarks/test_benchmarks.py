"""Measurements at a tiny size: they run, and their rows are complete."""

import json
import os
import subprocess
import sys

import jax
import pytest
from harness.paths import ROOT
from harness.selection import in_full, keep

from benchmarks import accelerator_lanes, baselines, models, reporting, timing
from benchmarks.__main__ import BENCHMARKS, DESCRIPTIONS, load_module
from benchmarks.baselines import problem, registry, worker_processes

COLUMNS = {
    "overhead": {"devices", "model", "parameters", "round ms", "steps ms", "ratio"},
    "scaling": {
        *("K", "H", "parameters", "us/worker-step", "compile s"),
        *("planned/minimum", "peak/minimum"),
    },
    "startup": {"what", "library s", "plain s", "ratio"},
    "convolutions": {
        *("devices", "K", "plain ms/gradient", "fused", "gated", "train"),
    },
    "prediction": {
        *("K", "model", "H", "predicted ms", "measured ms", "predicted/measured")
    },
}


@pytest.mark.parametrize("name", keep(COLUMNS, ["prediction"]))
def test_tiny_measurement(name):
    module = load_module(name)
    for devices in module.DEVICES:
        rows = module.run(devices, tiny=True)
        for row in rows:
            assert set(row) == COLUMNS[name]
            assert all(x > 0 for x in row.values() if not isinstance(x, str))
        assert reporting.format_table(rows)
        assert module.__doc__.splitlines()[0].endswith(".")


def compare(*names):
    """Returns the rows of a tiny comparison of the named baselines."""
    chosen = [one for one in registry.BASELINES if one.name in names]
    assert {one.name for one in chosen} == set(names)
    return baselines.run_comparison(problem.make("logistic", tiny=True), True, chosen)


def assert_row(row):
    columns = {"model", "algorithm", "baseline", "with"}
    assert set(row) == columns | {"us/step", "over library", "difference"}
    assert row["us/step"] > 0 and row["over library"] > 0
    assert row["difference"] <= baselines.TOLERANCE


@pytest.mark.full
def test_library_against_plain_jax():
    rows = compare("fused rounds", "gated steps", "gated, H = 1", "data-parallel loop")
    for row in rows:
        assert_row(row)
    # The same algorithm with sums in another order, not the same program twice.
    assert 0 < rows[-1]["difference"]


@pytest.mark.full
def test_library_in_two_processes():
    for row in compare("fused rounds", "two processes"):
        assert_row(row)


@pytest.mark.parametrize(
    "baseline",
    [in_full(one, id=one.name) for one in registry.BASELINES if one.requires],
)
def test_baseline_of_another_library(baseline):
    for package in baseline.requires:
        if not registry.installed(package):
            pytest.skip(f"{package} is not installed: pip install '.[baselines]'")
    for row in compare("fused rounds", baseline.name):
        assert_row(row)


def test_missing_package_is_reported():
    first = registry.BASELINES[0]
    missing = first._replace(name="missing", requires=("no-such-package",))
    tiny = problem.make("logistic", tiny=True)
    *_, row = baselines.run_comparison(tiny, True, [first, missing])
    assert row["baseline"] == "missing" and row["us/step"] == "not installed"


@pytest.mark.full
def test_baseline_with_different_params_raises():
    first = registry.BASELINES[0]

    def setup_with_other_rate(given, tiny, folder):
        return first.setup(given._replace(rate=0.101), tiny, folder)

    other = first._replace(name="other", setup=setup_with_other_rate)
    message = "^other: parameters must be those of the first baseline of local SGD"
    with pytest.raises(ValueError, match=message):
        baselines.run_comparison(
            problem.make("logistic", tiny=True), True, [first, other]
        )


def test_stderr_of_failed_process_is_reported():
    with pytest.raises(RuntimeError, match="(?s)^rank 0 ended.*no good"):
        worker_processes.WorkerProcesses(["-c", "raise SystemExit('no good')"], 1)


@pytest.mark.full
def test_accelerator_lanes():
    rows = accelerator_lanes.run(1, tiny=True)
    assert [(row["K"], row["lanes"]) for row in rows] == [(2, "vmap"), (2, "map")]
    for row in rows:
        assert set(row) == {"K", "lanes", "counted/formula", *accelerator_lanes.COLUMNS}
        assert row["mfu"] == "unknown for cpu"
        assert row["steps"] + row["sync"] == pytest.approx(1)
        assert row["tokens/s"] > 0 and row["memory GB"] > 0
    assert reporting.format_table(rows)


@pytest.mark.full
def test_lanes_out_of_memory_are_reported(monkeypatch):
    def out_of_memory(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(accelerator_lanes, "measure", out_of_memory)
    monkeypatch.setattr(accelerator_lanes, "compiled_flops", lambda shape: None)
    for row in accelerator_lanes.run(1, tiny=True):
        assert row["tokens/s"] == "out of memory"
        assert row["counted/formula"] == "not counted"


@pytest.mark.full
def test_analytic_flops_match_compiled_flops():
    shape = {"width": 128, "layers": 4, "heads": 4, "vocabulary": 512, "length": 64}
    compiled = accelerator_lanes.compiled_flops(shape)
    assert compiled == pytest.approx(accelerator_lanes.analytic_flops(shape), rel=0.1)


def test_batch_leaves_memory_for_eight_lanes():
    # By default JAX allocates three quarters of a device's memory.
    batches = [
        accelerator_lanes.choose_size(False, gb * 0.75e9).batch for gb in (150, 85, 42)
    ]
    assert batches == [32, 16, 8]
    largest = accelerator_lanes.choose_size(False, 2**37)
    assert all(largest.batch % workers == 0 for workers in largest.workers)


@pytest.mark.full
def test_command_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "scaling", "--tiny", "--out"]
    done = subprocess.run(
        [*command, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert result["tiny"] and result["machine"]["jax"] and result["rows"]
    assert (tmp_path / "scaling.txt").read_text().strip() in done.stdout
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_accelerator_measurement_on_cpu_raises(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "accelerator", "--out", tmp_path]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("accelerator: needs a GPU or a TPU")


def test_help_lists_every_measurement(monkeypatch, capsys):
    from benchmarks.__main__ import parse_arguments

    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        parse_arguments()
    text = capsys.readouterr().out
    for name in BENCHMARKS:
        assert f"    {name}" in text and DESCRIPTIONS[name] in text
        assert load_module(name).DEVICES


def test_model_sizes():
    sizes = {model.name: model.size for model in (models.mlp(), models.gpt())}
    assert sizes["mlp"] == pytest.approx(1e6, rel=0.02)
    assert sizes["gpt"] == pytest.approx(1e7, rel=0.02)


def test_timing_is_interleaved():
    order = []

    def call(name):
        return lambda: order.append(name)

    times, ratio = timing.time_interleaved(
        {"a": call("a"), "b": call("b")}, 3, min_seconds=0
    )
    assert order[-6:] == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and ratio > 0


def test_format_table():
    rows = [{"K": 2, "ratio": 1.23456}, {"K": 16, "ratio": 10.0}]
    lines = [" K  ratio", " 2  1.235", "16     10"]
    assert reporting.format_table(rows).splitlines() == lines
