"""Checkpoints: bit for bit, on any number of workers, and refused where they misfit."""

import functools
import gc
import itertools
import os
import pathlib
import random
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PLACEMENTS, RULES, anchored, assert_same, mesh, raw

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import CheckpointError, Checkpoints, export
from localsgd_jax.rules.describe import describe

K, BATCH, STEPS = 8, 2, 23
DATA = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
ADAM = optax.adam(0.05)


def train_step(state, batch):
    """Adam on a noisy square: a key, a count and moments travel along."""
    noise = jax.random.normal(jax.random.fold_in(state["key"], state["seen"]), (3,))

    def loss_fn(w):
        return jnp.mean((w + 0.1 * noise - batch.mean(0)) ** 2)

    loss, grad = jax.value_and_grad(loss_fn)(state["params"]["w"])
    updates, opt_state = ADAM.update({"w": grad}, state["opt_state"])
    return {
        "params": optax.apply_updates(state["params"], updates),
        "opt_state": opt_state,
        "key": state["key"],
        "seen": state["seen"] + 1,
    }, {"loss": loss}


def start():
    params = {"w": jnp.zeros(3)}
    return {
        "params": params,
        "opt_state": ADAM.init(params),
        "key": jax.random.key(5),
        "seen": jnp.int32(0),
    }


def made(rule=None):
    return lsgd.from_train_step(train_step, rule or anchored())


def dealt(cluster, position):
    return lsgd.deal(DATA, cluster.workers, BATCH, start=position)


def driven(directory, cluster, schedule, stop=None, save_every=5, **options):
    """A run that goes on from its last checkpoint; the data may end with an error."""
    with Checkpoints(directory, cluster, **options) as saved:
        state, position = saved.restore(cluster.init(start()))
        begin = int(state.step)

        def batches():
            for step, batch in enumerate(dealt(cluster, position), begin + 1):
                if step == stop:
                    raise KeyboardInterrupt
                yield batch

        return lsgd.train(
            cluster,
            state,
            batches(),
            every=schedule,
            steps=STEPS - begin,
            chunk=6,
            evaluate=lambda params: jnp.sum(params["w"]),
            evaluate_every=3,
            save=saved.save,
            save_every=save_every,
            progress=False,
        )


@pytest.mark.parametrize(
    "place, schedule",
    [
        ("simulate", lsgd.every(4)),
        ("lanes", lsgd.post_local(6, 5)),
        ("simulate", lsgd.never()),
    ],
    ids=repr,
)
def test_interrupted_is_uninterrupted_bit_for_bit(tmp_path, place, schedule):
    """Saved every five steps, so in the middle of rounds too."""
    cluster = PLACEMENTS[place](made())
    whole, history = driven(tmp_path / "whole", cluster, schedule)
    for stop in (3, 12, 17, STEPS):
        with pytest.raises(KeyboardInterrupt):
            driven(tmp_path / "parts", cluster, schedule, stop)
    parts, rest = driven(tmp_path / "parts", cluster, schedule)
    assert_same(parts, whole)
    again, nothing = driven(tmp_path / "parts", cluster, schedule)
    assert_same(again, whole)
    assert nothing["step"].size == 0
    last = history["evaluation"][-1]
    assert rest["evaluation"][-1] == last and rest["round"][-1] == history["round"][-1]


def test_a_run_goes_on_where_its_workers_moved(tmp_path):
    """Saved on one device, bit for bit the same on eight, four and two."""
    first = PLACEMENTS["simulate"](made())
    with pytest.raises(KeyboardInterrupt):
        driven(tmp_path, first, lsgd.every(4), stop=18)
    states = []
    for place in ("simulate", "mesh", "lanes", "sharded"):
        cluster = PLACEMENTS[place](made())
        with Checkpoints(tmp_path, cluster) as saved:
            fresh = cluster.init(start())
            state, position = saved.restore(fresh)
        assert position == 10 * K * BATCH or position == 15 * K * BATCH
        assert [x.sharding for x in jax.tree.leaves(state)] == [
            x.sharding for x in jax.tree.leaves(fresh)
        ]
        states.append(state)
    for state in states[1:]:
        assert_same(state, states[0])


def saved_by_eight(directory, rule=None):
    """A checkpoint of eight workers that differ, and what is in it."""
    cluster = lsgd.simulate(made(rule), K)
    with Checkpoints(directory, cluster) as saved:
        state, _ = saved.restore(cluster.init(start()))
        for step, batch in enumerate(itertools.islice(dealt(cluster, 0), 5), 1):
            state, _ = cluster.step(state, batch)
            state = cluster.sync(state) if step == 3 else state
        saved.save(state, 5 * K * BATCH)
    return state


