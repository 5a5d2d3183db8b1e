"""The `localsgd train` command: its output, files and numbers."""

import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest
from harness.command_line import (
    PNG,
    QUICK,
    invoke,
    read_run,
    run_python,
    run_train,
)
from harness.experiment_files import require_dataset
from harness.selection import in_full, keep

import localsgd_jax as lsgd
from localsgd_jax.experiments import choices, datasets, logistic


def test_run_directory_has_config_history_params_and_figure(data):
    config, rows = run_train(data)
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
    # An all-reduce of three float32 over eight workers: 2 · 7/8 · 12 bytes.
    assert [row["bytes"] for row in rows] == list(range(0, 211, 21))
    assert all(row["loss"] > 0 for row in rows[1:])
    assert config["synchronises"] == "every(4)"
    assert config["devices"] == 8 and config["platform"] == "cpu"
    assert config["versions"]["jax"] == jax.__version__


def test_suboptimality_is_that_of_the_saved_params(data):
    config, rows = run_train(data)
    dataset = datasets.load(data)
    x = np.load("run/params.npz")["x"]
    gap = logistic.objective(dataset, x) - logistic.optimal_value(dataset)
    assert rows[-1]["suboptimality"] == pytest.approx(gap, rel=1e-9)
    assert rows[0]["suboptimality"] == pytest.approx(np.log(2) - config["f_star"])
    assert 0 < gap < rows[0]["suboptimality"] / 4


def test_run_matches_manual_loop(data):
    config, _ = run_train(data, "--learning-rate 0.5 --seed 3")
    dataset = datasets.load(data)
    examples = dataset.features.toarray(), dataset.labels
    batches = lsgd.shuffled_batches(examples, 8, 4, seed=3)
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


@pytest.mark.full
def test_run_can_be_repeated_from_its_config(data):
    config, rows = run_train(data, "--schedule post-local:10 --seed 5")
    names = ["data", "workers", "period", "schedule", "batch", "steps", "optimizer"]
    names += ["learning_rate", "seed", "devices"]
    flags = [f"--{name.replace('_', '-')} {config[name]}" for name in names]
    assert invoke(f"train {' '.join(flags)} --out repeated").exit_code == 0
    _, repeated = read_run("repeated")
    losses = [[row["loss"] for row in run[1:]] for run in (rows, repeated)]
    assert losses[0] == losses[1]
    assert rows[-1]["suboptimality"] == repeated[-1]["suboptimality"]


@pytest.mark.parametrize("optimizer", keep(choices.OPTIMIZERS, ["adam"]))
def test_optimizer_decreases_suboptimality(data, optimizer):
    config, rows = run_train(data, f"--optimizer {optimizer}")
    assert rows[-1]["suboptimality"] < rows[0]["suboptimality"] / 2
    assert config["optimizer"] == optimizer


@pytest.mark.full
def test_seeds_optimizers_and_batches_give_different_results(data):
    lasts = {
        run_train(data, options, f"run{i}")[1][-1]["suboptimality"]
        for i, options in enumerate(
            ["", "--seed 1", "--optimizer momentum", "--optimizer adam", "--batch 5"]
        )
    }
    assert len(lasts) == 5


QSR = "--schedule qsr:1 --learning-rate 0.5"


@pytest.mark.parametrize(
    "options, ends",
    [
        in_full("--schedule never", [40]),
        in_full("--schedule at-steps:3,7,20", [3, 7, 20, 40]),
        ("--schedule post-local:2 --period 16", [1, 2, 18, 34, 40]),
        in_full("--schedule geometric --period 16", [1, 3, 7, 15, 31, 40]),
        in_full(f"{QSR} --period 16", [16, 32, 40]),
        in_full(f"{QSR} --period 2", [4, 8, 14, 23, 40]),
        in_full("", [8, 16, 24, 32, 40]),
    ],
)
def test_schedule_defines_the_ends_of_rounds(data, options, ends):
    result = invoke(f"train --data {data} --out run --steps 40 {options}")
    assert result.exit_code == 0, result.output
    assert [row["step"] for row in read_run("run")[1][1:]] == ends


@pytest.mark.full
def test_several_workers_per_device(data):
    config, rows = run_train(data, "--workers 10 --batch 2")
    assert config["devices"] == 5
    assert rows[-1]["bytes"] == 10 * 22  # 2 · 9/10 · 12, rounded up.


