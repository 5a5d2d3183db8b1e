"""Faults planted in `localsgd_jax/analysis/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "counts a dispatch of several rounds as one": Mutant(
        "analysis/device_bytes.py",
        "high / (rounds or 1))",
        "high)",
        "analysis/test_device_bytes.py -k fused-8-delay",
    ),
    "counts gated steps without a synchronisation as rounds": Mutant(
        "analysis/device_bytes.py",
        "total_bytes_sent(ops if rounds else _inside_conditional(ops))",
        "total_bytes_sent(ops)",
        "analysis/test_device_bytes.py -k gated-8-average",
    ),
    "counts collectives within a worker": Mutant(
        "analysis/device_bytes.py",
        "filter_by_axis(collective_ops(compiled, mesh=self._mesh), self._axes)",
        "collective_ops(compiled, mesh=self._mesh)",
        "analysis/test_device_bytes.py -k within",
    ),
    "counts half of an all-reduce": Mutant(
        "analysis/jaxpr_bytes.py",
        '"psum": "all-reduce"',
        '"psum": "reduce-scatter"',
        "execution/test_compiled_programs.py -k bytes_sent_match",
    ),
    "counts an all-gather as a reduce-scatter": Mutant(
        "analysis/ring_bytes.py",
        '"all-gather": lambda n: n - 1',
        '"all-gather": lambda n: (n - 1) / n',
        "analysis/test_collective_ops.py -k ring",
    ),
    "reads an async pair as synchronous": Mutant(
        "analysis/async_ops.py",
        "                return tuple(overlapped)",
        "                return None",
        "analysis/test_collective_ops.py -k overlapped_ops",
    ),
    "skips the first branch": Mutant(
        "analysis/op_reader.py",
        "for index, branch in enumerate(branches):",
        "for index, branch in list(enumerate(branches))[1:]:",
        "analysis/test_collective_ops.py -k control_flow",
    ),
    "skips the bodies of loops": Mutant(
        "analysis/op_reader.py",
        "yield body, (Loop(loop.name, count),)",
        "pass",
        "analysis/test_collective_ops.py -k loop",
    ),
    "ignores a branch without collectives": Mutant(
        "analysis/total_bytes.py",
        "0 if some_branch_is_empty else min",
        "min",
        "analysis/test_collective_ops.py -k total_bytes",
    ),
    "does not transpose replica groups": Mutant(
        "analysis/hlo/replica_groups.py",
        "positions.transpose(order or range(len(source)))",
        "positions",
        "analysis/test_hlo.py -k each_form",
    ),
    "names an axis along which nothing varies": Mutant(
        "analysis/hlo/replica_groups.py",
        "(coordinates != coordinates[:, :1]).any(axis=1)",
        "(coordinates == coordinates).any(axis=1)",
        "analysis/test_hlo.py -k varying_axes",
    ),
    "takes source lines from the cache": Mutant(
        "analysis/compilation.py",
        "jax.config.update(option, True)",
        "jax.config.update(option, False)",
        "analysis/test_collective_ops.py -k persistent_cache",
    ),
    "counts a loop from zero": Mutant(
        "analysis/hlo/trip_counts.py",
        "math.ceil((limit - start) / step)",
        "math.ceil(limit / step)",
        "analysis/test_collective_ops.py -k trip_count",
    ),
    "accepts a vacuous check": Mutant(
        "analysis/assertions.py",
        "if sizes[name] < 2:",
        "if sizes[name] < 1:",
        "analysis/test_assertions.py -k unusable_axis",
    ),
    "allows collectives in each gated step": Mutant(
        "analysis/program_audit.py",
        '"gated": lambda op: op.in_branch',
        '"gated": lambda op: True',
        "analysis/test_audit.py -k forbidden",
    ),
    "allows collectives in loops": Mutant(
        "analysis/program_audit.py",
        "op.in_branch or not op.in_loop",
        "True",
        "analysis/test_audit.py -k forbidden",
    ),
    "counts each piece of an async chain": Mutant(
        "analysis/async_ops.py",
        "if piece.async_chain_id else number",
        "if False else number",
        "analysis/test_collective_ops.py -k chain",
    ),
    "reports library frames as user code": Mutant(
        "analysis/hlo/source_locations.py",
        "if not frame.file.startswith((*_SITE_PACKAGES, _LIBRARY))",
        "if frame",
        "analysis/test_hlo.py -k user_frame",
    ),
}
