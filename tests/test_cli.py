"""The command line: what it prints, writes and refuses."""

import contextlib
import json
import os
import pathlib
import pty
import subprocess
import sys
import termios
import threading
import types

import jax
import numpy as np
import optax
import pytest
from click.testing import CliRunner

import localsgd_jax as lsgd
from localsgd_jax.cli import cli
from localsgd_jax.experiments import choices, datasets, devices, logistic, run_directory

ROOT = pathlib.Path(lsgd.__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
QUICK = "--workers 8 --steps 40 --period 4"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A working directory; JAX has started, so that no command sets its devices."""
    jax.devices()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(home):
    """80 examples of three features with labels 3 and 7."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 3))
    labels = np.where(features @ [1, -2, 0.5] + rng.normal(size=80) > 0, 7, 3)
    lines = [
        f"{label} " + " ".join(f"{i + 1}:{x:.6f}" for i, x in enumerate(row))
        for label, row in zip(labels, features, strict=True)
    ]
    (home / "toy.txt").write_text("\n".join(lines))
    return "toy.txt"


def call(line):
    return CliRunner().invoke(cli, line.split())


def train(data, options="", out="run"):
    result = call(f"train --data {data} --out {out} {QUICK} {options}")
    assert result.exit_code == 0, result.output
    return read(out)


def read(out):
    out = pathlib.Path(out)
    lines = (out / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return json.loads((out / "config.json").read_text()), rows


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        **options,
    )


def refused(line, code=1):
    """The one line of a refusal; nothing may be written."""
    before = sorted(pathlib.Path().rglob("*"))
    result = call(line)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert sorted(pathlib.Path().rglob("*")) == before
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert code == 2 or len(lines) == 1
    return lines[-1].removeprefix("Error: ")


# -- train -------------------------------------------------------------------------


def test_a_run_leaves_config_history_parameters_and_picture(data):
    config, rows = train(data)
    assert sorted(p.name for p in pathlib.Path("run").iterdir()) == [
        "config.json",
        "figure.png",
        "history.jsonl",
        "params.npz",
    ]
    assert pathlib.Path("run/figure.png").read_bytes().startswith(PNG)
    assert [row["step"] for row in rows] == list(range(0, 41, 4))
    assert [row["round"] for row in rows] == list(range(11))
    assert [row["gradients"] for row in rows] == list(range(0, 41 * 32, 4 * 32))
    # An all-reduce of three float32 among eight: 2 · 7/8 · 12 bytes.
    assert [row["bytes"] for row in rows] == list(range(0, 211, 21))
    assert all(row["loss"] > 0 for row in rows[1:])
    assert config["synchronises"] == "every(4)"
    assert config["devices"] == 8 and config["platform"] == "cpu"
    assert config["versions"]["jax"] == jax.__version__


def test_the_suboptimality_is_that_of_the_saved_parameters(data):
    config, rows = train(data)
    dataset = datasets.load(data)
    x = np.load("run/params.npz")["x"]
    gap = logistic.value(dataset, x) - logistic.minimum(dataset)
    assert rows[-1]["suboptimality"] == pytest.approx(gap, rel=1e-9)
    assert rows[0]["suboptimality"] == pytest.approx(np.log(2) - config["f_star"])
    assert 0 < gap < rows[0]["suboptimality"] / 4


def test_a_run_is_plain_local_sgd(data):
    config, _ = train(data, "--learning-rate 0.5 --seed 3")
    dataset = datasets.load(data)
    examples = dataset.features.toarray(), dataset.labels
    batches = lsgd.deal(examples, 8, 4, seed=3)
    x = np.zeros((8, 3))
    for t in range(40):
        a, y = next(batches)
        slope = -y / (1 + np.exp(y * np.einsum("kbd,kd->kb", a, x)))
        gradient = np.einsum("kb,kbd->kd", slope, a) / 4 + x / 80
        x = x - 0.5 * (1 - t / 40) * gradient
        if (t + 1) % 4 == 0:
            x = np.broadcast_to(x.mean(axis=0), x.shape)
    np.testing.assert_allclose(np.load("run/params.npz")["x"], x[0], rtol=1e-4)
    assert config["learning_rate"] == 0.5


def test_a_run_is_repeated_from_its_config(data):
    config, rows = train(data, "--schedule post-local:10 --seed 5")
    names = ["data", "workers", "period", "schedule", "batch", "steps", "optimizer"]
    names += ["learning_rate", "seed", "devices"]
    flags = [f"--{name.replace('_', '-')} {config[name]}" for name in names]
    assert call(f"train {' '.join(flags)} --out again").exit_code == 0
    _, again = read("again")
    assert [row["loss"] for row in rows[1:]] == [row["loss"] for row in again[1:]]
    assert rows[-1]["suboptimality"] == again[-1]["suboptimality"]


@pytest.mark.parametrize("optimizer", choices.OPTIMIZERS)
def test_every_optimizer_comes_closer(data, optimizer):
    config, rows = train(data, f"--optimizer {optimizer}")
    assert rows[-1]["suboptimality"] < rows[0]["suboptimality"] / 2
    assert config["optimizer"] == optimizer


def test_seeds_and_optimizers_differ(data):
    lasts = {
        train(data, options, f"run{i}")[1][-1]["suboptimality"]
        for i, options in enumerate(
            ["", "--seed 1", "--optimizer momentum", "--optimizer adam", "--batch 5"]
        )
    }
    assert len(lasts) == 5


@pytest.mark.parametrize(
    "options, ends",
    [
        ("--schedule never", [40]),
        ("--schedule at:3,7,20", [3, 7, 20, 40]),
        ("--schedule post-local:2 --period 16", [1, 2, 18, 34, 40]),
        ("--schedule growing --period 16", [1, 3, 7, 15, 31, 40]),
        ("--schedule quadratic:1 --period 16 --learning-rate 0.5", [16, 32, 40]),
        ("--schedule quadratic:1 --period 2 --learning-rate 0.5", [4, 8, 14, 23, 40]),
        ("", [8, 16, 24, 32, 40]),
    ],
)
def test_schedules_end_rounds_where_they_say(data, options, ends):
    result = call(f"train --data {data} --out run --steps 40 {options}")
    assert result.exit_code == 0, result.output
    assert [row["step"] for row in read("run")[1][1:]] == ends


def test_workers_share_devices(data):
    config, rows = train(data, "--workers 10 --batch 2")
    assert config["devices"] == 5
    assert rows[-1]["bytes"] == 10 * 22  # 2 · 9/10 · 12, rounded up


def test_the_default_directory_has_the_name_of_the_data(data, home):
    result = call(f"train --data {data} {QUICK}")
    assert result.exit_code == 0
    (found,) = home.glob("toy-*")
    assert (found / "params.npz").exists()
    assert f"written: {found.name}" in result.stdout


def test_the_summary_says_what_the_history_says(data):
    result = call(f"train --data {data} --out run {QUICK}")
    config, rows = read("run")
    assert "80 examples, 3 features; 8 workers on 8 cpu devices" in result.stdout
    assert (
        "40 steps and 10 rounds of communication, 0.00021 MB sent by each worker"
        in result.stdout
    )
    gap, minimum = rows[-1]["suboptimality"], config["f_star"]
    assert f"f - f* = {gap:.4g}, f* = {minimum:.15f}" in result.stdout


def test_long_runs_are_looked_at_a_hundred_times(data):
    _, rows = train(data, "--steps 1000 --period 2")
    assert len(rows) == 501
    looks = [row["step"] for row in rows if "suboptimality" in row]
    assert looks == list(range(0, 1001, 10))


def test_a_known_name_is_trained_on():
    if "LOCALSGD_DATA" not in os.environ:
        pytest.skip("LOCALSGD_DATA is not set")
    config, rows = train("a9a")
    assert config["data"] == "a9a" and config["sha256"] == datasets.KNOWN["a9a"]
    assert rows[-1]["suboptimality"] < rows[0]["suboptimality"]


def test_train_in_a_process_of_its_own(data):
    line = f"train --data {data} --workers 6 --devices 3 --steps 20 --json --out run"
    done = process("-m", "localsgd_jax", *line.split(), stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    config, rows = read("run")
    assert printed == {
        "config": {k: v for k, v in config.items() if k != "versions"},
        "final": rows[-1],
    }
    assert config["devices"] == 3 and config["workers"] == 6


@pytest.mark.slow
def test_w8a_comes_close_to_its_minimum():
    if "LOCALSGD_DATA" not in os.environ:
        pytest.skip("LOCALSGD_DATA is not set")
    data = str(pathlib.Path(os.environ["LOCALSGD_DATA"], "w8a"))
    line = f"train --data {data} --workers 16 --period 8 --batch 4 --out run"
    done = process("-m", "localsgd_jax", *line.split())
    assert done.returncode == 0
    config, rows = read("run")
    assert config["f_star"] == pytest.approx(0.126180686510513, abs=1e-14)
    assert rows[-1]["suboptimality"] < 0.005


# -- Not a number ------------------------------------------------------------------


def lonely(workers, row=17, count=80):
    """A seed, and the step and the worker that meet a row inside a round of four."""
    for seed in range(100):
        hands = lsgd.deal(np.arange(count), workers, 1, seed=seed)
        for step, hand in zip(range(1, 11), hands, strict=False):
            if row in hand and step > 4 and step % 4:
                return seed, step, int(np.argmax(hand[:, 0] == row))
    raise AssertionError


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_history():
    # Only row 17 has a slope: the worker that meets it leaps, and λ/2 ‖x‖² overflows.
    lines = [f"{i % 2}" for i in range(80)]
    lines[17] += " 1:1"
    pathlib.Path("bare.txt").write_text("\n".join(lines))
    seed, step, worker = lonely(8)
    result = call(
        f"train --data bare.txt --out run --batch 1 --period 4 --steps 40 "
        f"--learning-rate 1e30 --seed {seed}"
    )
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == (
        f"Error: the loss is not finite at step {step + 1} for the workers [{worker}]; "
        "the history so far is in run\n"
    )
    _, rows = read("run")
    assert [row["step"] for row in rows] == list(range(0, step + 1, 4))
    assert len(rows) > 1


def test_parameters_that_the_last_step_spoils_are_not_saved():
    pathlib.Path("large.txt").write_text("1 1:90\n2 1:99\n" * 40)
    result = call(
        "train --data large.txt --out run --steps 1 --batch 1 --learning-rate 3e38"
    )
    assert result.exit_code == 1
    assert "at step 1 for the workers [0, 1, 2, 3, 4, 5, 6, 7];" in result.stderr
    config, rows = read("run")
    assert rows[-1]["step"] == 1 and rows[-1]["suboptimality"] is None
    assert not pathlib.Path("run/params.npz").exists()


# -- Refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ("--period 0", "--period must be at least 1, got 0"),
        ("--workers 0", "--workers must be at least 1, got 0"),
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--steps -5", "--steps must be at least 1, got -5"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--devices 0", "--devices must be at least 1, got 0"),
        ("--learning-rate 0", "--learning-rate must be positive and finite, got 0"),
        ("--learning-rate nan", "--learning-rate must be positive and finite, got nan"),
        ("--learning-rate inf", "--learning-rate must be positive and finite, got inf"),
        (
            "--learning-rate 1e39",
            "--learning-rate must be positive and finite, got 1e+39",
        ),
        (
            "--workers 8 --devices 3",
            "--workers must be a multiple of the 3 devices, got 8",
        ),
        (
            "--workers 64 --devices 64 --batch 1",
            "--devices must be at most 8, the cpu devices present, got 64",
        ),
        (
            "--workers 8 --batch 11",
            "--batch must fit into a worker's shard of 80 // 8 = 10 examples, got 11",
        ),
        (
            "--workers 81 --batch 1",
            "--workers must be at most the 80 examples, got 81",
        ),
        ("--out .", "--out: . exists already"),
        ("--out toy.txt", "--out: toy.txt exists already"),
        ("--out toy.txt/run", "toy.txt/run: Not a directory"),
        (
            "--schedule sometimes",
            "--schedule: one of every, never, post-local:SWITCH, growing, "
            "quadratic:ALPHA, at:STEP,STEP,..., got 'sometimes'",
        ),
        ("--schedule every:4", "--schedule: it must read every, got 'every:4'"),
        ("--schedule never:", "--schedule: it must read never, got 'never:'"),
        (
            "--schedule post-local",
            "--schedule: it must read post-local:SWITCH, got 'post-local'",
        ),
        (
            "--schedule post-local:x",
            "--schedule post-local:x: invalid literal for int() with base 10: 'x'",
        ),
        (
            "--schedule post-local:-1",
            "--schedule post-local:-1: post_local(switch, h): switch must be at least "
            "0, got -1",
        ),
        ("--schedule at:", "--schedule: it must read at:STEP,STEP,..., got 'at:'"),
        (
            "--schedule at:3,0",
            "--schedule at:3,0: at(steps): each step must be at least 1, got 0",
        ),
        (
            "--schedule at:3,,4",
            "--schedule at:3,,4: invalid literal for int() with base 10: ''",
        ),
        (
            "--schedule quadratic:0",
            "--schedule quadratic:0: quadratic(alpha): alpha must be positive, got 0.0",
        ),
        (
            "--schedule quadratic:nan",
            "--schedule quadratic:nan: ALPHA must be finite, got nan",
        ),
        (
            "--schedule never --period 4",
            "--period: --schedule never has no period, got 4",
        ),
        (
            "--schedule at:3 --period 4",
            "--period: --schedule at has no period, got 4",
        ),
    ],
)
def test_bad_options_get_one_line(data, options, message):
    assert refused(f"train --data {data} {options}") == message


