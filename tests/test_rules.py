"""Every family of rules against NumPy in float64, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import mesh

import localsgd_jax as lsgd
from localsgd_jax.rules import codecs, neighbours, streaming

K, N = 4, 37


def setter(rule):
    """An algorithm whose local step puts the batch in place of the parameters."""
    return lsgd.from_train_step(lambda s, batch: ({"params": batch}, {}), rule)


def agree(rule, rounds, weights=None, start=None, place=None):
    """Synchronises (K, N) arrays, one after another; returns what each became."""
    rounds = np.asarray(rounds, np.float32)
    place = place or (lambda made: lsgd.simulate(made, rounds.shape[1]))
    cluster = place(setter(rule))
    start = np.zeros(rounds.shape[2:]) if start is None else start
    state, seen = cluster.init({"params": jnp.asarray(start, jnp.float32)}), []
    for i, values in enumerate(rounds):
        state, _ = cluster.step(state, values)
        state = cluster.sync(state, None if weights is None else weights[i])
        seen.append(np.asarray(state.workers["params"]))
    return np.array(seen), state


def values(rounds=4, workers=K, seed=0):
    return np.random.default_rng(seed).normal(size=(rounds, workers, N))


def weighted(x, w):
    return np.tensordot(w, x, 1) / w.sum()


WEIGHTS = [np.array(w) for w in ([1, 2, 0, 0.5], [0, 1, 1, 1], [1.0, 1, 1, 1])]
WEIGHTS.append(np.array([3.0, 0, 0, 1]))
each_weight = pytest.mark.parametrize("given", [None, WEIGHTS], ids=["equal", "given"])


def shares(given, i):
    return np.ones(K) if given is None else given[i]


# Outer optimizers.


@each_weight
@pytest.mark.parametrize(
    "rule, rate, decay, nesterov",
    [
        (lsgd.diloco(), 0.7, 0.9, True),
        (lsgd.slowmo(), 1.0, 0.7, False),
        (lsgd.fedavgm(0.5), 0.5, 0.9, False),
        (lsgd.lookahead(0.4), 0.4, 0.0, False),
        (lsgd.outer(optax.sgd(1.0), "worker"), 1.0, 0.0, False),
    ],
    ids=["diloco", "slowmo", "fedavgm", "lookahead", "mean"],
)
def test_outer_sgd(rule, rate, decay, nesterov, given):
    seen, _ = agree(rule, values(), given)
    anchor, velocity = np.zeros(N), np.zeros(N)
    for i, x in enumerate(values()):
        delta = anchor - weighted(x, shares(given, i))
        velocity = decay * velocity + delta
        anchor = anchor - rate * (delta + decay * velocity if nesterov else velocity)
        np.testing.assert_allclose(seen[i], np.tile(anchor, (K, 1)), atol=1e-5)


def test_fedadam():
    seen, _ = agree(lsgd.fedadam(0.1, 0.9, 0.99, 1e-3), values())
    anchor, m, v = np.zeros(N), 0.0, 0.0
    for t, x in enumerate(values(), 1):
        delta = anchor - x.mean(0)
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
        anchor = anchor - 0.1 * step
        np.testing.assert_allclose(seen[t - 1][0], anchor, atol=1e-5)


def test_an_outer_schedule_counts_rounds():
    rate = optax.piecewise_constant_schedule(1.0, {2: 0.0})
    seen, _ = agree(lsgd.outer(optax.sgd(rate)), values())
    np.testing.assert_allclose(seen[1][0], values()[1].mean(0), atol=1e-6)
    np.testing.assert_array_equal(seen[3], seen[1])


def test_the_anchor_of_half_precision_is_float32():
    """Steps of 1/1024 that bfloat16 parameters near 1 could not add up."""
    cluster = lsgd.simulate(setter(lsgd.outer(optax.sgd(1 / 256))), 2)
    state = cluster.init({"params": jnp.ones(3, jnp.bfloat16)})
    for _ in range(8):
        state, _ = cluster.step(state, jnp.full((2, 3), 1.25, jnp.bfloat16))
        state = cluster.sync(state)
    anchor = state.agreed["params"].anchor
    expected = 1.25 - 0.25 * (255 / 256) ** 8
    np.testing.assert_allclose(anchor, np.full(3, expected), rtol=1e-6)
    assert state.workers["params"].dtype == jnp.bfloat16


@each_weight
@pytest.mark.parametrize(
    "rule",
    [lsgd.diloco(), lsgd.outer(optax.adam(0.1)), lsgd.average()],
    ids=["diloco", "adam", "average"],
)
def test_a_rule_in_pieces_is_the_rule(rule, given):
    expected, _ = agree(rule, values(), given, start=np.arange(N))
    pieces = lsgd.shard(rule, K)
    for place in (None, lambda made: lsgd.on_mesh(made, mesh(worker=2), workers=K)):
        seen, state = agree(pieces, values(), given, np.arange(N), place)
        np.testing.assert_allclose(seen, expected, atol=2e-5)
    for leaf in jax.tree.leaves(state.own):
        assert leaf.shape[0] == K and leaf.size <= N + K  # 1/K each, and scalars


@each_weight
def test_a_running_mean_of_the_consensus(given):
    rule = lsgd.ema(lsgd.diloco(), 0.8)
    seen, state = agree(rule, values(), given, start=np.arange(N))
    expected, _ = agree(lsgd.diloco(), values(), given, start=np.arange(N))
    np.testing.assert_array_equal(seen, expected)
    mean = np.arange(N, dtype=float)
    for x in seen:
        mean = 0.8 * mean + 0.2 * x[0]
    np.testing.assert_allclose(state.agreed["params"].ema, mean, rtol=1e-5, atol=1e-6)


# Elastic, mixed, late.


@each_weight
def test_elastic(given):
    seen, state = agree(lsgd.elastic(0.2, 0.6), values(), given)
    centre = np.zeros(N)
    for i, x in enumerate(values()):
        w = shares(given, i)
        expected = np.where(w[:, None] > 0, x - 0.2 * (x - centre), centre)
        centre = centre + 0.6 * (weighted(x, w) - centre)
        np.testing.assert_allclose(seen[i], expected, atol=1e-6)
    np.testing.assert_allclose(state.agreed["params"], centre, atol=1e-6)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_mix(alpha):
    seen, _ = agree(lsgd.mix(lsgd.average(), alpha), values())
    x = values()
    expected = alpha * x + (1 - alpha) * x.mean(1, keepdims=True)
    np.testing.assert_allclose(seen, expected, atol=1e-6)


@each_weight
def test_overlap(given):
    """Here what a worker is depends on what it was."""
    rule = lsgd.overlap(lsgd.average())
    made = lsgd.from_train_step(lambda s, b: ({"params": s["params"] + b}, {}), rule)
    cluster = lsgd.simulate(made, K)
    state = cluster.init({"params": jnp.zeros(N)})
    x, snapshot = np.zeros((K, N)), np.zeros((K, N))
    for i, moves in enumerate(values()):
        w, before = shares(given, i), x + moves
        mean = np.tile(weighted(snapshot, w), (K, 1))
        x = np.where(w[:, None] > 0, mean + before - snapshot, mean)
        snapshot = x
        state, _ = cluster.step(state, moves.astype(np.float32))
        state = cluster.sync(state, None if given is None else given[i])
        np.testing.assert_allclose(state.workers["params"], x, atol=1e-5)
        if given is None:
            np.testing.assert_allclose(x.mean(0), before.mean(0), atol=1e-12)


def test_a_delayed_rule_agrees_on_the_snapshot():
    seen, _ = agree(lsgd.delay(lsgd.average()), values(4))
    x = values(4)
    np.testing.assert_allclose(seen[0], x[0], atol=1e-6)
    np.testing.assert_allclose(seen[1], np.tile(x[0].mean(0), (K, 1)), atol=1e-6)
    np.testing.assert_allclose(seen[3], np.tile(x[2].mean(0), (K, 1)), atol=1e-6)


# Fragments.


@pytest.mark.parametrize("h, n", [(36, 5), (10, 4), (8, 8), (7, 3), (500, 24), (5, 1)])
def test_every_fragment_has_its_turn_once_in_h_steps(h, n):
    steps = lsgd.spread(h, n).steps(3 * h)
    assert len(steps) == 3 * n and steps[n - 1 :: n] == [h, 2 * h, 3 * h]
    for p in range(n):
        assert np.diff(steps[p::n]).tolist() == [h, h]
    gaps = np.diff([0, *steps])
    assert gaps.max() - gaps.min() <= 1
    due = jax.jit(jax.vmap(lsgd.spread(h, n)))(jnp.arange(1, 3 * h + 1))
    assert (np.flatnonzero(due) + 1).tolist() == steps


@pytest.mark.parametrize("schedule", [lsgd.every(6), lsgd.spread(10, 3)])
@pytest.mark.parametrize("made", [lsgd.early, lsgd.late])
def test_delays_come_in_pairs(schedule, made):
    due = made(schedule, 2)
    found = due.steps(30)
    moved = [t + (2 if made is lsgd.late else -2) for t in schedule.steps(40)]
    both = sorted({*schedule.steps(30), *(t for t in moved if t <= 30)})
    assert found == both
    traced = jax.jit(jax.vmap(due))(jnp.arange(1, 31))
    assert (np.flatnonzero(traced) + 1).tolist() == found


TREES = {
    "many": [np.zeros(s, np.float32) for s in (7, 3, 5, 5, 2, 8, 1, 9, 4, 6)],
    "one large": [np.zeros((100, 3), np.float32), np.zeros(2, np.float32)],
    "scalars": [np.float32(0)] * 5,
    "mixed": {"w": np.zeros((6, 4), np.float16), "b": np.zeros(6, np.float32)},
}


def sizes(tree, groups):
    leaves, weights = jax.tree.leaves(tree), []
    for pieces in groups:
        parts = [streaming._take(jnp.asarray(leaves[p.leaf]), p) for p in pieces]
        weights.append(sum(part.nbytes for part in parts))
    return weights


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("cut", [None, 0])
def test_fragments_cover_the_tree_exactly_once(name, n, cut):
    tree = jax.tree.map(jnp.asarray, TREES[name])
    groups = streaming.group(tree, n, cut=cut)
    counts = [np.zeros(leaf.shape, int) for leaf in jax.tree.leaves(tree)]
    for pieces in groups:
        for piece in pieces:
            whole = piece.axis is None
            counts[piece.leaf][... if whole else slice(piece.start, piece.stop)] += 1
    assert all((count == 1).all() for count in counts)
    assert sum(sizes(tree, groups)) == sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_fragments_weigh_alike_where_leaves_allow(n):
    tree = [jnp.zeros(20 + i) for i in range(60)]
    for cut in (None, 0):
        weights = sizes(tree, streaming.group(tree, n, cut=cut))
        assert max(weights) <= 1.1 * min(weights)
    large = jax.tree.map(jnp.asarray, TREES["one large"])
    weights = sizes(large, streaming.group(large, n, cut=0))
    assert max(weights) <= 1.1 * min(weights)


def test_fragments_by_layer_and_by_label():
    tree = {
        "embed": jnp.zeros(9),
        "layers": [{"w": jnp.zeros(4), "b": jnp.zeros(1)} for _ in range(5)],
        "norm": jnp.zeros(2),
    }
    names = [streaming._name(p) for p, _ in jax.tree.leaves_with_path(tree)]
    groups = streaming.group(tree, 2, by="layer")
    where = {names[piece.leaf]: p for p, part in enumerate(groups) for piece in part}
    assert [where[f"layers.{i}.w"] for i in range(5)] == [0, 1, 0, 1, 0]
    assert where["embed"] == 1 and where["norm"] == 0
    label = lambda name: 1 if name.startswith("layers") else 0  # noqa: E731
    groups = streaming.group(tree, 2, by=label)
    assert [names[piece.leaf] for piece in groups[0]] == ["embed", "norm"]


@pytest.mark.parametrize("n, cut", [(3, None), (2, 0)])
def test_a_fragment_is_synchronised_in_its_turn_and_nothing_else(n, cut):
    tree = {"a": jnp.zeros(5), "b": jnp.zeros(4), "c": jnp.zeros(3)}
    rule = lsgd.fragment(lsgd.average(), n, cut=cut)
    cluster = lsgd.simulate(setter(rule), K)
    state = cluster.init({"params": tree})
    rng = np.random.default_rng(0)
    touched = jax.tree.map(lambda x: np.zeros(x.shape, int), tree)
    for turn in range(2 * n):
        x = {k: rng.normal(size=(K, v.size)).astype("f4") for k, v in tree.items()}
        state, _ = cluster.step(state, x)
        state = cluster.sync(state)
        for name, after in state.workers["params"].items():
            after = np.asarray(after)
            equal = (after == after[:1]).all(axis=0)
            np.testing.assert_allclose(
                after[:, equal], np.tile(x[name].mean(0)[equal], (K, 1)), atol=1e-6
            )
            np.testing.assert_array_equal(after[:, ~equal], x[name][:, ~equal])
            touched[name] += equal
        if turn == n - 1:
            assert all((count == 1).all() for count in touched.values())
    assert all((count == 2).all() for count in touched.values())


def test_a_fragment_counts_its_own_rounds():
    """Every second turn of each: rounds 3 and 4, 7 and 8."""
    rule = lsgd.fragment(lsgd.when(lsgd.every(2), lsgd.average()), 2, cut=0)
    seen, _ = agree(rule, values(8))
    agreed = (seen == seen[:, :1]).all(axis=1).any(axis=1)
    assert agreed.tolist() == [False, False, True, True] * 2


def test_one_fragment_is_the_rule_itself():
    expected, _ = agree(lsgd.diloco(), values())
    seen, _ = agree(lsgd.fragment(lsgd.diloco(), 1), values())
    np.testing.assert_array_equal(seen, expected)


# Compression.


@pytest.mark.parametrize("bits", codecs.BITS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_integers_are_written_and_read_back(bits, stochastic):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(3, 64)).astype(np.float32) * [[1.0], [1e-3], [0.0]]
    codec = codecs.integers(bits, 16, stochastic)
    payload = codec.encode(jnp.asarray(x, jnp.float32), jax.random.key(0))
    assert payload.dtype == jnp.uint8 and payload.shape == (3, 64 * bits // 8 + 4 * 4)
    read = np.asarray(codec.decode(payload))
    blocks, found = x.reshape(3, 4, 16), read.reshape(3, 4, 16)
    if bits == 1:
        scale = np.abs(blocks).mean(axis=2, keepdims=True)
        np.testing.assert_allclose(found, np.where(blocks >= 0, 1, -1) * scale, 1e-6)
        return
    step = np.abs(blocks).max(axis=2, keepdims=True) / (2 ** (bits - 1) - 1)
    assert (np.abs(found - blocks) <= step * (1.001 if stochastic else 0.501)).all()
    again = codec.encode(jnp.asarray(read), jax.random.key(1))
    if not stochastic:
        np.testing.assert_allclose(codec.decode(again), read, rtol=1e-6)


def test_stochastic_rounding_has_the_right_mean():
    x = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    codec = codecs.integers(2, 16, True)
    read = jax.vmap(lambda key: codec.decode(codec.encode(x, key)))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    deviation = float(jnp.abs(x).max()) / 20_000**0.5
    np.testing.assert_allclose(read.mean(0), x, atol=4 * deviation)


def test_floats_are_written_and_read_back():
    x = jnp.array([[1.0, -3.14159, 1e-3, 1e6]])
    for dtype, tolerance in ((jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)):
        codec = codecs.floats(dtype)
        payload = codec.encode(x[:, :3], None)
        assert payload.nbytes == 6
        np.testing.assert_allclose(codec.decode(payload), x[:, :3], tolerance)
    codec = codecs.floats(jnp.float8_e4m3fn)
    found = codec.decode(codec.encode(x, None))
    np.testing.assert_allclose(found[0, :2], x[0, :2], rtol=2**-4)
    assert found[0, 3] == 448  # The largest, and not NaN.


def quantised(x, bits, block):
    """What integers make of rows (…, m), in float64."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    if bits == 1:
        scale = np.abs(blocks).mean(axis=-1, keepdims=True)
        return (np.where(blocks >= 0, 1, -1) * scale).reshape(x.shape)
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(blocks).max(axis=-1, keepdims=True)
    safe = np.where(scale > 0, scale, 1)
    codes = np.floor(blocks * largest / safe + 0.5).clip(-largest, largest)
    return (codes / largest * scale).reshape(x.shape)


