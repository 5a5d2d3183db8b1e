"""Decoupled jobs on a virtual clock, and the pure syncer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.decoupled_jobs import (
    BATCH,
    EVERY,
    algorithm,
    data,
    full_loss,
    initial_params,
    make_job,
)

import localsgd_jax as lsgd
from localsgd_jax import asynchronous, decoupled
from localsgd_jax.decoupled import Contribution, Failure, Join, Leave, Request, Tick
from localsgd_jax.decoupled.learner import (
    Answer,
    Receive,
    Send,
    learner_program,
    make_learner_functions,
)
from localsgd_jax.decoupled.syncer_host import SyncerHost

POLICIES = {
    "immediate": decoupled.immediate(),
    "weighted": decoupled.immediate(
        asynchronous.server_optimizer(
            optax.sgd(0.7), asynchronous.polynomial_weighting()
        )
    ),
    "nesterov": decoupled.immediate(asynchronous.delayed_nesterov(0.5, buffer=4)),
    "quorum": decoupled.quorum(2, grace=1.0),
}
CODECS = {
    "full": decoupled.full_precision(),
    "bfloat16": decoupled.floats(),
    "8 bits": decoupled.integers(8, 8),
    "4 bits": decoupled.integers(4, 8),
    "2 bits": decoupled.integers(2, 8),
    "top-k": decoupled.largest(0.5, chunk=8),
}


def assert_equal_bits(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def learning_rows(rounds, workers):
    """Returns batches `(T, K, B, ...)` in the order in which rounds are leased."""
    stream = lsgd.shuffled_batches(data(), 1, BATCH)
    rows = [next(stream) for _ in range(rounds * workers * EVERY)]

    def arrange(*leaves):
        stacked = np.stack(leaves)[:, 0]
        shape = (rounds, workers, EVERY, *stacked.shape[1:])
        swapped = np.swapaxes(stacked.reshape(shape), 1, 2)
        return swapped.reshape(rounds * EVERY, workers, *stacked.shape[1:])

    return jax.tree.map(arrange, *rows)


def test_equal_speeds_reproduce_the_virtual_clock_of_asynchronous():
    rounds, workers = 5, 4
    events = asynchronous.simulate_events(workers, rounds * EVERY, EVERY)
    cluster = asynchronous.simulate(algorithm(), events)
    state, _ = cluster.run(
        cluster.init(initial_params()), learning_rows(rounds, workers)
    )
    job = make_job(steps=rounds * workers * EVERY)
    params, history = decoupled.simulate(job, decoupled.Clock(workers))
    assert_equal_bits(params, state.aggregate)
    assert history["staleness"].max() == workers - 1


def advance(program, answer):
    """Returns the event that a learner sends after an answer."""
    effect = program.send(answer)
    while not isinstance(effect, Receive):
        event = effect.event if isinstance(effect, Send) else None
        effect = program.send(None)
    return event


@pytest.mark.full
def test_threads_and_syncer_have_equal_bits_in_one_order():
    """All batches are equal, so that the order of the updates defines the result."""
    workers, batch = 3, jax.tree.map(lambda x: x[None, :BATCH], data())
    cluster = asynchronous.on_threads(algorithm(), jax.devices()[:workers])
    rows = [jax.tree.map(lambda x: np.repeat(x, workers, 0), batch)] * (5 * EVERY)
    state, history = cluster.run(
        cluster.init(initial_params()),
        rows,
        schedule=EVERY,
        delay_fn=lambda k, _: k / 50,
    )
    job = make_job(batches=lambda learner, start: itertools.repeat(batch))
    host = SyncerHost(decoupled.make_syncer(job))
    functions = make_learner_functions(job)
    programs = [learner_program(functions, k, k) for k in range(workers)]
    answers: list = [None] * workers
    for k in [*range(workers), *history["worker"]]:
        event = advance(programs[k], answers[k])
        (reply,) = host.apply(event)
        answers[k] = Answer(reply, host.model())
    assert len(history["worker"]) == host.state.version == 5 * workers
    names = {"['b']": "b", "['w']": "w"}
    model = {names[path]: leaf for path, leaf in host.model().items()}
    assert_equal_bits(model, state.aggregate)


@pytest.mark.parametrize("name", POLICIES)
def test_replay_and_recomputation_have_equal_bits(name):
    job, log = make_job(merge=POLICIES[name]), []
    clock = decoupled.Clock(4, [1, 1.1, 0.9, 0.25], delay=0.5)
    params, history = decoupled.simulate(job, clock, log=log)
    repeated, again = decoupled.replay(job, log)
    assert_equal_bits(params, repeated)
    assert_equal_bits(history, again)
    assert history["steps"][-1] == 160
    assert full_loss(params) < 0.62


def test_local_steps_are_repeated_with_equal_bits():
    job, log = make_job(merge=decoupled.quorum(2, 1.0), fragments=2), []
    decoupled.simulate(job, decoupled.Clock(3, [1, 1.3, 0.7], delay=0.1), log=log)
    recomputed = decoupled.recompute(job, log)
    assert recomputed.equal == 2 * 160 // EVERY and not recomputed.different
    by_fragment = sorted(log, key=lambda item: item[0])  # as from `read_log`
    assert decoupled.recompute(job, by_fragment) == recomputed


def test_an_event_that_was_sent_once_more_is_repeated_once():
    """As after a syncer was killed between an event and its reply."""
    job, log = make_job(merge=decoupled.immediate()), []
    decoupled.simulate(job, decoupled.Clock(3, [1, 1.3, 0.7], delay=0.1), log=log)
    first = [isinstance(event, decoupled.Contribution) for _, event in log].index(True)
    repeated = [*log[: first + 1], *log[first:]]
    assert decoupled.recompute(job, repeated) == decoupled.recompute(job, log)


def test_local_steps_are_not_repeated_without_the_events_before():
    job, log = make_job(merge=decoupled.quorum(2, 1.0), fragments=2), []
    decoupled.simulate(job, decoupled.Clock(3, delay=0.1), log=log)
    with pytest.raises(ValueError, match=r"recompute\(log\): every event must follow"):
        decoupled.recompute(job, [item for item in log if item[0] == 1])


@pytest.mark.parametrize("name", CODECS)
def test_codecs_with_error_feedback_converge(name):
    job = make_job(steps=800, merge=decoupled.quorum(3), compress=CODECS[name])
    params, history = decoupled.simulate(job, decoupled.Clock(4, [1, 1, 1, 0.4]))
    assert full_loss(params) < 0.55
    payload = history["bytes_received"][0] / history["learners"][0].sum()
    full = 4 * 21
    sizes = {"full": full, "bfloat16": 42, "8 bits": 36, "4 bits": 24, "2 bits": 18}
    assert payload == sizes.get(name, 3 * 4 * 6)


@pytest.mark.parametrize("overlap, fragments", [(2, 1), (4, 1), (2, 2), (0, 2)])
def test_overlap_and_fragments_converge_and_count_each_step_once(overlap, fragments):
    job = make_job(
        steps=400, merge=decoupled.quorum(2), overlap=overlap, fragments=fragments
    )
    clock = decoupled.Clock(3, [1, 1.2, 0.8], delay=0.7)
    params, history = decoupled.simulate(job, clock)
    assert full_loss(params) < 0.6
    for fragment in range(fragments):
        rows = history["fragment"] == fragment
        assert history["steps"][rows][-1] == 400 // fragments


def test_overlap_hides_the_delay():
    ends = [
        decoupled.simulate(make_job(overlap=overlap), decoupled.Clock(2, delay=1.0))[1][
            "seconds"
        ][-1]
        for overlap in (0, 2)
    ]
    assert ends[1] < 0.75 * ends[0]


@pytest.mark.full
def test_two_exchanges_in_flight_hide_more_of_the_delay():
    ends = []
    for exchanges in (1, 2):
        changes = {"overlap": 2, "fragments": 2, "exchanges": exchanges}
        merge = decoupled.quorum(2, grace=1.0)
        job, log = make_job(steps=400, merge=merge, **changes), []
        params, history = decoupled.simulate(
            job, decoupled.Clock(2, delay=3.0), log=log
        )
        assert full_loss(params) < 0.6
        last = history["steps"][history["fragment"] == 1][-1]
        assert history["steps"][history["fragment"] == 0][-1] == last == 200
        recomputed = decoupled.recompute(job, log)
        assert recomputed.equal == 200 and not recomputed.different
        ends.append(history["seconds"][-1])
    assert ends[1] < 0.75 * ends[0]


def test_slow_learner_costs_less_than_a_tenth_of_the_throughput():
    """Throughput over that of learners that never wait."""

    def throughput(merge):
        clock = decoupled.Clock(4, [1, 1, 1, 0.25])
        _, history = decoupled.simulate(make_job(steps=800, merge=merge), clock)
        return history["steps"][-1] / history["seconds"][-1] / 3.25

    assert throughput(decoupled.quorum(3, grace=1.0)) > 0.9
    assert throughput(decoupled.immediate()) > 0.95
    assert throughput(decoupled.quorum(4)) < 0.4  # Lockstep.


def test_failed_learner_returns_and_no_batch_is_lost():
    seen = []

    def batches(learner, start):
        for index in itertools.count(start):
            seen.append((learner, index))
            yield tuple(x[None, index % 64 * 8 : index % 64 * 8 + 8] for x in data())

    failures = [Failure(1, 10.5, recovery=8.0, detection=2.0), Failure(2, 21.0)]
    job = make_job(steps=200, batches=batches, merge=decoupled.quorum(2, grace=1.0))
    clock = decoupled.Clock(3, start=[0, 0, 3.0], failures=failures)
    _, history = decoupled.simulate(job, clock)
    assert {index for _, index in seen} == set(range(200))
    assert history["steps"][-1] == 200 and history["reissued"][-1] == 2
    times = history["seconds"][history["learners"][:, 1]]
    assert times[0] < 10.5 and times[-1] > 18.5
    assert history["seconds"][history["learners"][:, 2]].max() <= 21.0


def test_learners_that_are_all_lost_raise():
    clock = decoupled.Clock(2, failures=[Failure(0, 5.0), Failure(1, 6.0)])
    with pytest.raises(RuntimeError, match="every learner was lost"):
        decoupled.simulate(make_job(), clock)


def contribution(time, learner, number, value, session=1, version=0, examples=8):
    payload = np.full(21, value, np.float32)
    return Contribution(
        time, learner, session, number, version, payload, 4, examples, examples, {}
    )


def run_events(job, *events):
    """Returns the final state and the replies to each event."""
    syncer = decoupled.make_syncer(job)
    state, replies = syncer.init(), []
    for event in events:
        state, output = syncer.step(state, event)
        replies.append([(r.learner, r.kind) for r in output.replies])
    return state, replies


def test_quorum_waits_for_predicted_arrivals_only():
    job = make_job(merge=decoupled.quorum(2, grace=1.0), steps=10_000)
    joins = [Join(0.0, k, 1) for k in range(3)]
    first = [contribution(1.0, 0, 1, 1.0), contribution(1.0, 1, 1, 1.0)]
    late = [contribution(1.6, 2, 1, 1.0)]
    second = [contribution(2.0, 0, 2, 1.0), contribution(2.0, 1, 2, 1.0)]
    state, replies = run_events(job, *joins, *first, *late, *second)
    # Learner 2 is pending with the two others, so that nothing is expected any more.
    assert replies[4] == [(0, "model"), (1, "model")] and replies[5] == []
    assert replies[6] == [(2, "model"), (0, "model")] and state.version == 2
    # The quorum is not reached, and the others are late by the grace window.
    assert state.deadline == pytest.approx(2.0 + 1.6 + 1.0)
    state, replies = run_events(job, *joins, *first, *late, *second, Tick(4.6))
    assert state.version == 3 and replies[-1] == [(1, "model")]


def test_quorum_opens_a_window_of_the_predicted_length():
    job = make_job(merge=decoupled.quorum(1, grace=1.0), steps=10_000)
    events = [Join(0.0, 0, 1), Join(0.0, 1, 1)]
    events += [contribution(1.0, 0, 1, 1.0), contribution(1.5, 1, 1, 1.0)]
    events += [Tick(2.0), contribution(2.9, 0, 2, 1.0)]
    state, replies = run_events(job, *events)
    assert replies[-1] == [] and state.deadline == pytest.approx(3.5)
    state, replies = run_events(job, *events, Tick(3.5))
    assert replies[-1] == [(0, "model")] and state.version == 3


def test_quorum_does_not_wait_for_a_learner_that_compiles():
    """Nor does its first round change the prediction of the others."""
    job = make_job(merge=decoupled.quorum(3, grace=1.0), steps=10_000)
    joins = [Join(0.0, k, 1) for k in range(2)]
    first = [contribution(1.0, 0, 1, 1.0), contribution(1.0, 1, 1, 1.0)]
    state, _ = run_events(job, *joins, *first, Join(1.0, 2, 1))
    assert state.version == 1
    events = [contribution(2.0, 0, 2, 1.0), contribution(2.0, 1, 2, 1.0)]
    state, _ = run_events(job, *joins, *first, Join(1.0, 2, 1), *events)
    assert state.deadline == pytest.approx(1.0 + 2 * 1.0 + 1.0)
    slow = [contribution(50.0, 2, 1, 1.0), Tick(60.0), contribution(61.0, 2, 2, 1.0)]
    state, _ = run_events(job, *joins, Join(1.0, 2, 1), *first, *events, *slow)
    assert state.members[2].interval == pytest.approx(1.0)


def test_means_are_weighted_by_examples():
    job = make_job(merge=decoupled.quorum(2))
    events = [Join(0.0, 0, 1), Join(0.0, 1, 1), contribution(1.0, 0, 1, 1.0)]
    state, _ = run_events(job, *events, contribution(1.0, 1, 1, 4.0, examples=16))
    assert float(state.params["['b']"]) == pytest.approx((8 * 1 + 16 * 4) / 24)
    job = make_job(merge=decoupled.quorum(2, weight=decoupled.by_token_rate))
    state, _ = run_events(job, *events, contribution(1.0, 1, 1, 4.0, examples=16))
    assert float(state.params["['b']"]) == pytest.approx((64 * 1 + 256 * 4) / 320)


def test_contribution_is_counted_once():
    job = make_job(merge=decoupled.immediate(workers=1))
    events = [Join(0.0, 0, 1), contribution(1.0, 0, 1, 2.0)]
    state, replies = run_events(job, *events, contribution(1.1, 0, 1, 2.0))
    assert float(state.params["['b']"]) == 2.0 and state.totals.duplicates == 1
    assert replies[-1] == [(0, "model")] and state.totals.steps == 4


def test_update_that_is_not_finite_is_left_out():
    job = make_job(merge=decoupled.immediate(workers=1))
    events = [Join(0.0, 0, 1), contribution(1.0, 0, 1, np.nan)]
    state, replies = run_events(job, *events)
    assert replies[-1] == [(0, "rejoin")] and state.totals.not_finite == 1
    assert state.version == 0 and float(state.params["['b']"]) == 0.0


def test_learner_that_was_removed_must_join_again():
    job = make_job()
    events = [Join(0.0, 0, 1), Leave(1.0, 0), contribution(1.0, 0, 1, 2.0)]
    state, replies = run_events(job, *events)
    assert replies[-1] == [(0, "rejoin")] and state.totals.rejected == 1
    assert state.leases.returned == (0,)


def test_idle_learner_gets_the_round_of_a_lost_one():
    job = make_job(steps=2 * EVERY)
    joins = [Join(0.0, k, 1) for k in range(2)]
    events = [*joins, contribution(1.0, 0, 1, 1.0), Request(1.0, 0, 1)]
    _, replies = run_events(job, *events, Leave(2.0, 1))
    assert replies[-2:] == [[], [(0, "rejoin")]]
    _, replies = run_events(job, *events, contribution(2.0, 1, 1, 1.0))
    assert replies[-1] == [(1, "done"), (0, "done")] or (0, "done") in replies[-1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"every": 0}, r"Job\(every\)"),
        ({"fragments": 3}, r"Job\(fragments\): it must divide every = 4"),
        ({"fragments": 4}, r"at most the 2 leaves"),
        ({"overlap": 5}, r"Job\(overlap\)"),
        ({"overlap": 2, "exchanges": 2}, r"Job\(exchanges\)"),
        ({"params": {"w": jnp.zeros(3, int)}}, r"must be floating point"),
        ({"field": "weights"}, r"Job\(field\): it must be one of params"),
        ({"merge": "immediate"}, r"Job\(merge\)"),
        ({"batches": None}, r"Job\(batches\)"),
        ({"outer": 0.7}, r"Job\(outer\)"),
    ],
)
def test_invalid_arguments_raise(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_job(**changes)


def test_cluster_of_two_workers_is_one_learner():
    def batches(learner, start):
        return lsgd.shuffled_batches(data(), 2, BATCH, examples_seen=start * 2 * BATCH)

    def on_two_devices(algorithm):
        return lsgd.on_mesh(algorithm, lsgd.worker_mesh(2), 2)

    job = make_job(batches=batches, cluster=on_two_devices, merge=decoupled.quorum(1))
    params, history = decoupled.simulate(job, decoupled.Clock(2))
    assert full_loss(params) < 0.62 and history["steps"][-1] == 160


WRONG_RESULTS = {
    "batches": (lambda learner, start: 3, "its result must be an iterable, got 3"),
    "rows": (
        lambda learner, start: itertools.repeat((np.ones((4, 3)), np.ones(4))),
        "leading axis of every leaf must be the 1 workers, got shape",
    ),
    "tokens": (lambda batch: np.nan, r"the count must be in \[0, "),
    "cluster": (lambda algorithm: None, "its result must be a Cluster, got None"),
}


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_wrong_results_of_the_functions_of_a_job_raise(name):
    function, message = WRONG_RESULTS[name]
    argument = "batches" if name == "rows" else name
    job = make_job(**{argument: function})
    with pytest.raises(
        (TypeError, ValueError), match=rf"Job\({argument}\): .*{message}"
    ):
        decoupled.simulate(job, decoupled.Clock(1))
