"""Training in real processes: equal results, and errors that name the difference."""

import collections
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from harness.paths import PROGRAMS, ROOT
from programs import multi_process_scenarios as scenarios

LAUNCH = [sys.executable, "-m", "localsgd_jax", "launch"]
DEFAULT_CASE = "compressed"


def launch(processes, *command, cwd=PROGRAMS, options=()):
    """Runs a command under the launcher."""
    line = [*LAUNCH, "-n", str(processes), *options, "--", sys.executable, *command]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=240)


def run_scenario(processes, *arguments):
    """Runs a scenario that succeeds; returns its output by case."""
    done = launch(processes, "multi_process_scenarios.py", *map(str, arguments))
    assert done.returncode == 0, done.stderr[-3000:]
    return outputs_by_case(done)


def outputs_by_case(done):
    """Returns the JSON lines of each process by case."""
    found = collections.defaultdict(dict)
    for line in done.stdout.splitlines():
        if line[4:5] == "{":
            row = json.loads(line[4:])
            found[row.pop("case")][row.pop("process")] = row
    return found


def assert_close(actual, expected):
    for name in expected:
        np.testing.assert_allclose(
            actual[name], expected[name], rtol=1e-6, atol=1e-6, err_msg=name
        )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Output of two processes that train the default case."""
    return run_scenario(2, "train", tmp_path_factory.mktemp("run"), 0, DEFAULT_CASE)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Checkpoints and output of four processes."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    return directory, run_scenario(4, "train", directory, 16, DEFAULT_CASE)


@pytest.fixture(scope="module")
def two_resumed(four, tmp_path_factory):
    """Output of two processes that train all cases and resume from a copy."""
    directory = copied(four[0], tmp_path_factory.mktemp("run"))
    return run_scenario(2, "train", directory, 8, *scenarios.cases())


def copied(directory, to):
    return pathlib.Path(shutil.copytree(directory, to / "copy"))


def assert_equal_to_single_process(found, name):
    calls, single = scenarios.trained(name)
    for process, row in found[name].items():
        assert_close(row["history"], single["history"])
        assert_close(row["model"], single["model"])
        assert row["calls"] == (calls if process == 0 else {"evaluate": 0, "record": 0})


def test_two_processes_match_one(two):
    assert len(two[DEFAULT_CASE]) == 2
    assert_equal_to_single_process(two, DEFAULT_CASE)


@pytest.mark.full
@pytest.mark.parametrize("name", scenarios.cases())
def test_every_case_of_two_processes_matches_one(two_resumed, name):
    assert len(two_resumed[name]) == 2
    assert_equal_to_single_process(two_resumed, name)


@pytest.mark.full
def test_four_processes_match_one(four):
    assert len(four[1][DEFAULT_CASE]) == 4
    assert_equal_to_single_process(four[1], DEFAULT_CASE)


def test_programs_are_compiled_once(two):
    """The number of compiled programs does not grow with the rounds."""
    for row in two["compiled"].values():
        assert 0 < row["many"] <= row["few"]


@pytest.mark.full
def test_checkpoint_of_four_processes_is_restored_by_two_and_one(
    four, two_resumed, tmp_path
):
    assert {row["began"] for row in four[1]["resumed"].values()} == {0}
    began, model = scenarios.resumed(copied(four[0], tmp_path), 8)
    resumed = two_resumed["resumed"]
    assert began == 16 and {row["began"] for row in resumed.values()} == {16}
    uninterrupted = scenarios.resumed(tmp_path / "uninterrupted", 24)[1]
    for row in resumed.values():
        assert_close(row["model"], model)
        assert_close(row["model"], uninterrupted)


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """A job in which process 1 differs and then fails, and its output by case."""
    folder = tmp_path_factory.mktemp("barriers")
    done = launch(2, "multi_process_scenarios.py", "fail", str(folder))
    return done, outputs_by_case(done)


@pytest.fixture(scope="module")
def differing(tmp_path_factory):
    """A job with all differences and failures, and its output by case."""
    folder = tmp_path_factory.mktemp("barriers")
    done = launch(2, "multi_process_scenarios.py", "differ", str(folder))
    return done, outputs_by_case(done)


def assert_same_coordination_error(rows, message):
    assert {row["kind"] for row in rows.values()} == {"CoordinationError"}
    assert len(rows) == 2
    assert rows[0]["error"] == rows[1]["error"] and message in rows[0]["error"]


@pytest.mark.full
def test_other_program_raises_in_all_processes(failed):
    assert_same_coordination_error(failed[1]["rate"], "init(params): optimizer: ")


@pytest.mark.full
def test_data_error_reaches_all_processes(failed):
    assert_data_error(failed[1]["unreadable"])


def test_uncaught_error_of_one_process_ends_the_job(failed):
    assert_job_ended(failed[0])


@pytest.mark.full
@pytest.mark.parametrize(
    "case, message",
    [
        ("version", 'initialize(): version.jax: "'),
        ("version", '"9.9" in process 1'),
        ("config", "initialize(): config.period: 4 in process 0, 8 in process 1"),
        ("shapes", "init(params): params.['in']: "),
        ("shapes", '"float32[5, 4] with checksum'),
        ("values", "init(params): params.['in']: "),
        ("rule", 'init(params): rule.params: "average()" in process 0, "diloco('),
        ("schedule", 'schedule: "every(4)" in process 0, "every(8)" in process 1'),
        ("rounds", 'schedule: "[2, 4, 6, '),
        ("rate", "init(params): optimizer: "),
        (
            "batch",
            'train(batches): [0]: "float32[K, 4, 5]" in process 0, "float32[K, 2',
        ),
        ("nothing", 'train(): batch.[0]: "float32[4, 4, 5]" in process 0, nothing in'),
        (
            "smaller",
            'train(batches): [0]: "float32[K, 4, 5]" in process 0, "float32[K, 2',
        ),
    ],
)
def test_difference_is_named_in_all_processes(differing, case, message):
    assert_same_coordination_error(differing[1][case], message)


@pytest.mark.full
def test_late_and_absent_processes_are_named(differing):
    late, absent = differing[1]["late"], differing[1]["absent"]
    assert late[0]["error"] == (
        "initialize(): process 1 of 2 did not reach the rendezvous within 1 s (timeout)"
    )
    message = "process 1 could not connect to process 0 at 127.0.0.1:"
    assert message in late[1]["error"]
    assert absent[0]["error"] == (
        "init(params): process 1 did not reach the barrier within 2 s (timeout)"
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "name, count",
    [("shorter", 21), ("whole", 24), ("first", 5)],
    ids=["in a round", "after a dispatch", "in the first dispatch"],
)
def test_training_ends_with_the_shortest_data(differing, name, count):
    single = scenarios.train_on(scenarios.batches(count))
    saved = [step for step, _ in single["saves"]]
    assert saved == [*range(3, count, 3), count]
    for row in differing[1][name].values():
        assert_close(row["history"], single["history"])
        assert_close(row["model"], single["model"])
        assert row["saves"] == single["saves"]


def assert_data_error(rows):
    assert rows[1] == {"kind": "OSError", "error": "the disk is gone"}
    assert rows[0] == {
        "kind": "CoordinationError",
        "error": "train(batches): process 1 raised OSError: the disk is gone",
    }


@pytest.mark.full
def test_data_error_is_propagated(differing):
    assert_data_error(differing[1]["unreadable"])


@pytest.mark.full
def test_data_timeout(differing):
    rows = differing[1]["stuck"]
    assert rows[0]["error"] == (
        "train(batches): process 1 did not reach the barrier within 2 s (timeout)"
    )
    assert rows[1]["kind"] == "CoordinationError"


@pytest.mark.full
def test_another_job_on_the_port_is_rejected(differing):
    for process in (0, 1):
        server = differing[1]["foreign 0"][process]["error"]
        peer = differing[1]["foreign 1"][process]["error"]
        assert "process 0 cannot listen on 127.0.0.1:" in server
        assert "for process 1: the job started without it" in peer


@pytest.mark.full
def test_training_errors_raise_in_all_processes(differing):
    evaluate = differing[1]["evaluate"]
    assert evaluate[0] == {"kind": "OSError", "error": "no space left"}
    assert evaluate[1]["error"] == (
        "train(evaluate): process 0 raised OSError: no space left"
    )
    kinds = {row["kind"] for row in differing[1]["diverges"].values()}
    assert kinds == {"NonFiniteLossError"} and len(differing[1]["diverges"]) == 2
    assert [differing[1]["alike"][i]["error"] for i in (0, 1)] == [None, None]


def assert_job_ended(done):
    assert done.returncode == 1
    assert "[1] ValueError: process 1 fails" in done.stderr
    assert "process 1 exited with 1; terminating the others" in done.stderr


@pytest.mark.full
def test_failed_process_ends_the_job(differing):
    assert_job_ended(differing[0])


def lines_of_process_0(done, pattern):
    """Returns lines of an example that match and that only process 0 may print.

    Gloo prints from several threads at once, which mixes its lines.
    """
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.split("\n") if re.search(pattern, line)]
    assert all(line.startswith("[0] ") for line in lines)
    return [line[4:] for line in lines]


@pytest.mark.full
def test_mnist_example(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=640).astype(np.uint8)
    images = rng.integers(100, size=(640, 28, 28)).astype(np.uint8)
    images[:, 5:9] += 150 * labels[:, None, None]
    np.savez(
        tmp_path / "mnist.npz",
        x_train=images,
        y_train=labels,
        x_test=images,
        y_test=labels,
    )
    monkeypatch.setenv("LOCALSGD_DATA", str(tmp_path))
    options = "--workers 4 --periods 2 --epochs 4 --figure curve.png".split()
    path = ROOT / "examples" / "mnist.py"
    done = launch(2, str(path), *options, cwd=tmp_path)
    (row,) = map(str.split, lines_of_process_0(done, r" 4 +2 +10 "))
    assert row[1:4] == ["4", "2", "10"] and float(row[5]) > 0.95
    assert (tmp_path / "curve.png").stat().st_size


@pytest.mark.full
def test_sharded_workers_example(tmp_path):
    (tmp_path / "data.txt").write_text("The quick brown fox. " * 400)
    options = "--data data.txt --steps 4 --period 2".split()
    path = ROOT / "examples" / "sharded_workers.py"
    devices = ["--devices-per-process", "4"]
    done = launch(2, str(path), *options, cwd=tmp_path, options=devices)
    sharded, unsharded, difference = lines_of_process_0(done, "4 workers of|losses")
    assert sharded.startswith("4 workers of 2: 0.57")
    assert "workers of 1: 1.00" in unsharded
    assert float(difference.split()[-1]) < 1e-4


@pytest.mark.full
def test_text_example(tmp_path):
    (tmp_path / "data.txt").write_text("abcdefgh" * 500)
    options = "--data data.txt --context 8 --periods 4 --steps 8 --workers 2 --depth 1"
    path = ROOT / "examples" / "text.py"
    done = launch(2, str(path), *options.split(), cwd=tmp_path)
    assert len(lines_of_process_0(done, r"every\(4\)")) == 1
    assert (tmp_path / "text.png").stat().st_size


@pytest.mark.full
def test_command_train(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        f"{sign} " + " ".join(f"{j}:{x:.3f}" for j, x in enumerate(row + sign, 1))
        for sign, row in zip([1, -1] * 20, rng.normal(size=(40, 3)), strict=True)
    ]
    (tmp_path / "data.svm").write_text("\n".join(rows) + "\n")
    options = ["train", "--data", "data.svm", "--workers", "4", "--steps", "24"]
    module = ["-m", "localsgd_jax", *options]
    done = launch(2, *module, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4 workers on 2 cpu devices") == 1
    line = [sys.executable, *module, "--out", "one"]
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    histories = [
        [
            json.loads(row)
            for row in (tmp_path / name / "history.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    ]
    assert len(histories[0]) == len(histories[1]) > 2
    for one, two in zip(*histories, strict=True):
        for row in (one, two):  # A device has more workers where there are fewer.
            row.pop("seconds"), row.pop("device_bytes", None)
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6, nan_ok=True)