@each_weight
@pytest.mark.parametrize("bits", codecs.BITS)
def test_quantised_means(bits, given):
    """Both exchanges and both residuals, round by round."""
    rule = lsgd.quantize(lsgd.average(), bits, block=8)
    seen, state = agree(rule, values(), given)
    fill = -N % (K * 8)
    sender, owner = np.zeros((K, N)), np.zeros(N + fill)
    for i, x in enumerate(values()):
        w = shares(given, i)
        v = x + sender
        sent = quantised(np.pad(v, ((0, 0), (0, fill))), bits, 8)
        sender = np.where(w[:, None] > 0, v - sent[:, :N], sender)
        mean = weighted(sent, w) + owner
        back = quantised(mean, bits, 8)
        owner = np.where(np.arange(N + fill) < N, mean - back, 0)
        np.testing.assert_allclose(seen[i], np.tile(back[:N], (K, 1)), atol=2e-5)
    own = state.own["params"]
    np.testing.assert_allclose(own.sender, sender, atol=2e-5)
    np.testing.assert_allclose(own.owner.sum(axis=0), owner[:N], atol=2e-5)


@pytest.mark.parametrize(
    "rule",
    [
        lsgd.quantize(lsgd.average(), 1),
        lsgd.quantize(lsgd.average(), 2, rounding="stochastic"),
        lsgd.quantize(lsgd.average(), 4),
        lsgd.cast(lsgd.average(), jnp.float8_e4m3fn),
        lsgd.topk(lsgd.average(), 0.1),
        lsgd.signs(lsgd.average()),
    ],
    ids=["1 bit", "2 bits", "4 bits", "f8", "top 10 %", "signs"],
)
def test_nothing_is_lost(rule):
    """Sent and not yet sent add up to all that there was."""
    rounds = values(6)
    seen, state = agree(rule, rounds)
    own = jax.tree.leaves(state.own["params"])
    rest = own[0].mean(axis=0) + (own[1].sum(axis=0) if len(own) > 1 else 0)
    np.testing.assert_allclose(
        seen[:, 0].sum(axis=0) + rest, rounds.mean(1).sum(0), atol=2e-5
    )
    assert np.abs(seen[0] - rounds[0].mean(0)).max() > 1e-4