def test_a_directory_that_exists_is_refused_before_the_data_is_touched(home):
    (home / "run").mkdir()
    assert refused("train --data none --out run") == "--out: run exists already"


def test_a_directory_that_appears_meanwhile_is_kept(home):
    (home / "run").mkdir()
    with pytest.raises(FileExistsError):
        run_directory.create(home / "run", {})
    assert list((home / "run").iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("1 1:1\n2 1:oops\n", "bad.txt, line 2: not in LIBSVM format, could not"),
        ("1 1:1\n2 1:nan\n", "bad.txt, line 2: a value is not finite in float32"),
        ("", "bad.txt: there are no examples in it"),
        ("1 1:1\n1 1:2\n", "bad.txt: the labels must be of two classes, got 1: 1"),
        ("1 1:1\n2 1:2\n5 1:2\n", "bad.txt: the labels must be of two classes, got 3"),
    ],
)
def test_bad_files_get_one_line(content, message):
    pathlib.Path("bad.txt").write_text(content)
    assert refused("train --data bad.txt").startswith(message)


def test_data_that_is_not_there_gets_one_line(home):
    assert refused("train --data w9a").startswith("no file 'w9a', and no data set")
    assert refused(f"train --data {home}") == f"{home}: Is a directory"


def test_data_that_cannot_be_downloaded_gets_one_line(monkeypatch, home):
    monkeypatch.setattr(datasets, "SITE", "http://127.0.0.1:9/")
    monkeypatch.setattr(datasets.pooch, "os_cache", lambda name: home / "cache")
    monkeypatch.delenv("LOCALSGD_DATA", raising=False)
    result = call("train --data w8a")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: http://127.0.0.1:9/w8a cannot be downloaded")
    assert f"put it at {home / 'cache' / 'w8a'}" in line


