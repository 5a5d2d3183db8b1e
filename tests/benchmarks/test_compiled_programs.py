"""Programs for pods: compiled in a child process, read, tabulated and predicted."""

import json
import sys

import pytest

import benchmarks.__main__ as command_line
from benchmarks import sharded_rules
from benchmarks.pods import command, compilation, gpt, prediction, results, topology
from benchmarks.pods.methods import DATA_PARALLEL, LOCAL_STEP, METHODS
from localsgd_jax.analysis import compile_targets
from localsgd_jax.planning import cost_model

needs_compiler = pytest.mark.skipif(
    not compile_targets.is_compiler_installed("tpu"),
    reason=compile_targets.install_command("tpu"),
)
KEYS = sharded_rules.KEYS
LIMITS = compilation.Limits(seconds=120, gigabytes=8)


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    command_line.main()


@needs_compiler
def test_sharded_rules_are_compiled_for_two_slices(monkeypatch, tmp_path):
    rules = ["average()", "shard_state(diloco(), K)"]
    options = ["--tiny", "--rules", *rules, "--out", tmp_path]
    run_command(monkeypatch, "sharded_rules", *options)
    result = json.loads((tmp_path / "sharded_rules.json").read_text())
    (command_of_rows,) = result["commands"]
    assert command_of_rows.startswith("python -m benchmarks sharded_rules --tiny")
    assert result["machine"]["jax"] and result["machine"]["libtpu"]
    average, sharded = result["rows"]
    assert [row["rule"] for row in result["rows"]] == rules
    for row in (average, sharded):
        assert row["failure"] == "" and row["compile_cpu_s"] > 0
        assert row["argument_bytes"] <= 1.1 * row["least_bytes"] + 1e5
        assert row["inner_bytes"] <= 1e6
        # The ring all-reduce of two slices sends a piece, and so do its two halves.
        assert row["dcn_bytes"] == pytest.approx(row["piece_bytes"], rel=0.05)
        assert row["worker_bytes"] == row["dcn_bytes"]


@needs_compiler
def test_pods_are_compiled_for_two_slices(monkeypatch, tmp_path):
    options = ["--small", "--methods", "DiLoCo", "--out", tmp_path]
    run_command(monkeypatch, "pods", *options)
    rows = {row["program"]: row for row in results.read(tmp_path / "pods.json")["rows"]}
    assert list(rows) == [DATA_PARALLEL, LOCAL_STEP, "DiLoCo"]
    assert not any(row["failure"] for row in rows.values())
    # A local step sends inside a worker only, a synchronisation across slices only.
    assert rows[LOCAL_STEP]["dcn_bytes"] == 0 < rows[LOCAL_STEP]["ici_bytes"]
    piece = 4 * gpt.SMALL.parameters / 4
    assert rows["DiLoCo"]["dcn_bytes"] == pytest.approx(piece, rel=0.01)
    assert rows["DiLoCo"]["inner_bytes"] == 0
    # The gradients are in bfloat16, both of the tied embedding.
    assert rows[DATA_PARALLEL]["dcn_bytes"] == pytest.approx(piece / 2, rel=0.1)
    assert (tmp_path / "pods.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["pods", "sharded_rules"])
def test_missing_compiler_is_reported_in_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setattr(compile_targets, "is_compiler_installed", lambda family: False)
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, name, "--out", tmp_path)
    assert str(stopped.value) == (
        f"{name}: the compiler for TPUs is not installed: "
        'pip install "localsgd-jax[audit-tpu]"'
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "limits", "failure"),
    [
        ("os:abort", LIMITS, "the compiler aborts (SIGABRT)"),
        ("signal:pause", LIMITS._replace(seconds=0), "no program within 0 s"),
        (
            "signal:pause",
            LIMITS._replace(gigabytes=1e-6),
            "no program within 1e-06 GB of the host",
        ),
        ("os:getpid", LIMITS, "TypeError: cannot unpack non-iterable int object"),
        ("no_such_module:f", LIMITS, "ModuleNotFoundError: No module named"),
    ],
)
def test_failure_of_the_compiler_is_a_result(function, limits, failure):
    compiled = compilation.compile_in_process(function, {}, limits)
    assert compiled.failure.startswith(failure) and compiled.text == ""


@pytest.mark.parametrize(
    "text",
    [
        "E1000: CompileTimeHbmOom: the total memory required for HLO temporaries "
        "(174.06G) exceeds available HBM (95.73G).",
        "RESOURCE_EXHAUSTED: Used 174.06G of 95.73G hbm. Exceeded hbm capacity.",
    ],
)
def test_exhausted_device_memory_is_described(text):
    described = compilation.describe_error(RuntimeError(text))
    assert described == "out of memory: needs 174.06G of 95.73G per device"


def program_row(program, bits, **sizes):
    """Returns a row of a program that sends so many bits per parameter."""
    row = {"target": "t", "slices": 4, "chips": 64, "program": program, "failure": ""}
    row |= {"argument_bytes": 3e9, "temp_bytes": 1e9, "compile_cpu_s": 2.0}
    piece = bits / 8 * gpt.LARGE.parameters / 16
    return row | {"ici_bytes": 1e6, "dcn_bytes": 1.5 * piece} | sizes


