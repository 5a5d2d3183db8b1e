"""Processes that are killed, stopped, asked to go and slowed down: the others go on."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jobs import HERE, Job
from resilient_process import BATCH, WORKERS, algorithm, data, evaluate, start

import localsgd_jax as lsgd
from localsgd_jax import resilient
from localsgd_jax.apart import apart
from localsgd_jax.checkpoint import Checkpoints

STEPS, PERIOD, HEARTBEAT, TIMEOUT = 150, 5, 6, 15


def alone(**options):
    """The verbs of a cluster of this one process."""
    mesh = jax.make_mesh((2,), ("worker",), devices=jax.devices()[:2])
    return apart(algorithm(), mesh, WORKERS, **options)


def dealt(start=0):
    return lsgd.deal(data(), workers=WORKERS, batch=BATCH, start=start)


def undisturbed():
    """The error that a run reaches in which nothing happens."""
    cluster = lsgd.simulate(algorithm(), WORKERS)
    state, _ = lsgd.train(
        cluster,
        cluster.init(start()),
        dealt(),
        every=PERIOD,
        steps=STEPS,
        progress=False,
    )
    return float(evaluate(lsgd.consensus(state))["error"])


@pytest.fixture(scope="module")
def usual():
    return undisturbed()


def check(history, usual, alive):
    """The run has reached its end and its loss, and nobody waited for too long."""
    assert history["step"][-1] == STEPS
    assert history["alive"][-1] == alive
    assert history["error"][-1] == pytest.approx(usual, rel=0.02)
    longest = np.diff(history["seconds"], prepend=0)[1:].max()
    assert longest < 2 * TIMEOUT + 2 * HEARTBEAT


def fell_out(processes, kind, seed, **settings):
    """Sends a signal to a process other than 0 at a random moment; returns the end."""
    chance = random.Random(seed)
    with Job(processes, steps=STEPS, pause=0.01, **settings) as job:
        job.until_row(PERIOD * chance.randrange(1, 10))
        time.sleep(0.1 * chance.random())
        victim = chance.randrange(1, processes)
        job.send(victim, getattr(signal, kind))
        codes = job.end()
        return job, victim, codes


@pytest.mark.timeout(200)
@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "processes, kind, seed",
    [
        (3, "SIGKILL", 0),
        *[
            pytest.param(n, kind, seed, marks=pytest.mark.slow)
            for n in (3, 4)
            for kind in ("SIGKILL", "SIGSTOP")
            for seed in (1, 2)
        ],
    ],
)
def test_the_others_go_on_when_one_dies_or_hangs(processes, kind, seed, overlap, usual):
    job, victim, codes = fell_out(processes, kind, seed, overlap=overlap)
    others = set(range(processes)) - {victim}
    assert [codes[process] for process in others] == [0] * (processes - 1), job.tail()
    assert codes[victim] == (-signal.SIGKILL if kind == "SIGKILL" else None)
    check(job.history(), usual, processes - 1)
    told = rf"from step \d+ on without process {victim}: it has died, or its heartbeats"
    assert sum(bool(re.search(told, line)) for line in job.seen[0]) == 1
    for process in others:
        history = job.history(process)
        assert history["step"] == job.history()["step"]
        assert np.isnan(np.array(history["work"], float)[-1, victim])


@pytest.mark.timeout(200)
def test_who_is_asked_to_go_goes_after_a_meeting(tmp_path, usual):
    """SIGTERM to process 1, then to process 0; then all begin again, but on two."""
    settings = {"directory": str(tmp_path), "pause": 0.01, "save_every": 1000}
    with Job(3, steps=10000, **settings) as job:
        job.until_row(2 * PERIOD)
        job.send(1, signal.SIGTERM)
        while (row := job.until_row(0))["alive"] == 3:
            pass
        job.send(0, signal.SIGTERM)
        assert job.end() == [resilient.PREEMPTED] * 3, job.tail()
        told = [line.split(" on ")[1] for line in job.seen[0] if "train():" in line]
        assert told == [f"without process {p}: it has got SIGTERM" for p in (1, 0)]
        last = [json.loads(line)["row"] for line in job.seen[0] if '"row"' in line][-1]
    with Job(2, steps=last["step"] + STEPS, **settings) as job:
        assert job.end() == [0, 0], job.tail()
        begins = json.loads(next(line for line in job.seen[0] if '"from"' in line))
        assert begins["from"] == last["step"] >= row["step"]
        assert job.history()["error"][-1] == pytest.approx(usual, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_launcher_starts_again_when_process_0_dies(tmp_path, usual):
    settings = {"steps": STEPS, "pause": 0.02, "directory": str(tmp_path)}
    settings |= {"save_every": 10, "last": [[0, 60]]}
    command = "-m localsgd_jax launch -n 3 --elastic --restarts 1 --".split()
    done = subprocess.run(
        [sys.executable, *command]
        + [sys.executable, "resilient_process.py", json.dumps(settings)],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    begun = [json.loads(x[4:])["from"] for x in done.stdout.splitlines() if "from" in x]
    first, second = sorted(begun)[:3], sorted(begun)[3:]
    assert first == [0] * 3 and second in ([40] * 3, [50] * 3)


@pytest.mark.slow
def test_restarts_are_timed():
    command = [sys.executable, str(HERE / "restarts.py"), "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("steps lost") == 2 and "median" in done.stdout


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"every": [30, 40]}, r"train\(\): every: \[30, 60\] in process 0, \[40\] in "),
        ({"begin": [0.0, 1.0]}, r"train\(\): start\.\S*w\S*: .* in process 0, .* in "),
    ],
)
def test_processes_that_would_do_different_things_hear_so(settings, told):
    with Job(2, steps=10, **settings) as job:
        assert job.end() == [1, 1]
        for lines in job.seen:
            assert any(re.search(told + "process 1", line) for line in lines), (
                job.tail()
            )


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_who_wakes_up_too_late_ends_and_disturbs_nobody():
    with Job(3, steps=600, pause=0.01) as job:
        job.until_row(2 * PERIOD)
        job.send(2, signal.SIGSTOP)
        while job.until_row(0)["alive"] == 3:
            pass
        job.send(2, signal.SIGCONT)
        assert job.end() == [0, 0, 1], job.tail()
        assert any("CompanyError" in line for line in job.seen[2])
        assert job.history()["alive"][-1] == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_too_few_save_and_ask_to_be_started_again(tmp_path):
    settings = {"pause": 0.01, "directory": str(tmp_path), "save_every": 10000}
    with Job(3, steps=10000, least=3, **settings) as job:
        job.until_row(2 * PERIOD)
        job.send(2, signal.SIGKILL)
        codes = job.end()
        assert codes == [resilient.TOO_FEW] * 2 + [-signal.SIGKILL], job.tail()
        row = [json.loads(line)["row"] for line in job.seen[0] if '"row"' in line][-1]
    one = lsgd.simulate(algorithm(), 1)
    with Checkpoints(tmp_path, one) as saved:
        state, _ = saved.restore(one.init(start()))
    assert int(state.step) == row["step"]


@pytest.mark.parametrize(
    "options",
    [
        {"evaluate_every": 1},
        {"evaluate_every": 1, "overlap": True},
        {"steps": PERIOD},  # After the last round.
    ],
)
def test_what_fails_in_process_0_is_told_to_the_others(options):
    with Job(2, **({"steps": 100, "broken": True} | options)) as job:
        assert job.end(timeout=60) == [1, 1], job.tail()
        assert job.seen[0][-1] == "OSError: no table"
        assert "process 0: OSError: no table" in job.seen[1][-1]


def test_who_waits_for_whom_is_written_down():
    """Two processes, one of which loads its data slowly."""
    with Job(2, steps=5 * PERIOD, slow=[0.0, 0.1]) as job:
        assert job.end() == [0, 0], job.tail()
        history = {name: np.array(x) for name, x in job.history().items()}
    middle = slice(1, -1)  # The first round compiles, the last one looks no further.
    assert (history["slowest"][middle] == 1).all()
    assert (history["work"][middle, 1] >= PERIOD * 0.1).all()
    assert (history["waited"][middle, 1] == 0).all()
    waited = history["work"].max(1, keepdims=True) - history["work"]
    np.testing.assert_allclose(history["waited"], waited, atol=1e-6)
    assert (history["waited"][middle, 0] > PERIOD * 0.05).all()


def test_a_slow_process_takes_fewer_steps_when_time_is_short():
    with Job(2, steps=4 * 8, period=8, slow=[0.0, 0.2], seconds=0.5) as job:
        assert job.end() == [0, 0], job.tail()
        steps = np.array(job.history()["steps"])
    late = steps[1:]  # The first round compiles, in whatever time.
    assert ((1 <= late[:, 1]) & (late[:, 1] < late[:, 0])).all(), steps


def test_alone_it_is_train():
    cluster = lsgd.simulate(algorithm(), WORKERS)
    expected, their_history = lsgd.train(
        cluster, cluster.init(start()), dealt(), every=4, steps=18, progress=False
    )
    mine = alone()
    rows = []
    state, history = resilient.train(
        mine, mine.init(start()), dealt(), every=4, steps=18, record=rows.append
    )
    for one, other in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for name in ("step", "round", "bytes"):
        assert history[name].tolist() == their_history[name].tolist()
    np.testing.assert_allclose(history["loss"], their_history["loss"], rtol=1e-5)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 18]


@pytest.mark.parametrize("overlap", [False, True])
def test_periods_may_follow_the_run(overlap):
    """What is seen in a round holds for the next one that has not begun."""
    schedule = lsgd.adacomm(8)
    mine = alone()
    _, history = resilient.train(
        mine,
        mine.init(start()),
        dealt(),
        every=schedule,
        steps=100,
        overlap=overlap,
        progress=False,
    )
    lengths, ratio = np.diff(history["step"], prepend=0), history["loss"]
    wanted = np.ceil(np.sqrt(ratio / ratio[0]) * 8)
    late = 1 + overlap
    assert (lengths[: 1 + late] == 8).all() and lengths[-2] < 6
    falls = np.flatnonzero(np.minimum.accumulate(ratio) == ratio)
    for r in falls[falls < len(lengths) - late - 1]:
        assert lengths[r + late] <= wanted[r]


def test_a_progress_bar_shows_rounds_and_who_lives(capsys):
    mine = alone()
    resilient.train(mine, mine.init(start()), dealt(), every=4, steps=18, progress=True)
    err = capsys.readouterr().err
    assert "18/18" in err and "round=5" in err and "alive=1" in err


def test_overlapping_it_is_the_rule():
    """And at the end everybody has what all had come to."""

    def loss(w, batch):
        return jnp.mean((w - batch[1]) ** 2)

    late = lsgd.local_sgd(loss, optax.sgd(0.1), rule=lsgd.overlap(lsgd.average()))
    cluster = lsgd.simulate(late, WORKERS)
    expected, _ = lsgd.train(
        cluster, cluster.init(jnp.zeros(())), dealt(), every=4, steps=16, progress=False
    )
    plain = lsgd.local_sgd(loss, optax.sgd(0.1), rule=lsgd.average())
    mesh = jax.make_mesh((2,), ("worker",), devices=jax.devices()[:2])
    mine = apart(plain, mesh, WORKERS)
    state, history = resilient.train(
        mine, mine.init(jnp.zeros(())), dealt(), every=4, steps=16, overlap=True
    )
    assert history["step"].tolist() == [4, 8, 12, 16]
    assert int(state.step) == 16 and int(state.round) == 4
    np.testing.assert_allclose(
        state.workers.params, np.full(WORKERS, lsgd.consensus(expected)), rtol=1e-5
    )


def test_a_run_that_is_cut_goes_on_from_the_mean(tmp_path):
    mine = alone()
    state = mine.init(start())
    for steps in (8, 16):
        with Checkpoints(tmp_path, mine.one, alone=True) as saved:
            one, examples = saved.restore(mine.one.init(start()))
            state = mine.spread(one)
            assert (int(state.step), examples) == (steps - 8, (steps - 8) * 48)
            state, _ = resilient.train(
                mine,
                state,
                dealt(examples),
                every=4,
                steps=8,
                save=saved.save,
                save_every=4,
            )
    assert int(state.step) == 16


def test_workers_that_start_from_one_have_keys_of_their_own():
    made = lsgd.from_train_step(lambda s, b: (s, {}), rule=lsgd.average())
    mesh = jax.make_mesh((2,), ("worker",), devices=jax.devices()[:2])
    mine = apart(made, mesh, 4)
    one = mine.one.init({"params": jnp.arange(3.0), "key": jax.random.key(3)})
    state = mine.spread(one)
    assert state.workers["params"].tolist() == [[0.0, 1.0, 2.0]] * 4
    keys = jax.random.key_data(state.workers["key"])
    assert len(np.unique(keys, axis=0)) == 4
    assert (keys[0] == jax.random.key_data(one.workers["key"][0])).all()


def test_all_stop_at_a_loss_that_is_not_finite():
    # As if the first workers were in another process.
    mine = alone()._replace(owners=(1,) * 4 + (0,) * (WORKERS - 4))
    batches = itertools.chain(
        itertools.islice(dealt(), 4),
        (jax.tree.map(lambda x: x * np.inf, b) for b in dealt()),
    )
    with pytest.raises(lsgd.NonFiniteLossError) as caught:
        resilient.train(mine, mine.init(start()), batches, every=4, steps=12)
    assert (caught.value.step, caught.value.workers) == (8, list(range(4, WORKERS)))
    assert caught.value.history["step"].tolist() == [4]


def test_sigterm_saves_and_ends():
    """From within, at the third batch."""

    def batches():
        for i, batch in enumerate(dealt()):
            if i == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    mine, kept = alone(), []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        resilient.train(
            mine,
            mine.init(start()),
            batches(),
            every=4,
            save=lambda state, examples: kept.append((int(state.step), examples)),
        )
    assert ended.value.code == resilient.PREEMPTED
    assert kept == [(8, 8 * WORKERS * BATCH)]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, r"every\(h\): h must be at least 1, got 0"),
        ({"least": 2}, r"train\(least\): there are 1 processes, got 2"),
        ({"least": 0}, r"train\(least\): least must be at least 1, got 0"),
        ({"save_every": 0}, r"train\(save_every\): save_every must be at least 1"),
        ({"evaluate_every": 0}, r"train\(evaluate_every\): evaluate_every must be"),
        ({"steps": 2.5}, r"train\(steps\): steps must be an int, got 2.5"),
        ({"steps": "a"}, r"train\(steps\): steps must be an int, got 'a'"),
        ({"steps": -1}, r"train\(steps\): steps must be at least 0, got -1"),
        ({"seconds": "x"}, r"train\(seconds\): seconds must be a number, got 'x'"),
        ({"seconds": 0}, r"train\(seconds\): seconds must be finite and above 0"),
        ({"timeout": np.nan}, r"train\(timeout\): timeout must be finite and above"),
        ({"timeout": 0}, r"train\(timeout\): timeout must be finite and above 0"),
        ({"patience": np.inf}, r"train\(patience\): patience must be finite and"),
    ],
)
@pytest.mark.timeout(60)
def test_what_is_refused(options, message):
    mine = alone()
    with pytest.raises((TypeError, ValueError), match=message):
        resilient.train(
            mine, mine.init(start()), dealt(), **({"every": 4, "steps": 8} | options)
        )


def test_without_batches_there_is_no_training():
    mine = alone()
    with pytest.raises(ValueError, match="at least one is needed, got none"):
        resilient.train(mine, mine.init(start()), [], every=4)


def test_a_run_that_is_complete_has_all_columns_and_no_row():
    mine = alone()
    state, history = resilient.train(
        mine, mine.init(start()), dealt(), every=4, steps=0
    )
    _, done = resilient.train(mine, state, dealt(), every=4, steps=4)
    assert history.keys() == done.keys() - {"loss"}
    assert {name: x.shape for name, x in history.items()} == {
        name: (0, *done[name].shape[1:]) for name in history
    }


@pytest.mark.parametrize("batch", [None, {}])
def test_batches_without_arrays_are_refused(batch):
    mine = alone()
    with pytest.raises(ValueError, match=rf"a batch must hold arrays, got {batch}"):
        resilient.train(mine, mine.init(start()), [batch], every=4)