@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "train",
        "train --data x --period x",
        "train --data x --optimizer lion",
        "train --data x --colour red",
        "quickstart toy.txt",
    ],
)
def test_misuse_exits_with_two(line):
    refused(line, code=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--figure no/where.png", "--figure: no directory 'no'"),
        ("--figure .", "--figure: '.' is a directory"),
    ],
)
def test_quickstart_refuses_too(options, message):
    assert refused(f"quickstart {options}") == message


# -- quickstart --------------------------------------------------------------------


def check_runs(result, steps):
    runs = result["runs"]
    assert [run["period"] for run in runs] == [1, 4, 16, 64, None]
    rounds = [steps, *(-(-steps // h) for h in (4, 16, 64)), 1]
    assert [run["rounds"] for run in runs] == rounds
    # An all-reduce of 64 float32 among eight: 2 · 7/8 · 256 = 448 bytes.
    for run in runs:
        assert run["megabytes"] == pytest.approx(448e-6 * run["rounds"])
        assert 0 < run["suboptimality"] < np.log(2)
        assert run["seconds"] > 0
    assert result["gradients"] == steps * 8 * 4
    assert result["workers"] == result["devices"] == 8


def test_quickstart_prints_json_for_machines(home):
    done = process(
        *"-m localsgd_jax quickstart --steps 100 --json".split(), stderr=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check_runs(result, 100)
    assert (home / result["figure"]).read_bytes().startswith(PNG)


def test_quickstart_prints_a_table_for_people(home):
    result = call("quickstart --steps 20 --figure picture.png")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "period" in line)
    for word in ("period", "rounds", "MB sent/worker", "f - f*", "seconds"):
        assert word in lines[start]
    first = [line.split()[0] for line in lines[start + 1 : start + 6]]
    assert first == ["1", "4", "16", "64", "one-shot"]
    rounds = [line.split()[1] for line in lines[start + 1 : start + 6]]
    assert rounds == ["20", "5", "2", "1", "1"]
    assert (home / "picture.png").read_bytes().startswith(PNG)
    assert result.stderr == ""


def chunks(terminal):
    """What a terminal shows until nobody holds its other end."""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 4096):
            yield chunk


def test_a_terminal_sees_a_progress_bar():
    mine, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    shown, reader = [], threading.Thread(target=lambda: shown.extend(chunks(mine)))
    reader.start()
    done = process(*"-m localsgd_jax quickstart --steps 20".split(), stderr=its)
    os.close(its)
    reader.join()
    os.close(mine)
    assert done.returncode == 0
    assert b"100%" in b"".join(shown) and b"100/100" in b"".join(shown)


@pytest.mark.slow
def test_the_whole_quickstart_shows_the_price_of_silence():
    done = process(*"-m localsgd_jax quickstart --json".split())
    result = json.loads(done.stdout)
    check_runs(result, 2048)
    gaps = [run["suboptimality"] for run in result["runs"]]
    assert gaps == sorted(gaps)
    assert gaps[0] < 1e-3 and gaps[-1] > 1e-2


# -- Words and start ---------------------------------------------------------------


def test_default_learning_rates():
    assert choices.peak_learning_rate("sgd", 3.0) == 2.0
    assert choices.peak_learning_rate("momentum", 3.0) == pytest.approx(0.2)
    assert choices.peak_learning_rate("adam", 3.0) == 0.05


def test_the_learning_rate_falls_to_zero():
    rate = choices.decay(2.0, 8)
    np.testing.assert_allclose([rate(t) for t in (0, 2, 8, 9)], [2, 1.5, 0, 0])


@pytest.mark.parametrize("name", choices.OPTIMIZERS)
def test_optimizers_are_those_of_optax(name):
    expected = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(0.1),
        "adamw": optax.adamw(0.1),
    }[name]
    x = np.array([1.0, 2.0], np.float32)
    given = choices.OPTIMIZERS[name](0.1)
    states = [given.init(x), expected.init(x)]
    for _ in range(2):
        (a, states[0]), (b, states[1]) = (
            optimizer.update(x, state, x)
            for optimizer, state in zip((given, expected), states, strict=True)
        )
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "workers, asked, got", [(8, None, 8), (6, None, 6), (9, None, 3), (8, 2, 2)]
)
def test_devices_divide_the_workers(workers, asked, got):
    mesh = devices.worker_mesh(workers, asked)
    assert mesh.axis_names == ("worker",) and mesh.size == got


@pytest.mark.parametrize(
    "workers, asked, got", [(8, None, 4), (6, None, 3), (16, None, 4), (2, 2, 2)]
)
def test_accelerators_are_taken_if_there_are_any(monkeypatch, workers, asked, got):
    present = [types.SimpleNamespace(id=i, platform="gpu") for i in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: present)
    monkeypatch.setattr(devices, "Mesh", lambda chosen, names: list(chosen))
    assert devices.worker_mesh(workers, asked) == present[:got]


def test_help_and_version():
    assert "quickstart" in call("--help").stdout
    assert "--learning-rate" in call("train --help").stdout
    assert call("--version").stdout.startswith("localsgd, version")


@pytest.mark.parametrize("missing", ["click", "sklearn.datasets", "matplotlib"])
def test_without_the_extra_one_line_says_so(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "sys.argv[1:] = ['quickstart']; "
        "from localsgd_jax.__main__ import main; main()"
    )
    done = process("-c", code, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == (
        'localsgd needs its command-line extra: pip install "localsgd-jax[cli]"\n'
    )
