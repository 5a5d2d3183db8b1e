"""Rounds of one process's own: the numbers of the whole, and no copies."""

import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from apart_process import RULES, WORKERS, algorithm, batches, keyed, start
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import run

import localsgd_jax as lsgd
from localsgd_jax.apart import _moved, _owners, _Part, apart, catch_up, in_background
from localsgd_jax.company import STRIKES
from localsgd_jax.meshes import among


def test_what_fails_in_one_process_is_done_again_by_all():
    found = run("company_process.py", 3)
    assert [row["once"] for row in found] == [2] * 3
    assert [row["tried"] for row in found] == [[3, 3]] * 3
    assert [row["again"] for row in found] == [3] * 3
    for row in found:
        assert row["then"] == STRIKES
        assert f"{STRIKES} attempts have failed though nobody has died" in row["error"]
        assert "process 0: TimeoutError: no answer within 1 s" in row["error"]


def test_process_0_of_a_recoverable_job_ends_last():
    assert [row["process"] for row in run("last_process.py", 3)] == [0, 1, 2]


def expected(rule, manner):
    """What all workers have, computed on one device by the rules themselves."""
    if manner == "beside":
        rule = {name: lsgd.overlap(part) for name, part in as_fields(rule).items()}
    cluster = lsgd.simulate(algorithm(rule), WORKERS)
    state = cluster.init(start())
    if manner == "beside":
        # The rule agrees on the start at first, which changes nothing but its count.
        state = state._replace(round=state.round - 1)
    for stacked in batches()[: 1 if manner == "weighed" else None]:
        for batch in stacked:
            state, _ = cluster.step(state, batch)
        weight = np.repeat([1.0, 2.0], WORKERS // 2) if manner == "weighed" else None
        state = cluster.sync(state, weight)
    return state


def as_fields(rule):
    return rule if isinstance(rule, dict) else {"params": rule}


@pytest.fixture(scope="module")
def found():
    return run("apart_process.py", 2)


@pytest.mark.parametrize("manner", ["in_turn", "beside", "weighed"])
@pytest.mark.parametrize("rule", RULES)
def test_processes_apart_have_the_numbers_of_the_whole(found, rule, manner):
    there = expected(RULES[rule](), manner).workers.params
    for name in there:
        rows = np.concatenate([row[f"{rule} {manner}"][name] for row in found])
        np.testing.assert_allclose(rows, there[name], rtol=1e-5, atol=1e-6)


def test_processes_know_which_of_all_workers_are_theirs(found):
    half = WORKERS // 2
    own = [row["own"] for row in found]
    assert own == [list(range(half)), list(range(half, WORKERS))]


@pytest.mark.parametrize("rule", RULES)
def test_every_process_knows_the_mean(found, rule):
    there = lsgd.consensus(expected(RULES[rule](), "weighed"))
    for row in found:
        for name, value in there.items():
            np.testing.assert_allclose(
                row[f"{rule} mean"][name], value, rtol=1e-5, atol=1e-6
            )


def test_workers_start_with_the_keys_of_the_whole(found):
    params = {"params": jnp.zeros(()), "key": jax.random.key(3)}
    whole = lsgd.simulate(keyed(), WORKERS).init(params).workers["key"]
    rows = np.concatenate([row["keys"] for row in found])
    assert rows.tolist() == jax.random.key_data(whole).tolist()


def mesh(devices):
    return jax.make_mesh((devices,), ("worker",), devices=jax.devices()[:devices])


def test_workers_may_be_sharded():
    mesh = lsgd.worker_mesh(within={"model": 2})
    column = NamedSharding(mesh, P(None, "model"))
    params = {"w": jax.device_put(jnp.ones((4, 6)), column), "b": jnp.zeros(())}
    loss = lsgd.local_sgd(
        lambda p, b: jnp.mean((b @ p["w"] - p["b"]) ** 2),
        optax.adam(0.1),
        rule=lsgd.diloco(),
    )
    batch = np.random.default_rng(0).normal(size=(3, 4, 2, 4)).astype(np.float32)
    mine, cluster = apart(loss, mesh), lsgd.on_mesh(loss, mesh)
    state, _ = mine.round(mine.init(params), batch)
    state, _ = mine.agree(state)
    expected, _ = jax.lax.scan(cluster.step, cluster.init(params), batch)
    expected = cluster.sync(expected)
    for one, other in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    split = P("worker", None, "model")
    assert state.workers.params["w"].sharding.spec == split
    assert mine.mean(state.workers.params)["w"].sharding.spec == P(None, "model")
    again = mine.spread(mine.one.init(jax.device_get(params)), state)
    assert again.workers.params["w"].sharding.spec == split


def test_the_whole_is_made_of_the_pieces_without_a_copy():
    cluster = lsgd.on_mesh(algorithm(lsgd.average()), mesh(4), 8)
    part = _Part(mesh(4), cluster, ("worker",))
    state = cluster.init(start())
    whole = _moved(part, state)
    for one, other in zip(*map(jax.tree.leaves, (state, whole)), strict=True):
        assert one is not other
        for mine, yours in zip(
            one.addressable_shards, other.addressable_shards, strict=True
        ):
            assert (
                mine.data.unsafe_buffer_pointer() == yours.data.unsafe_buffer_pointer()
            )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weigh": True}, r"agree\(weigh\): the first number .* weight.*, got \[\]"),
        ({"weigh": True, "note": [-1.0]}, r"agree\(weigh\): .* not negative, got \[-1"),
        ({"weigh": True, "note": [np.nan]}, r"agree\(weigh\): .* finite .*, got \[nan"),
        (
            {"devices": []},
            r"agree\(devices\): those of this process must .*, got .*\[\]",
        ),
    ],
)
def test_meetings_that_cannot_be_are_refused(options, message):
    mine = apart(algorithm(lsgd.average()), mesh(2), 4)
    state = mine.init(start())
    with pytest.raises(ValueError, match=message):
        mine.agree(state, **options)
    with pytest.raises(ValueError, match=r"mean\(devices\): those of this process"):
        mine.mean(state.workers.params, jax.devices()[:1])