@each_weight
def test_topk(given):
    seen, _ = agree(lsgd.topk(lsgd.average(), 0.2), values(), given)
    rest = np.zeros((K, N))
    for i, x in enumerate(values()):
        w, v = shares(given, i), x + rest
        sent = np.zeros_like(v)
        for k in range(K):
            places = np.argsort(-np.abs(v[k]))[: int(np.ceil(0.2 * N))]
            sent[k, places] = v[k, places]
        rest = np.where(w[:, None] > 0, v - sent, rest)
        np.testing.assert_allclose(seen[i][1], weighted(sent, w), atol=1e-6)


@each_weight
def test_signs(given):
    seen, _ = agree(lsgd.signs(lsgd.average()), values(), given)
    rest = np.zeros((K, N))
    for i, x in enumerate(values()):
        w, v = shares(given, i), x + rest
        sent = np.where(v >= 0, 1, -1) * np.abs(v).mean(1, keepdims=True)
        rest = np.where(w[:, None] > 0, v - sent, rest)
        np.testing.assert_allclose(seen[i][1], weighted(sent, w), atol=1e-6)


def test_signs_have_a_size_for_each_leaf():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    cluster = lsgd.simulate(setter(lsgd.signs(lsgd.average())), 1)
    state = cluster.init({"params": tree})
    a, b = np.array([[1.0, -2, 3]]), np.array([[[10.0, 20], [-30, 40]]])
    state, _ = cluster.step(state, {"a": a.astype("f4"), "b": b.astype("f4")})
    after = cluster.sync(state).workers["params"]
    np.testing.assert_allclose(after["a"], [[2, -2, 2]])
    np.testing.assert_allclose(after["b"], [[[25, 25], [-25, 25]]])


