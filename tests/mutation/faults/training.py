"""Faults planted in `localsgd_jax/training/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "drops the last incomplete round": Mutant(
        "training/loop.py",
        "        if history.open_round:",
        "        if False:",
        "training/test_loop.py -k matches_manual_loop",
    ),
    "counts rounds to an evaluation from the start of the call": Mutant(
        "training/segments.py",
        "step, round_number = context.step, context.round",
        "step, round_number = context.step, 0",
        "training/test_history.py -k evaluates_at_same_steps",
    ),
    "saves a state with a non-finite loss": Mutant(
        "training/loop.py",
        "                outputs.record(in_flight.pop_all(), state)\n                save(",
        "                save(",
        "checkpoint/test_run_checkpointer.py -k non_finite",
    ),
    "does not check the loss": Mutant(
        "training/history.py",
        'if not np.isfinite(losses := metrics.get("loss", np.zeros(1))).all():',
        "if False:",
        "training/test_history.py -k non_finite_loss",
    ),
    "evaluates worker 0 instead of the mean": Mutant(
        "training/outputs.py",
        "model = consensus(state, self._callbacks.eval_fields)",
        "model = __import__('jax').tree.map(lambda x: x[0], state.workers.params)",
        "training/test_history.py -k mean_of_different_workers",
    ),
    "reports the last row before its evaluation": Mutant(
        "training/outputs.py",
        "self._on_round_end.report(rows[:-1])",
        "self._on_round_end.report(rows)",
        "training/test_history.py -k reported_once",
    ),
    "waits for every dispatch": Mutant(
        "training/loop.py",
        "outputs.record(in_flight.push(result), state)",
        "in_flight.push(result); outputs.record(in_flight.pop_all(), state)",
        "training/test_dispatch.py -k reads_batches",
    ),
    "waits for no dispatch": Mutant(
        "training/dispatch.py",
        "        self._results = [result]\n",
        "        self._results, earlier = [*earlier, result], []\n",
        "training/test_dispatch.py -k starve",
    ),
    "does not update the schedule": Mutant(
        "training/outputs.py",
        "self._schedule.report(self._history.rows, step)",
        "pass",
        "schedules/test_adaptive.py",
    ),
}
