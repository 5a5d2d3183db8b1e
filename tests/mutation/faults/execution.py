"""Faults planted in `localsgd_jax/execution/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "vmaps the step of a single lane": Mutant(
        "execution/lanes.py",
        "if lanes == 1:",
        "if False:",
        "execution/test_placement.py -k without_vmap",
    ),
    "synchronises one step late": Mutant(
        "execution/rounds.py",
        "schedule(state.step))",
        "schedule(state.step - 1))",
        "rules/test_invariants.py -k gated",
    ),
    "gives all workers one batch": Mutant(
        "execution/lanes.py",
        "return jax.vmap(step)(workers, batch)",
        "first = jax.tree.map(lambda x: x[0], batch)\n            return jax.vmap(step, (0, None))(workers, first)",
        "core/test_against_reference.py",
    ),
    "batches the convolutions of lanes on CPUs": Mutant(
        "execution/lanes.py",
        "return not convolves(jax.vmap(step), workers, batch)",
        "return True",
        "execution/test_convolutions.py -k chosen",
    ),
    "leaves gradients of convolutions to XLA in loops": Mutant(
        "execution/local_step.py",
        "if on_cpu and has_convolution(traced.jaxpr.jaxpr):",
        "if False:",
        "execution/test_convolutions.py -k layout",
    ),
    "counts rounds from zero": Mutant(
        "execution/placement.py",
        "number = state.round + 1",
        "number = state.round",
        "rules/test_invariants.py -k shared_and_local_state",
    ),
    "skips the synchronisation of a fused round": Mutant(
        "execution/rounds.py",
        "return cluster.sync(state, weight), metrics",
        "return state, metrics",
        "rules/test_invariants.py -k fused",
    ),
    "ignores the weights in a fused round": Mutant(
        "execution/rounds.py",
        "return cluster.sync(state, weight), metrics",
        "return cluster.sync(state), metrics",
        "rules/test_invariants.py -k fused",
    ),
    "averages over devices and not over lanes": Mutant(
        "execution/layout.py",
        "{last: (last, *self.lanes)}",
        "{last: (last,)}",
        "rules/test_invariants.py -k lanes",
    ),
    "reduces a metric in a local step": Mutant(
        "execution/placement.py",
        "    return layout.constrain(state), metrics",
        "    metrics = jax.tree.map(lambda m: m + 0 * m.mean(), metrics)\n    return layout.constrain(state), metrics",
        "execution/test_compiled_programs.py -k local_step",
    ),
    "gathers the shards of a worker": Mutant(
        "execution/layout.py",
        "P(*leading, *s)",
        "P(*leading)",
        "execution/test_compiled_programs.py -k only_its_shards",
    ),
    "leaves the sharding of results to the compiler": Mutant(
        "execution/layout.py",
        "        if state.specs is None:\n            return state\n",
        "        return state\n",
        "execution/test_sharded_rules.py -k match_simulation",
    ),
    "gives all workers one key": Mutant(
        "execution/replication.py",
        "jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))",
        "jax.vmap(jax.vmap(lambda key, k: key, (0, None)), (None, 0))",
        "core/test_algorithm.py -k keys_differ",
    ),
    "counts a round that is not due": Mutant(
        "execution/placement.py",
        "number = state.round + jnp.asarray(due, jnp.int32)",
        "number = state.round + 1",
        "rules/test_invariants.py -k gated",
    ),
    "synchronises outside the conditional": Mutant(
        "execution/placement.py",
        "        return jax.lax.cond(\n            due,\n            lambda operands: sync",
        "        synced = sync(workers, local, shared, number, weight)\n        choose = lambda a, b: jnp.where(due, a, b)\n        return jax.tree.map(choose, synced, (workers, local, shared))\n        return jax.lax.cond(\n            due,\n            lambda operands: sync",
        "execution/test_compiled_programs.py -k gated",
    ),
    "discards progress made during a synchronisation": Mutant(
        "execution/process_local.py",
        "(promote(a) + (promote(x) - promote(s)))",
        "promote(a)",
        "multi_process/test_process_local.py -k overlapped",
    ),
    "rounds fields that are not synchronised": Mutant(
        "execution/process_local.py",
        "jnp.where(a == s, x, merged)",
        "merged",
        "multi_process/test_process_local.py -k unsynchronised",
    ),
    "gives all processes the keys of the first workers": Mutant(
        "execution/replication.py",
        "jnp.arange(indices.start, indices.stop)",
        "jnp.arange(len(indices))",
        "multi_process/test_process_local.py -k initial_keys",
    ),
    "ignores the weights of processes": Mutant(
        "execution/process_programs.py",
        "if weighted else None",
        "if False else None",
        "multi_process/test_process_local.py -k weighted",
    ),
    "gathers a batch that is sharded inside a worker": Mutant(
        "execution/batches.py",
        "    return kept\n",
        "    return []\n",
        "execution/test_batches.py -k keeps_its_layout",
    ),
    "gives every device the whole batch of its worker": Mutant(
        "execution/batches.py",
        'DATA_AXES = ("data", "fsdp")',
        "DATA_AXES = ()",
        "execution/test_batches.py -k costs_less",
    ),
    "traces programs in the mesh of the user": Mutant(
        "execution/ambient_mesh.py",
        "with ambient_mesh(mesh.abstract_mesh):",
        "with ambient_mesh(None):",
        "execution/test_ambient_mesh.py -k cluster_does_not_depend",
    ),
    "traces a conditional round in the mesh of the user": Mutant(
        "execution/ambient_mesh.py",
        "with ambient_mesh(_mesh_of(states)):",
        "with ambient_mesh(None):",
        "execution/test_ambient_mesh.py -k does_not_depend",
    ),
}
