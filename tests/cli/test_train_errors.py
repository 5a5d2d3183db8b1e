"""Invalid input of `localsgd train`: one line, and no file is written."""

import pathlib

import pytest
from harness.command_line import error_of, invoke
from harness.selection import in_full, keep

from localsgd_jax.experiments import datasets, run_directory

RATE = "'--learning-rate': must be positive and finite, got"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--period 0", "'--period': 0 is not in the range x>=1."),
        in_full("--workers 0", "'--workers': 0 is not in the range x>=1."),
        in_full("--batch 0", "'--batch': 0 is not in the range x>=1."),
        in_full("--steps -5", "'--steps': -5 is not in the range x>=1."),
        in_full("--seed -1", "'--seed': -1 is not in the range x>=0."),
        in_full("--devices 0", "'--devices': 0 is not in the range x>=1."),
        in_full("--learning-rate 0", f"{RATE} 0"),
        ("--learning-rate nan", f"{RATE} nan"),
        in_full("--learning-rate inf", f"{RATE} inf"),
        in_full("--learning-rate 1e39", f"{RATE} 1e+39"),
    ],
)
def test_numbers_out_of_range_raise(data, options, message):
    line = f"train --data {data} {options}"
    assert error_of(line, code=2) == f"Invalid value for {message}"


FORM = "--schedule must have the form"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            "--workers 8 --devices 3",
            "--workers must be a multiple of the 3 devices, got 8",
        ),
        in_full(
            "--workers 64 --devices 64 --batch 1",
            "--devices must be at most 8, the number of cpu devices, got 64",
        ),
        (
            "--workers 8 --batch 11",
            "--batch must fit into a worker's shard of 80 // 8 = 10 examples, got 11",
        ),
        in_full(
            "--workers 81 --batch 1",
            "--workers must be at most the 80 examples, got 81",
        ),
        ("--out .", "--out: . exists already"),
        in_full("--out toy.txt", "--out: toy.txt exists already"),
        in_full("--out toy.txt/run", "toy.txt/run: Not a directory"),
        in_full(
            "--schedule sometimes",
            "--schedule must be one of every, never, post-local:SWITCH, geometric, "
            "qsr:ALPHA, at-steps:STEP,STEP,..., got 'sometimes'",
        ),
        ("--schedule every:4", f"{FORM} every, got 'every:4'"),
        in_full("--schedule never:", f"{FORM} never, got 'never:'"),
        in_full("--schedule post-local", f"{FORM} post-local:SWITCH, got 'post-local'"),
        in_full(
            "--schedule post-local:x",
            "--schedule post-local:x: invalid literal for int() with base 10: 'x'",
        ),
        in_full(
            "--schedule post-local:-1",
            "--schedule post-local:-1: post_local(switch): switch must be at least 0, "
            "got -1",
        ),
        in_full(
            "--schedule at-steps:", f"{FORM} at-steps:STEP,STEP,..., got 'at-steps:'"
        ),
        in_full(
            "--schedule at-steps:3,0",
            "--schedule at-steps:3,0: at_steps(steps): each step must be at least 1, "
            "got 0",
        ),
        in_full(
            "--schedule at-steps:3,,4",
            "--schedule at-steps:3,,4: invalid literal for int() with base 10: ''",
        ),
        in_full(
            "--schedule qsr:0",
            "--schedule qsr:0: qsr(alpha): alpha must be positive, got 0.0",
        ),
        in_full(
            "--schedule qsr:nan",
            "--schedule qsr:nan: ALPHA must be finite, got nan",
        ),
        (
            "--schedule never --period 4",
            "--period: --schedule never has no period, got 4",
        ),
        in_full(
            "--schedule at-steps:3 --period 4",
            "--period: --schedule at-steps has no period, got 4",
        ),
    ],
)
def test_invalid_options_print_one_line(data, options, message):
    assert error_of(f"train --data {data} {options}") == message


def test_existing_directory_raises_before_the_data_is_loaded(workdir):
    (workdir / "run").mkdir()
    assert error_of("train --data none --out run") == "--out: run exists already"


def test_directory_created_by_another_process_is_not_overwritten(workdir):
    (workdir / "run").mkdir()
    with pytest.raises(FileExistsError):
        run_directory.create(workdir / "run", {})
    assert list((workdir / "run").iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("1 1:1\n2 1:oops\n", "bad.txt, line 2: not in LIBSVM format, could not"),
        in_full(
            "1 1:1\n2 1:nan\n", "bad.txt, line 2: a value is not finite in float32"
        ),
        in_full("", "bad.txt: the file has no examples"),
        ("1 1:1\n1 1:2\n", "bad.txt: the labels must be of two classes, got 1: 1"),
        in_full(
            "1 1:1\n2 1:2\n5 1:2\n", "bad.txt: the labels must be of two classes, got 3"
        ),
    ],
)
def test_invalid_file_prints_one_line(content, message):
    pathlib.Path("bad.txt").write_text(content)
    assert error_of("train --data bad.txt").startswith(message)


def test_missing_data_prints_one_line(workdir):
    message = "no file 'w9a' and no registered dataset of that name"
    assert error_of("train --data w9a").startswith(message)
    assert error_of(f"train --data {workdir}") == f"{workdir}: Is a directory"


def test_failed_download_prints_one_line(monkeypatch, workdir):
    monkeypatch.setattr(datasets, "BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(datasets.pooch, "os_cache", lambda name: workdir / "cache")
    monkeypatch.delenv("LOCALSGD_DATA", raising=False)
    result = invoke("train --data w8a")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: http://127.0.0.1:9/w8a cannot be downloaded")
    assert f"put it at {workdir / 'cache' / 'w8a'}" in line


@pytest.mark.parametrize(
    "line",
    keep(
        [
            "nothing",
            "train",
            "train --data x --period x",
            "train --data x --optimizer lion",
            "train --data x --colour red",
            "quickstart toy.txt",
        ],
        ["train"],
    ),
)
def test_usage_errors_exit_with_two(line):
    error_of(line, code=2)
