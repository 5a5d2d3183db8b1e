"""Real processes: one, two and four give one result, and who differs is named."""

import collections
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import one_job
import pytest

HERE = pathlib.Path(__file__).parent
LAUNCH = [sys.executable, "-m", "localsgd_jax", "launch"]


def launch(processes, *command, cwd=HERE, options=()):
    """Runs a command under the launcher."""
    line = [*LAUNCH, "-n", str(processes), *options, "--", sys.executable, *command]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=240)


def said(ended):
    """What each process has printed, by case."""
    found = collections.defaultdict(dict)
    for line in ended.stdout.splitlines():
        if line[4:5] == "{":
            row = json.loads(line[4:])
            found[row.pop("case")][row.pop("process")] = row
    return found


def close(one, other):
    for name in one:
        np.testing.assert_allclose(
            one[name], other[name], rtol=1e-6, atol=1e-6, err_msg=name
        )


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four processes train and leave a checkpoint."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    ended = launch(4, "one_job.py", "train", str(directory), "16", "compressed")
    assert ended.returncode == 0, ended.stderr[-3000:]
    return directory, said(ended)


@pytest.fixture(scope="module")
def two(four, tmp_path_factory):
    """Two processes train, and go on from a copy of that checkpoint."""
    directory = copied(four[0], tmp_path_factory.mktemp("run"))
    ended = launch(2, "one_job.py", "train", str(directory), "8", *one_job.cases())
    assert ended.returncode == 0, ended.stderr[-3000:]
    return said(ended)


def copied(directory, to):
    import shutil

    return pathlib.Path(shutil.copytree(directory, to / "copy"))


def agree(found, name):
    """Checks a case against one process."""
    calls, alone = one_job.trained(name)
    for process, row in found[name].items():
        close(alone["history"], row["history"])
        close(alone["model"], row["model"])
        assert row["calls"] == (calls if process == 0 else {"evaluate": 0, "record": 0})


@pytest.mark.parametrize("name", one_job.cases())
def test_two_processes_give_the_result_of_one(two, name):
    assert len(two[name]) == 2
    agree(two, name)


def test_four_processes_give_the_result_of_one(four):
    assert len(four[1]["compressed"]) == 4
    agree(four[1], "compressed")


def test_programs_are_compiled_once_however_many_rounds_there_are(two):
    for row in two["compiled"].values():
        assert 0 < row["many"] <= row["few"]


def test_a_checkpoint_of_four_processes_is_read_by_two_and_by_one(four, two, tmp_path):
    assert {row["began"] for row in four[1]["resumed"].values()} == {0}
    began, model = one_job.resumed(copied(four[0], tmp_path), 8)
    assert began == 16 and {row["began"] for row in two["resumed"].values()} == {16}
    whole = one_job.resumed(tmp_path / "whole", 24)[1]
    for row in two["resumed"].values():
        close(model, row["model"])
        close(whole, row["model"])


@pytest.fixture(scope="module")
def differing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meet")
    ended = launch(2, "one_job.py", "differ", str(folder))
    return ended, said(ended)