def test_the_places_of_a_process_are_side_by_side():
    def mixed(*processes):
        devices = [types.SimpleNamespace(process_index=p) for p in processes]
        mesh = types.SimpleNamespace(axis_names=("worker",), devices=np.array(devices))
        return _Part(mesh, None, ("worker",))

    assert _owners(mixed(1, 1, 0, 2)) == [1, 1, 0, 2]
    with pytest.raises(ValueError, match=r"side by side .*, got .* \[0, 1, 0, 1\]"):
        _owners(mixed(0, 1, 0, 1))


def test_a_process_holds_whole_places():
    with pytest.raises(ValueError, match="no place of .* has all its devices among"):
        among(mesh(4), [])


def test_what_fails_in_the_background_is_raised_where_it_is_asked_for():
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0).result(timeout=10)


def test_nothing_is_waited_for_longer_than_allowed():
    with pytest.raises(TimeoutError):
        in_background(threading.Event().wait, 30).result(timeout=0.05)


def test_what_was_not_agreed_on_is_as_it_is_now():
    """Bits, integers and keys: no rounding by (a − s) + s."""
    now = lsgd.simulate(algorithm(lsgd.average()), 2).init(start())
    # So far away that now - state + state is something else in float32.
    state = jax.tree.map(lambda x: x + jnp.asarray(1e4 / 3, x.dtype), now)
    after = catch_up(state, now, state)
    for one, other in zip(
        jax.tree.leaves(after.workers), jax.tree.leaves(now.workers), strict=True
    ):
        assert (one == other).all()


def test_a_process_starts_its_workers_as_the_whole_does():
    key = jax.random.key(3)
    made = lsgd.from_train_step(lambda s, b: (s, {}), rule=lsgd.diloco())
    params = {"params": jnp.arange(3.0), "key": key}
    mine = apart(made, mesh(4), 8).init(params)
    whole = lsgd.on_mesh(made, mesh(4), 8).init(params)
    assert jax.tree.structure(mine) == jax.tree.structure(whole)
    for one, other in zip(*map(jax.tree.leaves, (mine, whole)), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        assert (one == other).all()
