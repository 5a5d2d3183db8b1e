"""Training loop: dispatches rounds, records metrics, evaluates and saves."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import jax
import numpy as np

from localsgd_jax.core import validation
from localsgd_jax.core.metrics import rule_metrics
from localsgd_jax.core.types import Cluster, PyTree, State
from localsgd_jax.data.iterator_state import state_reader
from localsgd_jax.data.prefetch import SynchronizedPrefetcher
from localsgd_jax.execution.ambient_mesh import in_mesh_of_state
from localsgd_jax.execution.local_workers import local_workers
from localsgd_jax.training.byte_counter import ByteCounter
from localsgd_jax.training.callbacks import Callbacks
from localsgd_jax.training.consistency import assert_equal_runs
from localsgd_jax.training.dispatch import ResultQueue, dispatcher_of
from localsgd_jax.training.evaluation import Evaluator
from localsgd_jax.training.history import History, HistoryRecorder
from localsgd_jax.training.outputs import RunOutputs
from localsgd_jax.training.progress import progress_bar
from localsgd_jax.training.round_weights import RoundWeights, Weights
from localsgd_jax.training.run_context import (
    RunContext,
    RunSettings,
    context_of,
    train_schedule,
)
from localsgd_jax.training.saving import Saver
from localsgd_jax.training.segments import segments
from localsgd_jax.training.weight_check import WeightCheck


@in_mesh_of_state
def train(
    cluster: Cluster,
    state: State,
    batches: Iterable[PyTree],
    *,
    schedule: int | Callable,
    steps: int | None = None,
    weights: Weights = None,
    evaluate: Callable | None = None,
    evaluate_every: int = 1,
    eval_fields: str | Sequence[str] | None = "params",
    on_round_end: Callable | None = None,
    save: Callable | None = None,
    save_every: int = 1000,
    progress: bool | None = None,
    max_steps_per_dispatch: int = 64,
) -> tuple[State, History]:
    """Trains until the batches or the steps end, and synchronises at the end.

    Rounds of equal length run several in one dispatch. A round longer than
    `max_steps_per_dispatch` is several dispatches; the last of them has so many steps
    and the synchronisation. On a mesh, rules that choose by the round number get a
    program for each position in their cycle. While the devices compute, the host reads,
    stacks and transfers the next batches; at most two dispatches are in flight. An
    incomplete last round is trained and synchronised. The given state is donated: use
    the returned one. The compiled programs are kept for the next call with the same
    cluster, such as that of the next epoch.

    Args:
      cluster: `simulate(...)` or `on_mesh(...)`.
      state: from `cluster.init`, or from an earlier run.
      batches: iterable of batches, leaves `(K, B, ...)`, such as
        `shuffled_batches(...)`. With several processes, all end with the process whose
        batches end first, as in `zip`.
      schedule: a period, or a schedule: a predicate on the number of local steps.
      steps: most local steps of this call; None for all batches.
      weights: weight of each worker in the means of a round: `(K,)`; a function from
        the number of the round, 1 for the first, to `(K,)`; the name of a metric, whose
        sum over the local steps of the round is the weight; or
        `weighted_by(metric, formula)`. None: the metric "tokens", or else "examples",
        if the training step has one, else equal weights. If a run is resumed within a
        round, the sum has the steps of this call only.
      evaluate: `evaluate(model)`, with the mean model; returns a number or a dict of
        numbers.
      evaluate_every: rounds with a multiple of this number are evaluated, and the last.
      eval_fields: fields of the train state that `evaluate` receives, as `field` of
        `consensus`, such as `("params", "batch_stats")`.
      on_round_end: `on_round_end(row)`, called with each row of the history, a dict, as
        soon as it is known.
      save: `save(state, examples)`, such as `RunCheckpointer.save`, with the number of
        examples used since the call of `train` began. Called when `state.step` is a
        multiple of `save_every`, also within a round, and at the end. It must copy the
        arrays that it keeps, because the state is donated to the next dispatch. If
        `batches` or its iterator has `get_state` and `set_state`, or `state_dict` and
        `load_state_dict`, and `save` takes `data_state`, it also receives the state of
        the iterator after the batch of the last step, and not after batches that were
        read in advance.
      save_every: number of local steps between two calls of `save`; with a multiple of
        the period, states are saved between rounds only.
      progress: whether to show a progress bar; None: if tqdm is installed.
      max_steps_per_dispatch: most local steps of one dispatch.

    Returns:
      The state, and the history: NumPy columns with an entry for each round.

      - "step" and "round": counters at its end;
      - "seconds": since this call began, compilation included;
      - "bytes": sent by each worker since this call began, as if it had its own network
        link, for evaluations of workers that differ, too;
      - "device_bytes": sent by each device since this call began, read from the
        compiled programs as `collective_ops` does; only on a mesh with several
        positions;
      - means over the round and the workers of each metric that is one number per
        worker, such as "loss";
      - metrics of rules, such as "dropped_workers" of `drop_outliers`;
      - values of `evaluate`, NaN for rounds that were not evaluated; one with the name
        of another column gets the prefix "evaluate.".

    Raises:
      NonFiniteLossError: if the metric "loss" of a worker is NaN or infinite; the error
        has the history up to there.
      CoordinationError: if the processes of a job have different arguments, programs or
        batch shapes, if the batches of another process raise, or if one does not
        respond in time.
      ValueError: if an argument is out of range, a batch does not have K rows, there is
        no metric of the name `weights`, a weight by a metric is negative or not finite,
        the schedule is not deterministic, a metric is complex or has the name of
        another column, or the state was donated.
      TypeError: if an argument has the wrong type, or batches differ in structure.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state = cluster.init(jnp.zeros(()))
      >>> batches = [jnp.array([1.0, 3.0])] * 5
      >>> state, history = train(cluster, state, batches, schedule=2, progress=False)
      >>> history["step"], history["bytes"]
      (array([2, 4, 5]), array([ 4,  8, 12]))
    """
    _check_inputs(cluster, state, batches, progress)
    schedule = train_schedule(schedule)
    callbacks = Callbacks(
        evaluate, evaluate_every, eval_fields, on_round_end, save, save_every
    )
    round_weights = RoundWeights(weights, cluster.num_workers)
    settings = RunSettings(schedule, steps, round_weights, max_steps_per_dispatch)
    context, examples = context_of(state), 0
    dispatcher = dispatcher_of(cluster, round_weights, state)
    history = HistoryRecorder(context, ByteCounter(cluster.bytes_sent, state))
    saver, prefetcher = _prefetch(cluster, batches, settings, context, save)
    assert_equal_runs(cluster, state, context, prefetcher, callbacks, settings)
    in_flight = ResultQueue(context.is_multi_process)
    with progress_bar(context.is_primary and progress, steps, batches) as bar:
        evaluator = Evaluator(callbacks, context.processes, state)
        weight_check = WeightCheck(round_weights, context.round + 1)
        outputs = RunOutputs(
            context, callbacks, evaluator, schedule, history, weight_check, bar
        )
        alike = dispatcher.round_programs.are_alike
        plan = segments(settings, context, callbacks, prefetcher.fill, alike)
        for segment in plan:
            stacked = prefetcher.next_batches(segment.steps)
            state, result = dispatcher.run(segment, state, stacked)
            examples += _num_examples(stacked)
            outputs.record(in_flight.push(result), state)
            outputs.update_schedule(segment.end_step)
            if segment.evaluates:
                outputs.record(in_flight.pop_all(), state)
                outputs.evaluate(state)
            if save and segment.saves and prefetcher.fill():
                # A loss that is not finite raises here, before the state is saved.
                outputs.record(in_flight.pop_all(), state)
                saver(state, examples, prefetcher.data_state)
        outputs.record(in_flight.pop_all(), state)
        if history.open_round:
            outputs.check_open_round()
            state, device_bytes = dispatcher.synchronize(state, history.round + 1)
            history.close_round(rule_metrics(state), device_bytes)
        outputs.evaluate(state)
    if save and examples:
        saver(state, examples, prefetcher.data_state)
    return state, history.columns()


def _prefetch(
    cluster: Cluster,
    batches: Iterable[PyTree],
    settings: RunSettings,
    context: RunContext,
    save: Callable | None,
) -> tuple[Saver, SynchronizedPrefetcher]:
    """Returns the calls of `save`, and the prefetcher that reads states for them."""
    iterator = iter(batches)
    saver = Saver(save, state_reader(batches, iterator))
    prefetcher = SynchronizedPrefetcher(
        islice(iterator, settings.steps),
        cluster.shard_batch,
        settings.max_steps_per_dispatch,
        context.processes,
        (cluster.num_workers, len(local_workers(cluster))),
        saver.read_state,
    )
    return saver, prefetcher


def _check_inputs(
    cluster: Cluster, state: State, batches: Iterable[PyTree], progress: bool | None
) -> None:
    """Raises unless the arguments are a cluster, a live state and an iterable."""
    validation.check_type("train(cluster)", "cluster", cluster, Cluster)
    validation.check_state("train(state)", state)
    validation.check_type("train(batches)", "batches", batches, Iterable)
    validation.check_type("train(progress)", "progress", progress, bool, type(None))


def _num_examples(batches: PyTree) -> int:
    """Returns the number of examples in batches with leaves (H, K, B, ...)."""
    return math.prod(np.shape(jax.tree.leaves(batches)[0])[:3])
