"""Round numbers with a static residue: arithmetic, and the rules traced with them."""

import operator

import jax
import jax.numpy as jnp
import pytest
from harness.cases import (
    RULES,
    algorithm,
    assert_close,
    batches,
    cluster,
    network,
)
from harness.selection import in_full
from hypothesis import given, settings
from hypothesis import strategies as st

import localsgd_jax as lsgd
from localsgd_jax.execution.cyclic_round import Cycle, PeriodTooShort, RoundClass
from localsgd_jax.execution.rounds import sync_in_class

OPERATIONS = [
    (operator.add, st.integers(-5, 5)),
    (operator.sub, st.integers(-5, 5)),
    (operator.mul, st.integers(1, 4)),
    (operator.floordiv, st.integers(1, 4)),
]
COMPARISONS = (
    *(operator.lt, operator.le, operator.gt),
    *(operator.ge, operator.eq, operator.ne),
)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 100), st.data())
def test_arithmetic_matches_integers(number, data):
    period = data.draw(st.sampled_from([1, 12, 144]))
    cyclic = RoundClass(period, number % period).number(jnp.int32(number))
    exact = number
    try:
        for operation, operands in data.draw(st.lists(st.sampled_from(OPERATIONS))):
            operand = data.draw(operands)
            cyclic, exact = operation(cyclic, operand), operation(exact, operand)
        divisor = data.draw(st.integers(1, 4))
        assert (cyclic % divisor, type(cyclic % divisor)) == (exact % divisor, int)
        assert divmod(cyclic, divisor)[1] == exact % divisor
        for compare in COMPARISONS:
            other = data.draw(st.integers(-10, 100))
            assert bool(compare(cyclic, other)) == compare(exact, other)
    except PeriodTooShort as error:
        assert error.factor > 1
    assert int(jnp.asarray(cyclic)) == exact and cyclic.minimum <= exact
    assert (exact - cyclic.residue) % cyclic.period == 0


def test_only_what_the_residue_decides_is_static():
    number = RoundClass(6, 4).number(jnp.int32(10))
    assert number > 0 and not number < 0 and not number == 9
    for undecided in (number > 3, number == 10, number <= 4, 0.5 * number):
        assert isinstance(undecided, jax.Array)
    with pytest.raises(PeriodTooShort) as caught:
        _ = number % 4
    assert caught.value.factor == 2
    with pytest.raises(TypeError):
        _ = number in frozenset([10])


STREAMING = lsgd.fragment(
    lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5), 3, rounds_per_fragment=2
)


def lowered_cycle(cluster, state):
    """Returns the lowered synchronisation of each class of rounds of a cluster."""

    def lower(round_class):
        synced = jax.jit(lambda state: sync_in_class(cluster, round_class, state))
        return synced.lower(state).as_text()

    return Cycle(lower)


@pytest.mark.parametrize(
    "rule, period, programs",
    [
        (lsgd.diloco(), 1, 1),
        (STREAMING, 6, 6),
        (lsgd.gossip("one-peer"), 3, 3),
        (lsgd.when(lsgd.every(4), lsgd.average()), 4, 2),
        in_full(lsgd.chain(STREAMING, lsgd.when(lsgd.every(4), STREAMING)), 12, None),
        in_full(lsgd.when(lsgd.every(65), lsgd.average()), None, 0),
        in_full(lsgd.when(lsgd.at_steps([2]), lsgd.average()), None, 0),
    ],
    ids=str,
)
def test_period_is_found_and_leaves_no_conditional(rule, period, programs):
    tested = lsgd.on_mesh(algorithm(rule), jax.make_mesh((8,), ("worker",)))
    cycle = lowered_cycle(tested, tested.init(network()))
    texts = [cycle(number) for number in range(1, 2 * (period or 1) + 1)]
    assert cycle.period == period
    texts = [text for text in texts[(period or 1) :] if text]
    assert programs in (None, len(set(texts)))
    for text in texts:
        assert "stablehlo.case" not in text and "stablehlo.if" not in text


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("average", "delay", "fragment", "gossip_one_peer")
        else in_full(name)
        for name in RULES
    ],
)
def test_rounds_of_a_class_match_traced_rounds(name):
    tested = cluster("lanes", name)
    expected = state = tested.init(network())
    cycle = lowered_cycle(tested, state)
    for number, batch in enumerate(batches(5), start=1):
        cycle(number)
        round_class = cycle.period and RoundClass(cycle.period, number % cycle.period)
        expected = tested.sync(tested.step(expected, batch)[0])
        state = sync_in_class(tested, round_class or None, tested.step(state, batch)[0])
    assert_close(state, expected)


def test_a_period_that_grows_keeps_earlier_results():
    calls = []

    def function(round_class):
        calls.append(round_class)
        number = round_class.number(jnp.int32(0))
        return number % (2 if round_class.residue % 2 else 6)

    cycle = Cycle(function)
    assert [cycle(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 1, 4, 1]
    assert cycle.period == 6
    assert [cycle(n) for n in range(6, 18)] == [0, 1, 2, 1, 4, 1] * 2
    assert len(calls) == len(set(calls))