@pytest.mark.parametrize("workers", [1, 3, 4, 12])
def test_another_number_of_workers(tmp_path, workers):
    old = saved_by_eight(tmp_path)
    devices = mesh(worker=4) if workers % 4 == 0 else mesh(worker=1)
    cluster = lsgd.on_mesh(made(), devices, workers=workers)
    with Checkpoints(tmp_path, cluster) as saved:
        fresh = cluster.init(start())
        new, position = saved.restore(fresh)
    assert position == 5 * K * BATCH
    assert (int(new.step), int(new.round)) == (5, 1)
    assert_same(new.agreed, old.agreed)

    def means(tree):
        floats = [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
        return [np.mean(np.asarray(x), axis=0, dtype=np.float64) for x in floats]

    parts = (
        lambda state: state.workers["params"],
        lambda state: state.workers["opt_state"],
        lambda state: state.own,
    )
    for part in parts:
        for leaf in jax.tree.leaves(part(new)):
            assert leaf.shape[0] == workers
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        for left, right in zip(means(part(new)), means(part(old)), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
    assert new.workers["seen"].tolist() == [5] * workers
    keys, before = raw(new.workers["key"]), raw(old.workers["key"])
    np.testing.assert_array_equal(keys[:K], before[:workers])
    assert len(np.unique(keys, axis=0)) == workers
    assert [x.sharding for x in jax.tree.leaves(new)] == [
        x.sharding for x in jax.tree.leaves(fresh)
    ]
    state, _ = cluster.step(new, next(dealt(cluster, position)))
    assert int(cluster.sync(state).round) == 2


def test_workers_that_join_again_and_again_get_keys_of_their_own(tmp_path):
    saved_by_eight(tmp_path)
    for step, workers in ((6, 12), (7, 16)):
        cluster = lsgd.simulate(made(), workers)
        with Checkpoints(tmp_path, cluster) as saved:
            state, position = saved.restore(cluster.init(start()))
            state, _ = cluster.step(state, next(dealt(cluster, position)))
            assert int(state.step) == step
            saved.save(state, workers * BATCH)
    assert len(np.unique(raw(state.workers["key"]), axis=0)) == 16


def test_chosen_fields_begin_anew_on_another_number_of_workers(tmp_path):
    saved_by_eight(tmp_path)
    cluster = lsgd.simulate(made(), 4)
    with Checkpoints(tmp_path, cluster) as saved:
        state, _ = saved.restore(cluster.init(start()), fresh=["opt_state"])
    assert_same(state.workers["opt_state"], cluster.init(start()).workers["opt_state"])
    assert np.any(state.workers["params"]["w"])


def test_no_example_is_lost_or_repeated_from_eight_to_three_to_five(tmp_path):
    seen, position = [], 0
    for workers, steps in ((8, 2), (3, 4), (5, 3)):
        cluster = lsgd.simulate(made(), workers)
        with Checkpoints(tmp_path, cluster) as saved:
            state, position = saved.restore(cluster.init(start()))
            hands = list(itertools.islice(dealt(cluster, position), steps))
            lsgd.train(cluster, state, hands, every=2, save=saved.save, progress=False)
        seen += [row for hand in hands for row in hand.reshape(-1, 3).tolist()]
    expected = itertools.islice(lsgd.deal(DATA, workers=1, batch=1), len(seen))
    assert seen == [batch[0, 0].tolist() for batch in expected]


def test_only_the_last_checkpoints_stay(tmp_path):
    cluster = lsgd.simulate(made(), K)
    driven(tmp_path, cluster, lsgd.every(4), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "23"]


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    cluster = lsgd.simulate(made(), K)
    step = jax.jit(lsgd.gated(cluster, lsgd.every(2)), donate_argnums=0)
    state, kept = cluster.init(start()), {}
    with Checkpoints(tmp_path, cluster, keep=9) as saved:
        for batch in itertools.islice(dealt(cluster, 0), 8):
            state, _ = step(state, batch)
            kept[int(state.step)] = jax.tree.map(raw, state)
            saved.save(state)
    with Checkpoints(tmp_path, cluster) as saved:
        restored, _ = saved.restore(cluster.init(start()))
    assert_same(jax.tree.map(raw, restored), kept[8])


def test_a_state_whose_loss_is_no_number_is_not_saved(tmp_path):
    cluster = lsgd.simulate(made(), K)
    hands = list(itertools.islice(dealt(cluster, 0), 9))
    hands[6] = hands[6] * np.nan
    with Checkpoints(tmp_path, cluster) as saved:
        with pytest.raises(lsgd.NonFiniteLossError):
            lsgd.train(
                cluster,
                cluster.init(start()),
                hands,
                every=2,
                save=saved.save,
                save_every=2,
                progress=False,
            )
        assert int(saved.restore(cluster.init(start()))[0].step) == 6


def test_a_run_saves_at_multiples_and_at_its_end():
    cluster = lsgd.simulate(made(), K)
    calls = []

    def save(state, examples):
        calls.append((int(state.step), int(state.round), examples))

    state = cluster.init(start())
    for steps in (7, 6, 0):
        hands = itertools.islice(dealt(cluster, 0), steps)
        state, _ = lsgd.train(
            cluster, state, hands, every=4, save=save, save_every=3, progress=False
        )
    n = K * BATCH
    assert calls == [(3, 0, 3 * n), (6, 1, 6 * n), (7, 2, 7 * n)] + [
        (9, 3, 2 * n),
        (12, 4, 5 * n),
        (13, 5, 6 * n),
    ]


def test_an_empty_directory_gives_the_state_back(tmp_path):
    cluster = lsgd.simulate(made(), K)
    fresh = cluster.init(start())
    with Checkpoints(tmp_path / "new", cluster) as saved:
        assert saved.restore(fresh) == (fresh, 0)


def test_a_run_that_begins_anew_does_not_save_among_the_old(tmp_path):
    state = saved_by_eight(tmp_path)
    cluster = lsgd.simulate(made(), K)
    with Checkpoints(tmp_path, cluster) as saved:
        for late in (state, cluster.init(start())):
            with pytest.raises(CheckpointError, match="of step 5 already, got a state"):
                saved.save(late)


def larger():
    return start() | {"params": {"w": jnp.zeros(4)}}


def extra():
    return start() | {"params": {"w": jnp.zeros(3), "b": jnp.zeros(())}}


@pytest.mark.parametrize(
    "rule, state, options, message",
    [
        (None, larger, {}, r"workers\['params'\]\['w'\]: float32\[3\] there, float32"),
        (None, extra, {}, r"workers\['params'\]\['b'\]: nothing there, float32\[\] h"),
        (lsgd.average(), start, {}, r"rule: .*anchored.* there, .*average\(axis=None"),
        (anchored(rate=0.5), start, {}, r"rule: .*rate=0.7.* there, .*rate=0.5.* here"),
        (
            {"params": anchored(), "opt_state": lsgd.floats(lsgd.average())},
            start,
            {},
            r"rule: .* here",
        ),
        (None, start, {"seed": 1}, r"seed: 0 there, 1 here"),
        (None, start, {"config": {"data": "b"}}, r"config: {} there, {'data': 'b'} h"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path, rule, state, options, message
):
    saved_by_eight(tmp_path)
    cluster = lsgd.simulate(made(rule), K)
    with Checkpoints(tmp_path, cluster, **options) as saved:
        with pytest.raises(CheckpointError, match=message):
            saved.restore(cluster.init(state()))


def test_rules_without_a_state_differ_by_name(tmp_path):
    saved_by_eight(tmp_path, lsgd.average())
    other = lsgd.simulate(made(lsgd.keep()), K)
    with Checkpoints(tmp_path, other) as saved:
        with pytest.raises(CheckpointError, match=r"average\(.* there, .*keep\(\)"):
            saved.restore(other.init(start()))


# Orbax leaves the reads that it began before the one that failed to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_damaged_checkpoint_is_refused(tmp_path, harm):
    """Each file cut in half or gone: refused, or what it held stands elsewhere too."""
    before = saved_by_eight(tmp_path)
    cluster = lsgd.simulate(made(), K)
    files = [path for path in (tmp_path / "5").rglob("*") if path.is_file()]
    refused = []
    for path in files:
        content = path.read_bytes()
        if harm == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.unlink()
        with Checkpoints(tmp_path, cluster) as saved:
            try:
                assert_same(saved.restore(cluster.init(start()))[0], before)
            except CheckpointError as error:
                assert "damaged" in str(error) and "checkpoint 5 in" in str(error)
                refused.append(path)
        path.write_bytes(content)
    assert len(refused) >= 3, refused
    gc.collect()
    with Checkpoints(tmp_path, cluster) as saved:
        assert int(saved.restore(cluster.init(start()))[0].step) == 5


def test_the_consensus_is_read_without_this_library(tmp_path):
    state = saved_by_eight(tmp_path / "run")
    export(tmp_path / "model", lsgd.consensus(state, ("params", "seen")))
    code = f"""
        import sys
        import orbax.checkpoint as ocp
        tree = ocp.StandardCheckpointer().restore({str(tmp_path / "model")!r})
        assert "localsgd_jax" not in sys.modules
        print(tree["params"]["w"].tolist(), int(tree["seen"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = lsgd.consensus(state)["w"].tolist()
    assert done.stdout.strip() == f"{expected} 5"


@pytest.mark.parametrize(
    "call, error, message",
    [
        ({"keep": 0}, ValueError, r"Checkpoints\(keep\): .* at least 1, got 0"),
        ({"seed": -1}, ValueError, r"Checkpoints\(seed\): .* at least 0, got -1"),
        ({"config": {"f": len}}, TypeError, "not JSON serializable"),
    ],
)
def test_bad_input(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        Checkpoints(tmp_path, lsgd.simulate(made(), 2), **call)


def test_a_field_to_begin_anew_that_is_not_there_is_named(tmp_path):
    saved_by_eight(tmp_path)
    cluster = lsgd.simulate(made(), 2)
    with Checkpoints(tmp_path, cluster) as saved:
        with pytest.raises(ValueError, match="'moments'"):
            saved.restore(cluster.init(start()), fresh=["moments"])


def test_orbax_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"export\(\) needs orbax-checkpoint: pip"):
        export(tmp_path / "model", {"w": np.ones(3)})


# Batches come slowly, so that a kill falls anywhere: in steps, in saves, in the end.
KILLED = """
    import sys, time
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    sys.path.insert(0, {tests!r})
    import test_checkpoint as t
    import localsgd_jax as lsgd
    from localsgd_jax.checkpoint import Checkpoints

    directory, result, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
    cluster = lsgd.on_mesh(t.made(), t.mesh(worker=4), workers=8)
    with Checkpoints(directory, cluster, keep=2) as saved:
        state, position = saved.restore(cluster.init(t.start()))
        print("from", int(state.step), flush=True)

        def batches():
            for batch in t.dealt(cluster, position):
                time.sleep(pause)
                yield batch

        state, _ = lsgd.train(
            cluster, state, batches(), every=4, steps=600 - int(state.step), chunk=8,
            save=saved.save, save_every=5, progress=False,
        )
    leaves = [t.raw(leaf) for leaf in jax.tree.leaves(state)]
    t.np.savez(result, *leaves)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_change_nothing(tmp_path):
    """SIGKILL at random moments, ten times in a row, against a run left alone."""
    here = str(pathlib.Path(__file__).parent)
    code = textwrap.dedent(KILLED).format(tests=here)

    def begin(name, pause):
        arguments = [str(tmp_path / name), str(tmp_path / f"{name}.npz"), str(pause)]
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(here).parent)},
        )

    moments, steps = random.Random(0), []
    for _ in range(10):
        run = begin("killed", 0.02)
        steps.append(int(run.stdout.readline().split()[1]))
        time.sleep(moments.uniform(0.5, 3))
        run.kill()
        assert run.wait() == -9
        run.communicate()
    assert steps == sorted(steps) and len(set(steps)) > 3, steps
    for name in ("killed", "alone"):
        run = begin(name, 0)
        _, errors = run.communicate(timeout=500)
        assert run.returncode == 0, errors[-2000:]
    killed, alone = (np.load(tmp_path / f"{name}.npz") for name in ("killed", "alone"))
    assert killed.files == alone.files
    for name in alone.files:
        np.testing.assert_array_equal(killed[name], alone[name])


def test_rules_have_the_names_of_their_calls():
    expected = {
        "average": "average(axis=None)",
        "average_named": "average(axis='worker')",
        "chain_of_one": "chain(rules=[average(axis=None)])",
        "when": "when(rule=average(axis=None), schedule=every(2))",
        "keep": "keep()",
        "anchored": "anchored(decay=0.9, rate=0.7)",
        "floats": "floats(rule=average(axis=None))",
    }
    assert {name: describe(RULES[name].rule) for name in expected} == expected
    for one, other in (("quantize_8", "quantize_1"), ("median", "trimmed_mean")):
        assert describe(RULES[one].rule) != describe(RULES[other].rule)
    made_so = functools.partial(_twice, lsgd.average(), bits=8, by=jnp.tanh)
    rule = lsgd.SyncRule(lambda tree: lsgd.RuleState(), made_so)
    assert describe(rule) == "_twice(0=average(axis=None), bits=8)"
    assert describe(lsgd.SyncRule(None, optax.sgd(0.1))) == (
        "GradientTransformationExtraArgs()"
    )


def _twice(rule, tree, state, context, *, bits, by):
    """A rule made by functools.partial."""