def test_predictions_are_those_of_the_cost_model():
    rows = [
        program_row(DATA_PARALLEL, 16, temp_bytes=5e9),
        program_row(LOCAL_STEP, 0, temp_bytes=4e9),
        program_row("Local SGD", 32),
        program_row("streaming DiLoCo", 32, argument_bytes=4e9),
    ]
    parallel, local, streaming = prediction.method_rows(rows, gpt.LARGE)
    step = prediction.step_seconds(gpt.LARGE)
    # Four hosts of 25 Gbit/s per slice.
    link = cost_model.Link(prediction.LATENCY_SECONDS, 4 * 25e9 / 8)
    workload = cost_model.Workload(4, step, gpt.LARGE.parameters)
    expected = cost_model.round_time(workload, link, 100) / 100
    assert local["predicted"]["25"]["step_s"] == pytest.approx(expected)
    baseline = cost_model.round_time(workload._replace(bits=16), link, 1)
    assert parallel["predicted"]["25"] == {
        "step_s": pytest.approx(baseline),
        "speedup": 1,
    }
    assert local["predicted"]["25"]["speedup"] == pytest.approx(baseline / expected)
    assert streaming["predicted"]["25"]["step_s"] < expected
    assert local["peak_bytes"] == 7e9 and streaming["state_bytes"] == 4e9
    assert local["ici_bytes"] == 1e6 + 1e6 / 100
    assert local["dcn_bytes"] == rows[2]["dcn_bytes"] / 100
    assert local["compile_cpu_s"] == [2, 2] and parallel["compile_cpu_s"] == [2]


def test_method_without_a_program_has_its_failure():
    rows = [program_row(LOCAL_STEP, 0), program_row("DiLoCo", 32)]
    rows[1] |= {"failure": "no program within 9 s", "argument_bytes": None}
    (row,) = prediction.method_rows(rows, gpt.LARGE)
    assert row["failure"] == "no program within 9 s" and "predicted" not in row
    assert "no program within 9 s" in command.memory_table([row])


def rule_row(**columns):
    row = {"mesh": "2-slices", "rule": "average()", "size": "large", "weighted": False}
    row |= {"least_bytes": 2**30, "argument_bytes": 2**30, "temp_bytes": 2**29}
    row |= {"inner_bytes": 0, "dcn_bytes": 2**28, "worker_bytes": 2**28}
    return row | {"compile_cpu_s": 1.0, "failure": ""} | columns


def test_page_has_the_values_before_and_after(tmp_path):
    page, blocks = (
        tmp_path / "page.md",
        ["two slices", "weighted", "versions", "other meshes"],
    )
    text = "".join(f"<!-- begin {b} -->\nold\n<!-- end {b} -->\n" for b in blocks)
    page.write_text("Text.\n" + text)
    before = rule_row(failure="no program within 9 s")
    path = tmp_path / "sharded_rules.json"
    results.update(path.with_stem("sharded_rules_before"), before, KEYS, "command a")
    results.update(path, rule_row(), KEYS, "command b")
    results.update(path, rule_row(mesh="1-slice", inner_bytes=24), KEYS, "command c")
    results.update(path, rule_row(weighted=True, inner_bytes=8), KEYS, "command c")
    sharded_rules.write_page(tmp_path, page)
    text = page.read_text()
    assert "| `average()` | 1 | no program within 9 s → 1 | – → 0.5 |" in text
    assert "| `average()` | 1 + 0.5; 24 B; 0.25 |" in text
    assert "| `average()` | 1 | 1 | 0.5 | 8 B | 0.25 | 1.0 s |" in text
    assert "`command b`, `command c`: Python 3" in text
    assert "old" not in text and text.startswith("Text.\n<!-- begin two slices -->\n|")


def test_method_with_unknown_traffic_is_a_failure():
    rows = [program_row(LOCAL_STEP, 0), program_row("DiLoCo", 32, dcn_bytes=None)]
    (row,) = prediction.method_rows(rows, gpt.LARGE)
    assert row["failure"] == "traffic not understood"


def test_page_without_a_block_raises(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n")
    with pytest.raises(ValueError, match="there must be a block 'x'"):
        results.fill_page(page, {"x": ""})


def test_rows_measured_again_replace_earlier_ones(tmp_path):
    path = tmp_path / "rows.json"
    for rule, seconds, command_of_row in [("a", 1, "x"), ("b", 2, "x"), ("a", 3, "y")]:
        row = {"rule": rule, "s": seconds}
        results.update(path, row, ["rule"], command_of_row)
    content = results.read(path)
    assert content["rows"] == [{"rule": "a", "s": 3}, {"rule": "b", "s": 2}]
    assert content["commands"] == ["x", "y"] and content["machine"]["jax"]
    assert results.keys_of(path, ["rule"]) == {("a",), ("b",)}


@pytest.mark.parametrize(
    ("count", "text"), [(None, "–"), (0, "0"), (24.0, "24 B"), (2**30, "1")]
)
def test_format_bytes(count, text):
    assert results.format_bytes(count) == text


def test_number_of_parameters_and_workers():
    assert gpt.LARGE.parameters == pytest.approx(1.3e9, rel=0.05)
    described = topology.Topology("tpu:v5e:4x4", 2, {"worker": 2, "fsdp": 16}, lanes=2)
    assert (described.num_workers, described.devices_per_worker) == (4, 16)
    assert set(METHODS) >= {"Local SGD", "DiLoCo"}
