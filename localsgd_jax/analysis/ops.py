"""Collective ops of compiled programs."""

from typing import Any

from localsgd_jax.analysis import compilation
from localsgd_jax.analysis.async_ops import merge_chains
from localsgd_jax.analysis.collective_op import CollectiveOp
from localsgd_jax.analysis.device_layout import make_layout
from localsgd_jax.analysis.op_reader import OpReader
from localsgd_jax.core.validation import check_type


def collective_ops(
    program: Any, *args, mesh: Any = None, **kwargs
) -> tuple[CollectiveOp, ...]:
    """Returns the collective ops of a compiled program.

    A device in a group of n, with an operand of b bytes, sends by the ring algorithms

        all-reduce 2(n − 1)/n · b,  all-gather (n − 1) · b,
        reduce-scatter, all-to-all and broadcast (n − 1)/n · b,  permutation b

    If the group extends over s TPU slices, or processes of other devices, the part

        all-reduce 2(s − 1)/n · b,  all-gather (s − 1) · b,  all-to-all (s − 1)/s · b,
        reduce-scatter and broadcast (s − 1)/n · b,  permutation b

    crosses them, as in hierarchical algorithms, which send the same in total.

    The compiled program is what runs: it contains the collectives that the compiler
    inserts for shardings, and no collectives over vmap axes, which stay on a device.
    Every instruction that may leave a device and that the analysis cannot read, such as
    a host callback or an unknown custom call, is an op named `not understood`, which
    counts for every axis.

    Args:
      program: a compiled program, or a function, jitted or not. A function is compiled
        for the arguments and not run.
      *args, **kwargs: arguments of the function, or `jax.ShapeDtypeStruct` with
        shardings.
      mesh: the mesh that names the axes; None for the mesh of the arguments.

    Returns:
      The ops in execution order. `analysis.format_table` prints them and
      `analysis.total_bytes_sent` adds them up.

    Raises:
      TypeError: if `program` is neither a function nor a compiled program.
      ValueError: if the mesh is too small for the program.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> cluster = lsgd.on_mesh(algorithm, mesh)
      >>> collective_ops(cluster.step, cluster.init(0.0), jnp.ones(cluster.num_workers))
      ()
    """
    compilation.check_mesh("collective_ops(mesh)", mesh)
    call = "collective_ops(program)"
    compiled = compilation.compile_program(call, program, args, kwargs)
    return parse_collective_ops(
        compiled.as_text(), compilation.program_mesh(compiled, mesh, (args, kwargs))
    )


def parse_collective_ops(text: str, mesh: Any = None) -> tuple[CollectiveOp, ...]:
    """Returns the collective ops in the text of a compiled program.

    Args:
      text: result of `compiled.as_text()`.
      mesh: the mesh, or the sizes of its axes by name, outermost first; None if no mesh
        is known. Transfers across TPU slices can only be read with the devices of the
        mesh.

    Returns:
      The ops in execution order.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the text cannot be parsed, or if the mesh is too small for the
        program.
    """
    check_type("parse_collective_ops(text)", "text", text, str)
    compilation.check_mesh("parse_collective_ops(mesh)", mesh)
    return merge_chains(OpReader(text, make_layout(mesh)).all_ops())