@pytest.mark.parametrize(
    "case, named",
    [
        ("version", 'initialize(): version.jax: "'),
        ("version", '"9.9" in process 1'),
        ("config", "initialize(): config.period: 4 in process 0, 8 in process 1"),
        ("shapes", "init(params): params.['in']: "),
        ("shapes", '"float32[5, 4] with checksum'),
        ("values", "init(params): params.['in']: "),
        ("rule", "init(params): rule: "),
        ("schedule", 'every: "every(4)" in process 0, "every(8)" in process 1'),
        ("beats", 'every: "[2, 4, 6, '),
        ("rate", "train(): program.local step: "),
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
def test_both_processes_name_the_difference(differing, case, named):
    rows = differing[1][case]
    assert {row["kind"] for row in rows.values()} == {"JobError"} and len(rows) == 2
    assert rows[0]["error"] == rows[1]["error"] and named in rows[0]["error"]


def test_late_processes_are_named(differing):
    late, absent = differing[1]["late"], differing[1]["absent"]
    assert late[0]["error"] == "initialize(): process 1 of 2 did not come within 1 s"
    assert "process 1 found no process 0 at 127.0.0.1:" in late[1]["error"]
    assert absent[0]["error"] == "init(params): process 1 did not come within 2 s"


@pytest.mark.parametrize("name, count", [("shorter", 21), ("whole", 24), ("first", 5)])
def test_all_end_with_the_shortest_data(differing, name, count):
    """In the middle of a round, at the end of a dispatch, in the first one."""
    alone = one_job.fed(one_job.ending(count))
    saved = [step for step, _ in alone["saves"]]
    assert saved == [*range(3, count, 3), count]
    for row in differing[1][name].values():
        close(alone["history"], row["history"])
        close(alone["model"], row["model"])
        assert row["saves"] == alone["saves"]


def test_who_cannot_read_its_data_says_so(differing):
    rows = differing[1]["unreadable"]
    assert rows[1] == {"kind": "OSError", "error": "the disk is gone"}
    assert rows[0] == {
        "kind": "JobError",
        "error": "train(batches): process 1 has failed: OSError: the disk is gone",
    }


def test_nobody_waits_for_data_for_ever(differing):
    rows = differing[1]["stuck"]
    assert rows[0]["error"] == "train(batches): process 1 did not come within 2 s"
    assert rows[1]["kind"] == "JobError"


def test_another_job_on_the_port_is_sent_away(differing):
    for process in (0, 1):
        first = differing[1]["foreign 0"][process]["error"]
        second = differing[1]["foreign 1"][process]["error"]
        assert "process 0 cannot listen on 127.0.0.1:" in first
        assert "belongs to a job that has begun without this process" in second


def test_failures_in_training_are_everybodys(differing):
    evaluate = differing[1]["evaluate"]
    assert evaluate[0] == {"kind": "OSError", "error": "no space left"}
    assert evaluate[1]["error"] == (
        "train(evaluate): process 0 has failed: OSError: no space left"
    )
    kinds = {row["kind"] for row in differing[1]["diverges"].values()}
    assert kinds == {"NonFiniteLossError"} and len(differing[1]["diverges"]) == 2
    assert [differing[1]["alike"][i]["error"] for i in (0, 1)] == [None, None]


def test_a_process_that_fails_ends_the_job(differing):
    ended = differing[0]
    assert ended.returncode == 1
    assert "[1] ValueError: process 1 fails for good" in ended.stderr
    assert "process 1 ended with 1; ending the others" in ended.stderr


def lines_of_one(ended, pattern):
    """What an example has printed that looks so, which only process 0 may do.

    Gloo prints, too, from several threads at once, which tears its lines.
    """
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [line for line in ended.stdout.split("\n") if re.search(pattern, line)]
    assert all(line.startswith("[0] ") for line in lines)
    return [line[4:] for line in lines]


def test_the_mnist_example(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    digits = rng.integers(2, size=640).astype(np.uint8)
    pixels = rng.integers(100, size=(640, 28, 28)).astype(np.uint8)
    pixels[:, 5:9] += 150 * digits[:, None, None]
    names = {"x_train": pixels, "y_train": digits, "x_test": pixels, "y_test": digits}
    np.savez(tmp_path / "mnist.npz", **names)
    monkeypatch.setenv("LOCALSGD_DATA", str(tmp_path))
    options = "--workers 4 --periods 2 --epochs 4 --figure curve.png".split()
    path = HERE.parent / "examples" / "mnist.py"
    ended = launch(2, str(path), *options, cwd=tmp_path)
    (row,) = map(str.split, lines_of_one(ended, r" 4 +2 +10 "))
    assert row[1:4] == ["4", "2", "10"] and float(row[5]) > 0.95
    assert (tmp_path / "curve.png").stat().st_size


def test_the_sharded_example(tmp_path):
    (tmp_path / "data.txt").write_text("The quick brown fox. " * 400)
    options = "--data data.txt --steps 4 --period 2".split()
    path = HERE.parent / "examples" / "sharded.py"
    devices = ["--devices-per-process", "4"]
    ended = launch(2, str(path), *options, cwd=tmp_path, options=devices)
    half, whole, apart = lines_of_one(ended, "4 workers of|losses")
    assert half.startswith("4 workers of 2: 0.57") and "workers of 1: 1.00" in whole
    assert float(apart.split()[-1]) < 1e-4


def test_the_text_example(tmp_path):
    (tmp_path / "data.txt").write_text("abcdefgh" * 500)
    options = "--data data.txt --context 8 --periods 4 --steps 8 --workers 2 --depth 1"
    path = HERE.parent / "examples" / "text.py"
    ended = launch(2, str(path), *options.split(), cwd=tmp_path)
    assert len(lines_of_one(ended, r"every\(4\)")) == 1
    assert (tmp_path / "text.png").stat().st_size


def test_the_command_train(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        f"{sign} " + " ".join(f"{j}:{x:.3f}" for j, x in enumerate(row + sign, 1))
        for sign, row in zip([1, -1] * 20, rng.normal(size=(40, 3)), strict=True)
    ]
    (tmp_path / "data.svm").write_text("\n".join(rows) + "\n")
    options = ["train", "--data", "data.svm", "--workers", "4", "--steps", "24"]
    module = ["-m", "localsgd_jax", *options]
    ended = launch(2, *module, "--out", "two", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("4 workers on 2 cpu devices") == 1
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