LARGE = 2**17


def wire(rule, workers, size=LARGE):
    """What each worker sends in a compiled synchronisation: bytes by collective."""
    made = setter(lsgd.outer(optax.sgd(1.0), rule))
    cluster = lsgd.on_mesh(made, mesh(worker=workers))
    state = cluster.init({"params": jax.ShapeDtypeStruct((size,), jnp.float32)})
    return [(entry.name, entry.sent) for entry in lsgd.ledger(cluster.sync, state)]


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("bits", codecs.BITS)
def test_packed_integers_are_what_is_on_the_wire(bits, workers):
    found = wire(lsgd.quantize(lsgd.average(), bits), workers)
    assert sorted(name for name, _ in found) == ["all-gather", "all-to-all"]
    least = (workers - 1) / workers * (LARGE * bits / 8 + LARGE / 256 * 4)
    for _, sent in found:
        assert least <= sent <= 1.05 * least


@pytest.mark.parametrize("workers", [2, 8])
def test_short_floats_and_few_numbers_are_what_is_on_the_wire(workers):
    others = workers - 1
    for dtype, size in ((jnp.bfloat16, 2), (jnp.float8_e4m3fn, 1)):
        found = wire(lsgd.cast(lsgd.average(), dtype), workers)
        assert [sent for _, sent in found] == [others / workers * size * LARGE] * 2
    found = wire(lsgd.topk(lsgd.average(), 0.01), workers)
    least = others * int(np.ceil(0.01 * LARGE)) * 8
    assert least <= sum(sent for _, sent in found) <= 1.05 * least
    found = wire(lsgd.signs(lsgd.average()), workers)
    least = others * (LARGE / 8 + 4)
    assert least <= sum(sent for _, sent in found) <= 1.05 * least


