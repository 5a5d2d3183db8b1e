"""Evaluation and saving of the mean model over live processes."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import jax

from localsgd_jax.core.types import PyTree, State
from localsgd_jax.execution.mean_model import select_fields
from localsgd_jax.fault_tolerance.membership import Membership, MembershipError
from localsgd_jax.fault_tolerance.run import Progress, Run
from localsgd_jax.fault_tolerance.status import Status


def run_callbacks(run: Run, progress: Progress, state: State) -> None:
    """Evaluates and saves where it is due, and reports new rows.

    All processes compute the means; process 0 calls the functions. If one of them
    raises, process 0 raises that error and the others a `MembershipError`.

    Args:
      run: parts of the run.
      progress: `saved_step` is updated.
      state: state after a synchronisation.
    """
    callbacks, history = run.callbacks, run.history
    is_last = progress.status is not Status.RUNNING
    has_new_row = len(history.rows) > run.on_round_end.num_reported
    if has_new_row and callbacks.evaluate:
        if is_last or callbacks.evaluates_at(history.round):
            _evaluate(run, state)
    if callbacks.save and history.step > progress.saved_step:
        period = callbacks.save_every
        if is_last or history.step // period > progress.saved_step // period:
            progress.saved_step = history.step
            _save(run, callbacks.save, progress.batch_size, state)
    with propagate_errors(run.membership):
        run.on_round_end.report(history.rows)


@contextlib.contextmanager
def propagate_errors(membership: Membership) -> Iterator[None]:
    """Propagates an exception of the block to all other processes.

    The other processes have called `run_atomically`, or will call it next. Here it is
    called with a function that raises the exception, until all attempts have failed.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(MembershipError):
            membership.run_atomically(partial(_raise, error))
        raise


def _evaluate(run: Run, state: State) -> None:
    """Adds the values of `evaluate` to the last row, in process 0."""
    fields = select_fields(state.workers, run.callbacks.eval_fields)
    model = _mean(run, fields)
    if run.context.is_primary:
        with propagate_errors(run.membership):
            run.history.rows[-1] |= run.callbacks.run_evaluate(model)


def _save(run: Run, save: Callable, batch_size: int, state: State) -> None:
    """Calls `save` in process 0 with the mean model as the state of one worker."""
    means = _mean(run, (state.workers, state.local))
    if run.context.is_primary:
        workers, local = jax.tree.map(lambda x: x[None], means)
        steps = run.history.step - run.context.step
        examples = steps * run.cluster.num_workers * batch_size
        with propagate_errors(run.membership):
            save(state._replace(workers=workers, local=local), examples)


def _mean(run: Run, tree: PyTree) -> PyTree:
    """Averages over the workers of the live processes."""
    return run.membership.run_atomically(partial(run.cluster.mean, tree))


def _raise(error: Exception, devices: list) -> None:
    """Raises an error, as a function for `run_atomically`."""
    raise error
