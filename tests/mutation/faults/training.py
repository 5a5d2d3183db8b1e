"""Faults planted in `localsgd_jax/training/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "does not check weights by a metric": Mutant(
        "training/outputs.py",
        "self._weight_check.append_steps(result)",
        "pass",
        "training/test_round_weights.py -k wrong_weights_by_a_metric",
    ),
    "dispatches a donated state": Mutant(
        "training/parallel_step.py",
        'check_state("step(state)", state)',
        "pass",
        "training/test_parallel_step.py -k wrong_states",
    ),
    "forgets the metric of earlier dispatches of a round": Mutant(
        "training/round_weights.py",
        "RoundTotals(totals.metric + total,",
        "RoundTotals(total,",
        "training/test_round_weights.py -k may_be_a_metric",
    ),
    "weighs all rounds by the first": Mutant(
        "training/round_weights.py",
        "self._of_round(first_round + i)",
        "self._of_round(1)",
        "training/test_round_weights.py -k function_of_the_round",
    ),
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
        "                outputs.record(in_flight.pop_all(), state)\n                saver(",
        "                saver(",
        "checkpoint/test_run_checkpointer.py -k non_finite",
    ),
    "does not check the loss": Mutant(
        "training/history.py",
        'if not np.isfinite(losses := metrics.get("loss", np.zeros(1))).all():',
        "if False:",
        "training/test_history.py -k non_finite_loss",
    ),
    "evaluates worker 0 instead of the mean": Mutant(
        "training/evaluation.py",
        "model = consensus(state, fields)",
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
    "does not count the bytes of an evaluation": Mutant(
        "training/evaluation.py",
        "            sent, device_sent = self._bytes_of_mean(state)\n",
        "",
        "training/test_byte_counter.py -k different_workers",
    ),
    "counts the mean of equal workers": Mutant(
        "training/evaluation.py",
        "if model is None:",
        "if True:",
        "training/test_byte_counter.py -k equal_workers",
    ),
    "keeps the bytes of the first position": Mutant(
        "training/byte_counter.py",
        "and self._cycle(round_number)",
        "and self._cycle(1)",
        "training/test_byte_counter.py -k each_position",
    ),
    "counts rounds of a class with one round number": Mutant(
        "training/byte_counter.py",
        "if low == high:\n            return high\n",
        "if high:\n            return high\n",
        "training/test_byte_counter.py -k each_position",
    ),
    "hides that bytes cannot be counted": Mutant(
        "training/byte_counter.py",
        "if self._error is not None and not self._has_warned:",
        "if False:",
        "training/test_byte_counter.py -k one_warning",
    ),
    "does not bound the programs of a cycle": Mutant(
        "training/round_programs.py",
        "if len(self._class_of_text) < _MAX_PROGRAMS:",
        "if True:",
        "training/test_round_programs.py -k bounded",
    ),
    "compiles equal rounds separately": Mutant(
        "training/round_programs.py",
        "self._class_of_text.setdefault(digest, round_class)",
        "self._class_of_text[digest] = round_class",
        "training/test_round_programs.py -k share",
    ),
    "runs each round with the program of the next": Mutant(
        "training/dispatch.py",
        "self.round_programs.choose(segment.round)",
        "self.round_programs.choose(segment.round + 1)",
        "training/test_round_programs.py -k manual_loop",
    ),
    "lets the shardings of a state drift": Mutant(
        "training/dispatch.py",
        "return shardings if is_on_mesh else None",
        "return None",
        "training/test_compilations.py",
    ),
    "begins a long round with a full dispatch": Mutant(
        "training/segments.py",
        "rest = length % max_steps or max_steps",
        "rest = max_steps",
        "training/test_segments.py -k long_rounds",
    ),
    "compiles a program for each length": Mutant(
        "training/segments.py",
        "if is_cyclic or rest == 0 or length == max_steps:",
        "if True:",
        "training/test_segments.py -k few_programs",
    ),
    "computes metric objects from the last step of a round only": Mutant(
        "training/history.py",
        "computed_metrics(objects)",
        "computed_metrics(objects[-1:])",
        "training/test_metric_objects.py -k one_number",
    ),
}