@pytest.mark.parametrize("rule", [lsgd.median(), lsgd.trimmed_mean(0.25)])
def test_robust_means_move_what_the_mean_moves(rule):
    half = 7 / 8 * 4 * LARGE
    assert sorted(wire(rule, 8)) == [("all-gather", half), ("all-to-all", half)]
    assert wire(lsgd.average(), 8) == [("all-reduce", 2 * half)]


def test_a_sharded_outer_state_moves_what_the_mean_moves():
    made = setter(lsgd.shard(lsgd.outer(optax.adam(0.1)), 8))
    cluster = lsgd.on_mesh(made, mesh(worker=8))
    state = cluster.init({"params": jnp.zeros(LARGE)})
    plain = lsgd.on_mesh(setter(lsgd.outer(optax.adam(0.1))), mesh(worker=8))
    assert cluster.sent(state) == plain.sent(plain.init({"params": jnp.zeros(LARGE)}))
    moments = [x for x in jax.tree.leaves(state.own) if x.ndim == 2]
    assert [x.shape for x in moments] == [(8, LARGE // 8)] * 3
    assert all(x.sharding.shard_shape(x.shape)[0] == 1 for x in moments)


# Robust means, and the guard.


@each_weight
def test_medians(given):
    seen, _ = agree(lsgd.median(), values(), given)
    for i, x in enumerate(values()):
        expected = np.median(x[shares(given, i) > 0], axis=0)
        np.testing.assert_allclose(seen[i], np.tile(expected, (K, 1)), atol=1e-6)


@pytest.mark.parametrize("workers, fraction", [(4, 0.25), (5, 0.4), (3, 0.0), (5, 0.1)])
def test_trimmed_means(workers, fraction):
    x = values(2, workers)
    seen, _ = agree(lsgd.trimmed_mean(fraction), x)
    drop = int(fraction * workers + 1e-9)
    kept = np.sort(x, axis=1)[:, drop : workers - drop]
    np.testing.assert_allclose(seen[:, 0], kept.mean(axis=1), atol=1e-6)


def test_a_few_cannot_move_a_median():
    x = values(1, 5)
    x[0, 3:] = [[1e9], [-1e9]] * np.ones((2, N))
    for rule in (lsgd.median(), lsgd.trimmed_mean(0.2)):
        seen, _ = agree(rule, x)
        inner = x[0, :3]
        assert (inner.min(0) - 1e-6 <= seen[0][0]).all()
        assert (seen[0][0] <= inner.max(0) + 1e-6).all()


def left_out(state):
    return state.agreed["params"].notes.numbers["left_out"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("rule", [lsgd.average(), lsgd.outer(optax.sgd(1.0))])
def test_a_guard_leaves_out_what_is_not_finite(bad, rule):
    x = values(2)
    x[1, 2, 5:8] = bad
    seen, state = agree(lsgd.guard(rule), x)
    np.testing.assert_allclose(seen[0][0], x[0].mean(0), atol=1e-6)
    expected = np.delete(x[1], 2, axis=0).mean(0)
    np.testing.assert_allclose(seen[1], np.tile(expected, (K, 1)), atol=1e-6)
    assert int(left_out(state)) == 1


def test_a_guard_leaves_out_who_goes_too_far():
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(size=(12, 1, N)), axis=0) + 0.1 * rng.normal(
        size=(12, K, N)
    )
    x[9, 1] += 1000
    seen, state = agree(lsgd.guard(lsgd.average(), threshold=6, warm_up=4), x)
    for i in range(12):
        who = [0, 2, 3] if i == 9 else [0, 1, 2, 3]
        np.testing.assert_allclose(seen[i][0], x[i, who].mean(0), atol=1e-4)
    assert int(left_out(state)) == 1
    loose, state = agree(lsgd.guard(lsgd.average(), threshold=1e4, warm_up=4), x)
    np.testing.assert_allclose(loose[9][0], x[9].mean(0), rtol=1e-4)
    assert int(left_out(state)) == 0


def test_when_all_have_gone_astray_they_go_back_to_the_anchor():
    x = values(3)
    x[1] = np.nan
    seen, state = agree(lsgd.guard(lsgd.diloco()), x)
    np.testing.assert_array_equal(seen[1], seen[0])
    assert np.isfinite(seen[2]).all()
    assert int(left_out(state)) == K


def test_workers_left_out_by_weight_are_not_counted():
    _, state = agree(lsgd.guard(lsgd.average()), values(), WEIGHTS)
    assert int(left_out(state)) == 0


# Gossip.


@pytest.mark.parametrize("graph", neighbours.GRAPHS)
@pytest.mark.parametrize("workers", [1, 2, 3, 6, 8])
def test_mixing_is_doubly_stochastic_and_what_happens(graph, workers):
    x = values(4, workers)
    place = {8: lambda made: lsgd.on_mesh(made, mesh(worker=4), workers=8)}
    seen, _ = agree(lsgd.gossip(graph), x, place=place.get(workers))
    for i in range(4):
        matrix = neighbours.mixing(graph, workers, i + 1)
        assert (matrix >= 0).all()
        np.testing.assert_allclose(matrix.sum(0), 1)
        np.testing.assert_allclose(matrix.sum(1), 1)
        np.testing.assert_allclose(seen[i], matrix @ x[i], atol=1e-6)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
@pytest.mark.parametrize("by", range(-1, 9))
def test_a_shift_crosses_lanes_and_devices(lanes, by):
    from localsgd_jax import collectives

    def apply(tree, state, context):
        return collectives.shift(tree, by, context), state

    rule = lsgd.SyncRule(lambda tree: lsgd.RuleState(), apply)
    x = values(1, 8)
    place = lambda made: lsgd.on_mesh(made, mesh(worker=8 // lanes), 8)  # noqa: E731
    seen, _ = agree(rule, x, place=place)
    np.testing.assert_array_equal(seen[0], np.roll(x[0], by, axis=0).astype("f4"))


def test_one_peer_graphs_reach_consensus_and_rings_approach_it():
    x = values(1, 8)[0]

    def repeat(graph, times):
        made = lsgd.from_train_step(lambda s, b: (s, {}), lsgd.gossip(graph))
        cluster = lsgd.simulate(made, 8)
        state = cluster.init({"params": jnp.zeros(N)})
        state = state._replace(workers={"params": jnp.asarray(x, jnp.float32)})
        for _ in range(times):
            state = cluster.sync(state)
        params = np.asarray(state.workers["params"])
        np.testing.assert_allclose(params.mean(0), x.mean(0), atol=1e-6)
        return np.sqrt(((params - params.mean(0)) ** 2).sum())

    start = np.sqrt(((x - x.mean(0)) ** 2).sum())
    assert repeat("one-peer", 3) < 1e-5 * start
    gap = np.sort(np.abs(np.linalg.eigvals(neighbours.mixing("ring", 8))))[-2]
    for times in (1, 10):
        assert repeat("ring", times) <= gap**times * start * 1.001


def test_gossip_goes_around_who_is_absent():
    x = values(1, 4)
    x[0, 2] = np.nan
    seen, _ = agree(lsgd.gossip("ring"), x, [np.array([1, 1, 0, 1])])
    x = x[0]
    np.testing.assert_allclose(seen[0][0], (x[0] + x[1] + x[3]) / 3, atol=1e-6)
    np.testing.assert_allclose(seen[0][1], (2 * x[1] + x[0]) / 3, atol=1e-6)
    assert np.isnan(seen[0][2]).all()


@pytest.mark.parametrize(
    "rule",
    [
        lsgd.median(),
        lsgd.trimmed_mean(0.25),
        lsgd.shard(lsgd.average(), K),
        lsgd.gossip("ring"),
        lsgd.gossip("one-peer"),
        lsgd.topk(lsgd.average(), 1.0),
        lsgd.cast(lsgd.average(), jnp.bfloat16),
    ],
)
def test_what_is_agreed_on_already_stays(rule):
    """Also where the program sees that all workers have the same."""
    x = np.round(values(2) * 4)  # Whole numbers, which bfloat16 holds too.
    expected = np.tile(x.mean(1, keepdims=True), (1, K, 1))
    for place in (None, lambda made: lsgd.on_mesh(made, mesh(worker=2), K)):
        seen, _ = agree(lsgd.chain(lsgd.average(), rule), x, place=place)
        np.testing.assert_allclose(seen, expected, atol=1e-6)


# Flat vectors.


def test_many_dtypes_are_flattened_apart():
    tree = {
        "a": jnp.zeros((2, 3), jnp.bfloat16),
        "b": jnp.zeros(4),
        "c": jnp.zeros((), jnp.bfloat16),
    }
    rng = np.random.default_rng(0)
    x = jax.tree.map(
        lambda v: jnp.asarray(rng.normal(size=(K, *v.shape)), v.dtype), tree
    )
    results = []
    for rule in (lsgd.diloco(), lsgd.flatten(lsgd.diloco())):
        cluster = lsgd.simulate(setter(rule), K)
        state, _ = cluster.step(cluster.init({"params": tree}), x)
        results.append(cluster.sync(state).workers["params"])
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for left, right in zip(*map(jax.tree.leaves, results), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


# Bad input.


def start(rule, tree=None, workers=K):
    tree = {"w": jnp.zeros(3)} if tree is None else tree
    cluster = lsgd.simulate(setter(rule), workers)
    return cluster.sync(cluster.init({"params": tree}))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: lsgd.outer(0.7), TypeError, r"outer\(optimizer\): .* got 0.7"),
        (
            lambda: lsgd.outer(optax.sgd(1.0), 3),
            TypeError,
            r"outer\(reduce\): .* got 3",
        ),
        (
            lambda: lsgd.diloco(float("nan")),
            ValueError,
            r"diloco\(learning_rate\): it must be finite, got nan",
        ),
        (
            lambda: lsgd.slowmo(float("inf")),
            ValueError,
            r"slowmo\(learning_rate\): it must be finite, got inf",
        ),
        (
            lambda: start(lsgd.outer(optax.sgd(1.0), lsgd.keep())),
            ValueError,
            "RuleState.agreed must be computed from reduced values",
        ),
        (
            lambda: start(lsgd.outer(optax.sgd(1.0), "pod")),
            ValueError,
            r"rule\(axis='pod'\): the workers live on the axes",
        ),
        (
            lambda: start(lsgd.diloco(), {"n": jnp.arange(3)}),
            TypeError,
            r"outer\(\): every leaf must be floating point.*int32 at \['n'\]",
        ),
        (
            lambda: lsgd.shard(lsgd.diloco(), 0),
            ValueError,
            r"shard\(workers\): the number of workers must be at least 1, got 0",
        ),
        (
            lambda: start(lsgd.shard(lsgd.diloco(), 3)),
            ValueError,
            r"rows of the rule's own state.*must be the 4 workers, got shape \(3, 1\)",
        ),
        (
            lambda: lsgd.elastic(alpha=1.5),
            ValueError,
            r"elastic\(alpha\): it must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: lsgd.mix(lsgd.average(), -0.1),
            ValueError,
            r"mix\(alpha\): it must be in \[0, 1\], got -0.1",
        ),
        (
            lambda: lsgd.fragment(lsgd.average(), 0),
            ValueError,
            r"fragment\(n\): the number of fragments must be at least 1, got 0",
        ),
        (
            lambda: start(lsgd.fragment(lsgd.average(), 3)),
            ValueError,
            r"fragment\(n\): there must be something for each of the 3 fragments, but "
            r"the 1 leaves leave \[1, 2\] empty",
        ),
        (
            lambda: lsgd.fragment(lsgd.average(), 2, by="size"),
            ValueError,
            r"fragment\(by\): .* got 'size'",
        ),
        (
            lambda: start(lsgd.fragment(lsgd.average(), 2, by=lambda name: 2)),
            ValueError,
            r"fragment\(by\): it must give one of the 2 fragments 0 to 1, got 2 for",
        ),
        (
            lambda: lsgd.spread(3, 4),
            ValueError,
            r"spread\(h, n\): n must be at most h, got n = 4 and h = 3",
        ),
        (
            lambda: lsgd.early(lsgd.spread(10, 4), 2),
            ValueError,
            r"early\(schedule, tau\): tau must be smaller than the 2 steps between two "
            r"indices of spread\(10, 4\), got 2",
        ),
        (
            lambda: lsgd.late(lsgd.every(6), 0),
            ValueError,
            r"late\(tau\): tau must be at least 1, got 0",
        ),
        (
            lambda: lsgd.late(6, 1),
            TypeError,
            r"late\(schedule\): a schedule is needed, got 6",
        ),
        (
            lambda: lsgd.quantize(lsgd.average(), 3),
            ValueError,
            r"quantize\(bits\): it must be one of \(8, 4, 2, 1\), got 3",
        ),
        (
            lambda: lsgd.quantize(lsgd.diloco(), 4),
            ValueError,
            r"quantize\(rule\): it must be a plain mean such as average\(\)",
        ),
        (
            lambda: lsgd.quantize(lsgd.average(), 4, rounding="up"),
            ValueError,
            r"quantize\(rounding\): .* got 'up'",
        ),
        (
            lambda: lsgd.quantize(lsgd.average(), 4, block=12),
            ValueError,
            r"quantize\(block\): it must be a multiple of 8, got 12",
        ),
        (
            lambda: lsgd.cast(lsgd.average(), jnp.float32),
            ValueError,
            r"cast\(dtype\): .* got float32",
        ),
        (
            lambda: lsgd.topk(lsgd.average(), 0.0),
            ValueError,
            r"topk\(fraction\): it must be in \(0, 1\], got 0.0",
        ),
        (
            lambda: lsgd.topk(lsgd.average(), 1.5),
            ValueError,
            r"topk\(fraction\): it must be in \(0, 1\], got 1.5",
        ),
        (
            lambda: lsgd.trimmed_mean(0.5),
            ValueError,
            r"trimmed_mean\(fraction\): it must be in \[0, 0.5\), got 0.5",
        ),
        (
            lambda: lsgd.guard(lsgd.average(), threshold=0),
            ValueError,
            r"guard\(threshold\): it must be positive, got 0",
        ),
        (
            lambda: lsgd.guard(lsgd.average(), decay=1),
            ValueError,
            r"guard\(decay\): it must be in \[0, 1\), got 1",
        ),
        (
            lambda: lsgd.ema(lsgd.average(), 1.0),
            ValueError,
            r"ema\(decay\): it must be in \[0, 1\), got 1.0",
        ),
        (lambda: lsgd.gossip("star"), ValueError, r"gossip\(graph\): .* got 'star'"),
        (lambda: lsgd.overlap(lsgd.average), TypeError, r"overlap\(rule\): a SyncRule"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
