"""Ways to break the library, each with the tests that must notice.

Run one with `python tests/mutants.py NAME`, all with `python tests/mutants.py`, or
`pytest -m slow tests/test_mutants.py`.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutant(NamedTuple):
    """One fault: in `file`, `old` becomes `new`; `tests` must fail."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = {
    "lets a process of another job in": Mutant(
        "rollcall.py",
        'if theirs.get("job") != facts.get("job"):',
        "if False:",
        "test_distributed.py -k another_job",
    ),
    "keeps quiet about what differs": Mutant(
        "rollcall.py",
        "found = differences(said)",
        "found = []",
        "test_distributed.py -k what_differs",
    ),
    "opens the coordinator's port to all": Mutant(
        "distributed.py",
        "LOOPBACK.get(host, '[::]')",
        "'[::]'",
        "test_distributed.py -k this_machine_alone",
    ),
    "mixes processes in a worker": Mutant(
        "meshes.py",
        "return [groups[key] for key in sorted(groups)]",
        "return [list(devices)]",
        "test_distributed.py -k across",
    ),
    "leaves the others running": Mutant(
        "launch/job.py",
        "end = matters and others",
        "end = False",
        "test_launch.py -k fails_ends_all",
    ),
    "leaves orphans when it is killed": Mutant(
        "launch/job.py",
        "os.killpg(0, signal.SIGKILL)",
        "pass",
        "test_launch.py -k launcher_is_killed",
    ),
    "takes the last exit code": Mutant(
        "launch/job.py",
        "if matters and not self.code:",
        "if matters:",
        "test_launch.py -k say_what_went_wrong",
    ),
    "hides why a checkpoint was not written": Mutant(
        "checkpoint.py",
        "({_cause(error)}); those",
        "; those",
        "test_failures.py -k full_disk",
    ),
    "deals own workers the rows of others": Mutant(
        "deal.py",
        "rows = hand.reshape(workers, batch)[chosen]",
        "rows = hand.reshape(workers, batch)[: len(chosen)]",
        "test_deal.py -k only_some",
    ),
    "averages one step late": Mutant(
        "rounds.py",
        "schedule(state.step), state, weight), metrics",
        "schedule(state.step - 1), state, weight), metrics",
        "test_laws.py -k gated",
    ),
    "hands all workers one batch": Mutant(
        "placement.py",
        "return jax.vmap(step)",
        "first = partial(jax.tree.map, lambda x: x[0])\n"
        "        return lambda w, b: jax.vmap(step, (0, None))(w, first(b))",
        "test_twin.py",
    ),
    "drops the last incomplete round": Mutant(
        "train.py",
        "        if journal.unfinished:",
        "        if False:",
        "test_train.py -k remainder",
    ),
    "skips a worker's weight": Mutant(
        "collectives.py",
        "x * share.astype(x.dtype), 0",
        "x, 0",
        "test_laws.py -k shares",
    ),
    "lets a dead worker's NaN through": Mutant(
        "collectives.py",
        "jnp.where(share > 0, x * share.astype(x.dtype), 0)",
        "x * share.astype(x.dtype)",
        "test_laws.py -k zero",
    ),
    "forgets how many stand behind a pod": Mutant(
        "collectives.py",
        "jax.lax.psum(share, inner) if inner else share",
        "share",
        "test_laws.py -k weighs_what",
    ),
    "counts rounds from zero": Mutant(
        "placement.py",
        "turn = state.round + 1",
        "turn = state.round",
        "test_laws.py -k waits",
    ),
    "forgets to synchronise a fused round": Mutant(
        "rounds.py",
        "return cluster.sync(state, weight), metrics",
        "return state, metrics",
        "test_laws.py -k fused",
    ),
    "fuses without the weights": Mutant(
        "rounds.py",
        "return cluster.sync(state, weight), metrics",
        "return cluster.sync(state), metrics",
        "test_laws.py -k fused",
    ),
    "forgets how far apart the means are": Mutant(
        "rules/statistics.py",
        "_wide(x) + d**2",
        "_wide(x)",
        "test_statistics.py -k union",
    ),
    "takes deviations from zero": Mutant(
        "rules/statistics.py",
        "last = state.agreed",
        "last = jax.tree.map(jnp.zeros_like, state.agreed)",
        "test_statistics.py -k cancel",
    ),
    "merges statistics for nobody": Mutant(
        "rules/statistics.py",
        "jnp.where(anyone, new.astype(old.dtype), old)",
        "new.astype(old.dtype)",
        "test_statistics.py -k nobody",
    ),
    "averages the counts too": Mutant(
        "rules/moments.py",
        "jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None",
        "not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else None",
        "test_moments.py -k counts",
    ),
    "resets to zero": Mutant(
        "rules/moments.py",
        "jnp.where(anyone, start, x)",
        "jnp.where(anyone, 0 * start, x)",
        "test_moments.py -k not_to_zero",
    ),
    "leaves batch statistics to each worker": Mutant(
        "flax.py",
        'rules.setdefault("batch_stats", batch_statistics())',
        "pass",
        "test_flax.py -k own_way",
    ),
    "forgets what is neither parameter nor statistic": Mutant(
        "flax.py",
        "merged = nnx.merge(model_graph, parts.params, parts.batch_stats, parts.rest)",
        "merged = nnx.merge(model_graph, parts.params, parts.batch_stats, start.rest)",
        "test_flax.py -k masks",
    ),
    "counts the data from the restart": Mutant(
        "checkpoint.py",
        '"dealt": self._dealt + examples',
        '"dealt": examples',
        "test_checkpoint.py -k uninterrupted",
    ),
    "gives new workers the keys of old ones": Mutant(
        "checkpoint.py",
        "jnp.arange(len(keys), max(workers, len(keys)))",
        "jnp.arange(0, max(workers, len(keys)) - len(keys))",
        "test_checkpoint.py -k again",
    ),
    "takes one worker for all": Mutant(
        "checkpoint.py",
        "one = old.mean(0, dtype=wide).astype(old.dtype)",
        "one = old[0]",
        "test_checkpoint.py -k another_number",
    ),
    "looks by the rounds of this call": Mutant(
        "train.py",
        "look_every - journal.round % look_every",
        "look_every",
        "test_train.py -k looks",
    ),
    "saves a state with NaN": Mutant(
        "train.py",
        "journal.read(computing, state)  # Saves no state whose loss is NaN.",
        "pass",
        "test_checkpoint.py -k no_number",
    ),
    "forgets the rule": Mutant(
        "checkpoint.py",
        '"rule": describe(cluster.algorithm.sync)',
        '"rule": ""',
        "test_checkpoint.py -k by_name",
    ),
    "drops a rule's state": Mutant(
        "rules/combine.py",
        "states.append(part)",
        "states.append(RuleState(agreed, own))",
        "test_laws.py -k chain_of_one_is",
    ),
    "ignores when": Mutant(
        "rules/combine.py",
        "due = schedule(context.round)",
        "due = True",
        "test_laws.py -k when",
    ),
    "averages devices but not lanes": Mutant(
        "placement.py",
        "{names[-1]: (names[-1], LANE)}",
        "{names[-1]: (names[-1],)}",
        "test_laws.py -k lanes",
    ),
    "talks in a local step": Mutant(
        "placement.py",
        "        return state._replace(step=state.step + 1, workers=workers), metrics",
        "        metrics = jax.tree.map(lambda m: m + 0 * m.mean(), metrics)\n"
        "        return state._replace(step=state.step + 1, workers=workers), metrics",
        "test_programs.py -k silent",
    ),
    "unshards the workers": Mutant(
        "placement.py",
        "P(*lead, *spec)",
        "P(*lead)",
        "test_programs.py -k pieces",
    ),
    "gives all workers one key": Mutant(
        "placement.py",
        "jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))",
        "jax.vmap(jax.vmap(lambda key, k: key, (0, None)), (None, 0))",
        "test_algorithm.py -k key_of_its_own",
    ),
    "counts half of an all-reduce": Mutant(
        "ledger/traced.py",
        '"psum": lambda n: 2 * (n - 1) / n',
        '"psum": lambda n: (n - 1) / n',
        "test_programs.py -k sent_bytes",
    ),
    "synchronises at 1, 1 + h, …": Mutant(
        "schedules.py",
        "(t % h == 0)",
        "(t % h == 1)",
        "test_schedules.py",
    ),
    "decides a quadratic round at its end": Mutant(
        "schedules.py",
        "ends.append(ends[-1] + int(period(ends[-1])))",
        "ends.append(ends[-1] + int(period(ends[-1] + 5)))",
        "test_schedules.py -k quadratic",
    ),
    "deals one card twice": Mutant(
        "deal.py",
        "hand, deck = np.split(deck, [workers * batch])",
        "hand, deck = deck[: workers * batch], deck[workers * batch - 1 :]",
        "test_deal.py",
    ),
    "gives workers of a shard the same order": Mutant(
        "shards.py",
        "(seed, k), step * batch",
        "(seed, 0), 0 * step * batch",
        "test_shards.py -k goes_on",
    ),
    "takes an example twice": Mutant(
        "shards.py",
        "piles = [p[n:] for",
        "piles = [p[n // 2 :] for",
        "test_shards.py -k disjoint",
    ),
    "shuffles every epoch alike": Mutant(
        "deal.py",
        "np.random.default_rng((seed, epoch))",
        "np.random.default_rng(seed)",
        "test_deal.py",
    ),
    "starts from the top again": Mutant(
        "deal.py",
        "divmod(start, count)",
        "divmod(0, count)",
        "test_deal.py",
    ),
    "does not look at the loss": Mutant(
        "journal.py",
        "if loss is None or np.isfinite(loss).all():",
        "if True:",
        "test_train.py -k no_number",
    ),
    "evaluates one worker": Mutant(
        "journal.py",
        "self.evaluate(consensus(state, self.field))",
        "self.evaluate(jax.tree.map(lambda x: x[0], state.workers.params))",
        "test_train.py -k evaluation",
    ),
    "waits for every dispatch": Mutant(
        "train.py",
        "computing, examples = (due, seen), examples + _count(taken)\n",
        "journal.read((due, seen), state)\n"
        "            computing, examples = None, examples + _count(taken)\n",
        "test_train.py -k reads_ahead",
    ),
    "takes a gather for a reduce": Mutant(
        "ledger/entries.py",
        '"all-gather": lambda n: n - 1',
        '"all-gather": lambda n: (n - 1) / n',
        "test_ledger.py -k ring",
    ),
    "reads half of an async pair as waiting": Mutant(
        "ledger/entries.py",
        "                return tuple(between)",
        "                return None",
        "test_ledger.py -k between",
    ),
    "overlooks the first branch": Mutant(
        "ledger/entries.py",
        "for index, name in enumerate(names):",
        "for index, name in list(enumerate(names))[1:]:",
        "test_ledger.py -k branches",
    ),
    "does not look into loops": Mutant(
        "ledger/entries.py",
        "yield from _walk(program, body, (*path, Loop(line.name, times)), make)",
        "pass",
        "test_ledger.py -k loop",
    ),
    "forgets the silent branch": Mutant(
        "ledger/entries.py",
        "least += 0 if silent else min",
        "least += min",
        "test_ledger.py -k add_up",
    ),
    "transposes no groups": Mutant(
        "ledger/groups.py",
        "places.transpose(order or range(len(source)))",
        "places",
        "test_ledger.py -k every_form",
    ),
    "names an axis along which nothing varies": Mutant(
        "ledger/groups.py",
        "(where != where[:, :1]).any(axis=1)",
        "(where == where).any(axis=1)",
        "test_ledger.py -k axes",
    ),
    "takes lines from the cache": Mutant(
        "ledger/programs.py",
        "jax.config.update(name, True)",
        "jax.config.update(name, False)",
        "test_ledger.py -k stale",
    ),
    "counts a loop from zero": Mutant(
        "ledger/loops.py",
        "math.ceil((limit - start) / step)",
        "math.ceil(limit / step)",
        "test_ledger.py -k counted",
    ),
    "proves silence on one place": Mutant(
        "ledger/silent.py",
        "if sizes[name] < 2:",
        "if sizes[name] < 1:",
        "test_ledger.py -k nothing",
    ),
    "lets a gated step talk at each step": Mutant(
        "audit/inspection.py",
        '"gated": lambda entry: entry.conditional',
        '"gated": lambda entry: True',
        "test_audit.py -k noisy",
    ),
    "lets a loop talk": Mutant(
        "audit/inspection.py",
        "entry.conditional or not entry.looped",
        "True",
        "test_audit.py -k noisy",
    ),
    "counts a round that was not due": Mutant(
        "placement.py",
        "turn = state.round + jnp.asarray(due, jnp.int32)",
        "turn = state.round + 1",
        "test_laws.py -k gated",
    ),
    "shards no moment": Mutant(
        "shapes.py",
        "known.get(x.shape)",
        "None",
        "test_placement.py -k shapes_give_shapes",
    ),
    "plans half of an all-reduce": Mutant(
        "cost.py",
        "hops = 2 * (workers - 1)\n    return",
        "hops = workers - 1\n    return",
        "test_cost.py",
    ),
    "hides a fragment behind all steps": Mutant(
        "cost.py",
        "hidden = job.overlap * job.compute",
        "hidden = job.fragments * job.overlap * job.compute",
        "test_cost.py",
    ),
    "ignores the statistics": Mutant(
        "cost.py",
        "if longest is not None and longest < period",
        "if False and longest is not None",
        "test_cost.py -k statistics",
    ),
    "plans for float32 whatever the rule sends": Mutant(
        "plan/settings.py",
        "settings.bits or 32,",
        "32,",
        "test_plan.py -k overlap",
    ),
    "times a sum of one number": Mutant(
        "plan/measure.py",
        "max(1, size // 4)",
        "1",
        "test_plan.py -k timed",
    ),
    "takes the dispatch for steps": Mutant(
        "plan/measure.py",
        "(some(1, turns) - some(1, 1)) / ((turns - 1) * BATCHES)",
        "some(1, turns) / (turns * BATCHES)",
        "test_plan.py -k made_of",
    ),
    "forgets what a round takes besides the link": Mutant(
        "plan/measure.py",
        "rest - cost.waiting_time(job, link)",
        "0 - cost.waiting_time(job, link)",
        "test_plan.py -k overhead",
    ),
    "measures constants at the start alone": Mutant(
        "plan/cap.py",
        "state, _ = step(state, batch)",
        "step(state, batch)",
        "test_plan.py -k goes_on",
    ),
    "caps with a shift that is too large": Mutant(
        "plan/cap.py",
        "constants.smoothness, period)",
        "constants.smoothness, run.steps)",
        "test_plan.py -k cap",
    ),
    "caps the period by worker and not by all of them": Mutant(
        "plan/settings.py",
        "workers = made.cluster.workers",
        "pass",
        "test_plan.py -k constants_cap",
    ),
    "trusts curvature that has not converged": Mutant(
        "theory/estimate.py",
        "float(values[0] - slack[0])",
        "float(values[0])",
        "test_theory.py -k safe_side",
    ),
    "forgets the vector before": Mutant(
        "theory/estimate.py",
        "product(now) - norm * before",
        "product(now)",
        "test_theory.py -k curvature",
    ),
    "takes the curvature of the last point": Mutant(
        "theory/estimate.py",
        "return min(least), max(most)",
        "return least[-1], most[-1]",
        "test_theory.py -k curvature_is_that_of_logistic",
    ),
    "counts each piece of a chain": Mutant(
        "ledger/entries.py",
        "if piece.chain else number",
        "if False else number",
        "test_ledger.py -k pieces",
    ),
    "forgets one leaf": Mutant(
        "rules/mean.py",
        "return choose(anyone, mean, tree), state",
        "rest, kind = jax.tree.flatten(choose(anyone, mean, tree))\n"
        "        rest[-1] = jax.tree.leaves(tree)[-1]\n"
        "        return jax.tree.unflatten(kind, rest), state",
        "test_laws.py -k agreeing",
    ),
    "takes the empty mean for an agreement": Mutant(
        "rules/mean.py",
        "return choose(anyone, mean, tree), state",
        "return mean, state",
        "test_laws.py -k nobody",
    ),
    "sums in half precision": Mutant(
        "collectives.py",
        "wide = widen(tree)",
        "wide = tree",
        "test_algorithm.py -k half_precision",
    ),
    "synchronises outside the conditional": Mutant(
        "placement.py",
        "    return jax.lax.cond(\n        due,\n        lambda parts: sync",
        "    now = sync(workers, own, agreed, turn, weight)\n"
        "    choose = lambda a, b: jnp.where(due, a, b)\n"
        "    return jax.tree.map(choose, now, (workers, own, agreed))\n"
        "    return jax.lax.cond(\n        due,\n        lambda parts: sync",
        "test_programs.py -k gated",
    ),
    "waits for no dispatch": Mutant(
        "train.py",
        "            journal.read(computing, state)\n            _teach",
        "            vars(journal).setdefault('later', []).append(computing)\n"
        "            _teach",
        "test_train.py -k five_hundred",
    ),
    "blames the library": Mutant(
        "ledger/sources.py",
        "if not call.file.startswith((*_PACKAGES, _OWN))",
        "if call",
        "test_ledger.py -k blame",
    ),
    "descends up the pseudo-gradient": Mutant(
        "rules/outer_optimizer.py",
        "jnp.subtract, anchor, widen(tree)",
        "jnp.subtract, widen(tree), anchor",
        "test_conformance.py -k nesterov",
    ),
    "keeps the anchor in half precision": Mutant(
        "rules/outer_optimizer.py",
        "anchor = widen(tree)",
        "anchor = tree",
        "test_rules.py -k half_precision",
    ),
    "sums the pieces instead of averaging": Mutant(
        "rules/outer_optimizer.py",
        "_pieces(vector, workers), context) / workers",
        "_pieces(vector, workers), context)",
        "test_rules.py -k in_pieces",
    ),
    "mixes the wrong way round": Mutant(
        "rules/elastic_averaging.py",
        "x + (1 - alpha) * (t - x)",
        "x + alpha * (t - x)",
        "test_rules.py -k mix",
    ),
    "pulls at a centre that has moved": Mutant(
        "rules/elastic_averaging.py",
        "x - alpha * (x - z), wide, centre",
        "x - alpha * (x - z), wide, mean",
        "test_rules.py -k elastic",
    ),
    "never looks again": Mutant(
        "rules/overlapping.py",
        "after = RuleState(inner.agreed, (moved, inner.own))",
        "after = RuleState(inner.agreed, (snapshot, inner.own))",
        "test_rules.py -k overlap",
    ),
    "lets fragments count the rounds of all": Mutant(
        "rules/streaming.py",
        "own_round = turns // n * turn + within + 1",
        "own_round = context.round",
        "test_rules.py -k own_rounds",
    ),
    "rounds the spacing of fragments": Mutant(
        "schedules.py",
        "((t * n + n - 1) // h > (t * n - 1) // h)",
        "(t % (h // n) == 0)",
        "test_rules.py -k turn_once",
    ),
    "forgets what it did not send": Mutant(
        "rules/compression.py",
        "piece = piece + rests[place]",
        "piece = piece + 0 * rests[place]",
        "test_rules.py -k lost",
    ),
    "sends what it should keep": Mutant(
        "rules/compression.py",
        "return sums / whole(share), vector.at[places].set(0)",
        "return sums / whole(share), vector",
        "test_rules.py -k topk",
    ),
    "counts absent workers in a median": Mutant(
        "rules/robust.py",
        "combine(ordered, jnp.maximum(jnp.sum(present), 1))",
        "combine(ordered, len(ordered))",
        "test_rules.py -k medians",
    ),
    "lets what is not finite in": Mutant(
        "rules/robust.py",
        "fine = (share > 0) & jnp.isfinite(lengths)",
        "fine = share > 0",
        "test_rules.py -k not_finite",
    ),
    "asks the wrong neighbour": Mutant(
        "rules/neighbours.py",
        "collectives.shift(wide, by, context)",
        "collectives.shift(wide, -by, context)",
        "test_rules.py -k mixing",
    ),
    "crosses to the wrong device": Mutant(
        "collectives.py",
        "by // count + 1)",
        "by // count)",
        "test_rules.py -k shift",
    ),
    "measures without the weights": Mutant(
        "diagnostics.py",
        "share = weight / weight.sum()",
        "share = jnp.ones_like(weight) / len(weight)",
        "test_adaptive.py -k measured",
    ),
    "forgets to tell the schedule": Mutant(
        "train.py",
        "            schedule.learn(row, step)",
        "            pass",
        "test_adaptive.py -k run",
    ),
    "forgets what was done while the mean travelled": Mutant(
        "apart.py",
        "widen(a) + (widen(x) - widen(s))",
        "widen(a)",
        "test_apart.py -k beside",
    ),
    "rounds what was not agreed on": Mutant(
        "apart.py",
        "jnp.where(a == s, x, moved)",
        "moved",
        "test_apart.py -k as_it_is_now",
    ),
    "gives all processes the first workers' keys": Mutant(
        "apart.py",
        "x[first : first + here.workers]",
        "x[: here.workers]",
        "test_apart.py -k keys_of_the_whole",
    ),
    "weighs all processes alike": Mutant(
        "apart.py",
        "if weigh else None",
        "if False else None",
        "test_apart.py -k weighed",
    ),
    "takes what only others have failed in": Mutant(
        "company.py",
        "if after == before and not failed:",
        "if after == before and error is None:",
        "test_apart.py -k fails_in_one_process",
    ),
    "leaves a process that ends to be missed": Mutant(
        "company.py",
        "        if after == before and not failed:",
        "        if not failed:",
        "test_resilient.py -k one_dies -m slow",
    ),
    "does not look at the clock": Mutant(
        "resilient.py",
        "if self.leaving or self._late():",
        "if self.leaving:",
        "test_resilient.py -k fewer_steps",
    ),
    "synchronises once more at the end": Mutant(
        "resilient.py",
        "            if loop.idle:\n                break\n",
        "",
        "test_resilient.py -k overlapping",
    ),
    "saves nothing when asked to go": Mutant(
        "resilient.py",
        "            self.code = PREEMPTED\n",
        "            raise SystemExit(PREEMPTED)\n",
        "test_resilient.py -k sigterm_saves",
    ),
    "takes the own seconds for those of all": Mutant(
        "minutes.py",
        "waited = work.max() - work",
        "waited = work - work.min()",
        "test_resilient.py -k who_waits",
    ),
}


def survives(mutant: Mutant) -> bool:
    """Returns whether the tests pass on a copy of the project with the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        for part in ("localsgd_jax", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "localsgd_jax" / mutant.file
        source = path.read_text()
        if source.count(mutant.old) < 1:
            raise ValueError(f"{mutant.file} does not contain {mutant.old!r}")
        path.write_text(source.replace(mutant.old, mutant.new))
        tests = [
            f"tests/{word}" if word.endswith(".py") else word
            for word in mutant.tests.split()
        ]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"
        )
    if done.returncode == 1 and "error" in done.stdout.splitlines()[-1]:
        raise RuntimeError(f"the tests did not run: {done.stdout[-2000:]}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Tries the named mutants, or all; returns how many survive."""
    alive = 0
    for name in names or MUTANTS:
        lives = survives(MUTANTS[name])
        print(f"{'SURVIVES' if lives else 'caught  '}  {name}", flush=True)
        alive += lives
    return alive


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