@pytest.mark.full
def test_default_directory_has_the_name_of_the_data(data, workdir):
    result = invoke(f"train --data {data} {QUICK}")
    assert result.exit_code == 0
    (found,) = workdir.glob("toy-*")
    assert (found / "params.npz").exists()
    assert f"written: {found.name}" in result.stdout


def test_summary_matches_history(data):
    result = invoke(f"train --data {data} --out run {QUICK}")
    config, rows = read_run("run")
    assert "80 examples, 3 features; 8 workers on 8 cpu devices" in result.stdout
    assert (
        "40 steps and 10 rounds of communication, 0.00021 MB sent by each worker"
        in result.stdout
    )
    gap, minimum = rows[-1]["suboptimality"], config["f_star"]
    assert f"f - f* = {gap:.4g}, f* = {minimum:.15f}" in result.stdout


@pytest.mark.full
def test_number_of_evaluations_is_bounded(data):
    _, rows = run_train(data, "--steps 1000 --period 2")
    assert len(rows) == 501
    evaluated = [row["step"] for row in rows if "suboptimality" in row]
    assert evaluated == list(range(0, 1001, 10))


@pytest.mark.full
def test_registered_dataset():
    require_dataset("a9a")
    config, rows = run_train("a9a")
    assert config["data"] == "a9a" and config["sha256"] == datasets.REGISTRY["a9a"]
    assert rows[-1]["suboptimality"] < rows[0]["suboptimality"]


@pytest.mark.full
def test_command_in_another_process_prints_json(data):
    line = f"train --data {data} --workers 6 --devices 3 --steps 20 --json --out run"
    done = run_python("-m", "localsgd_jax", *line.split(), stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    config, rows = read_run("run")
    assert printed == {
        "config": {k: v for k, v in config.items() if k != "versions"},
        "final": rows[-1],
    }
    assert config["devices"] == 3 and config["workers"] == 6


@pytest.mark.slow
def test_w8a_converges():
    require_dataset("w8a")
    data = str(pathlib.Path(os.environ["LOCALSGD_DATA"], "w8a"))
    line = f"train --data {data} --workers 16 --period 8 --batch 4 --out run"
    done = run_python("-m", "localsgd_jax", *line.split())
    assert done.returncode == 0
    config, rows = read_run("run")
    assert config["f_star"] == pytest.approx(0.126180686510513, abs=1e-14)
    assert rows[-1]["suboptimality"] < 0.005


# -- Non-finite losses -------------------------------------------------------------


def find_outlier_seed(workers, row=17, count=80):
    """Returns a seed, and the step and worker of a row inside of a round of four."""
    for seed in range(100):
        batches = lsgd.shuffled_batches(np.arange(count), workers, 1, seed=seed)
        for step, batch in zip(range(1, 11), batches, strict=False):
            if row in batch and step > 4 and step % 4:
                return seed, step, int(np.argmax(batch[:, 0] == row))
    raise AssertionError


def test_non_finite_loss_stops_the_run_and_keeps_the_history():
    # Only row 17 has a non-zero gradient: λ/2 ‖x‖² overflows on its worker.
    lines = [f"{i % 2}" for i in range(80)]
    lines[17] += " 1:1"
    pathlib.Path("sparse.txt").write_text("\n".join(lines))
    seed, step, worker = find_outlier_seed(8)
    result = invoke(
        f"train --data sparse.txt --out run --batch 1 --period 4 --steps 40 "
        f"--learning-rate 1e30 --seed {seed}"
    )
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == (
        f"Error: the loss is not finite at step {step + 1} for the workers [{worker}]; "
        "the history so far is in run\n"
    )
    _, rows = read_run("run")
    assert [row["step"] for row in rows] == list(range(0, step + 1, 4))
    assert len(rows) > 1


@pytest.mark.full
def test_non_finite_final_params_are_not_saved():
    pathlib.Path("large.txt").write_text("1 1:90\n2 1:99\n" * 40)
    result = invoke(
        "train --data large.txt --out run --steps 1 --batch 1 --learning-rate 3e38"
    )
    assert result.exit_code == 1
    assert "at step 1 for the workers [0, 1, 2, 3, 4, 5, 6, 7];" in result.stderr
    _, rows = read_run("run")
    assert rows[-1]["step"] == 1 and rows[-1]["suboptimality"] is None
    assert not pathlib.Path("run/params.npz").exists()
