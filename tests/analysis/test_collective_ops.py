"""Collective ops: names, bytes, axes, control flow and overlap."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from harness import cases
from harness.cases import mesh, network
from harness.source_lines import line_of
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

import localsgd_jax as lsgd
from localsgd_jax.analysis import (
    Branch,
    Loop,
    filter_by_axis,
    format_table,
    parse_collective_ops,
    total_bytes_sent,
)


def sharded(function, axes, shape=(8,), **sizes):
    """Returns a shard_map of a function over a mesh and an argument for it."""
    named = mesh(**(sizes or {"worker": 8}))
    auto = jax.sharding.Mesh(named.devices, named.axis_names)
    spec = PartitionSpec(tuple(axes))
    call = jax.shard_map(
        function, mesh=auto, in_specs=spec, out_specs=spec, check_vma=False
    )
    argument = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(auto, spec)
    )
    return call, argument


def module_text(body, devices=8, rest=""):
    """Returns a module with this entry computation and other computations."""
    return (
        f"HloModule m, is_scheduled=true, num_partitions={devices}\n\n"
        + textwrap.dedent(rest)
        + "\n\nENTRY %main (x: f32[8]) -> f32[8] {\n"
        + textwrap.indent(textwrap.dedent(body), "  ").rstrip()
        + "\n}\n"
    )


# Modules as the compilers for TPUs and GPUs print them.

ASYNC = module_text(
    """
    %x = f32[8]{0} parameter(0)
    %s = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), replica_groups={{0,1},{2,3}}
    %w = f32[8]{0:T(8)S(1)} while(%x), condition=%test, body=%body
    %f = f32[8]{0} fusion(%w), kind=kLoop, calls=%inner
    %g = f32[8]{0} bitcast(%f)
    ROOT %d = f32[8]{0} all-reduce-done(%s)
    %late = f32[8]{0} fusion(%d), kind=kLoop, calls=%inner
    """,
    rest="""
    %inner (p: f32[8]) -> f32[8] {
      ROOT %p = f32[8]{0} parameter(0)
    }

    %body (p.1: f32[8]) -> f32[8] {
      ROOT %p.1 = f32[8]{0} parameter(0)
    }

    %test (p.2: f32[8]) -> pred[] {
      %p.2 = f32[8]{0} parameter(0)
      ROOT %c = pred[] constant(false)
    }
    """,
)


def test_overlapped_ops_of_async_op():
    (op,) = parse_collective_ops(ASYNC, {"worker": 4, "model": 2})
    assert (op.name, op.bytes, op.bytes_sent) == ("all-reduce", 32, 32.0)
    assert op.overlapped_ops == ("while", "fusion")
    assert op.axes == ("model",)
    assert "while, fusion" in format_table([op])


def test_sync_start_is_not_async():
    waits = ASYNC.replace(
        "{{0,1},{2,3}}", '{{0,1},{2,3}}, backend_config={"is_sync":true}'
    )
    assert [op.overlapped_ops for op in parse_collective_ops(waits)] == [None]


@pytest.mark.parametrize(("name", "called"), [("async", "calls"), ("call", "to_apply")])
def test_async_start_of_a_called_computation(name, called):
    wrapped = module_text(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %s = ((f32[8]{{0}}), f32[1]{{0}}) {name}-start(%x), {called}=%wrapped
        %f = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%inner
        %u = ((f32[8]{{0}}), f32[1]{{0}}) {name}-update(%s)
        %f.1 = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%inner
        ROOT %d = f32[1]{{0}} {name}-done(%u)
        """,
        rest="""
        %wrapped (p: f32[8]) -> f32[1] {
          %p = f32[8]{0} parameter(0)
          ROOT %r = f32[1]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8]
        }

        %inner (q: f32[8]) -> f32[8] {
          %q = f32[8]{0} parameter(0)
          ROOT %n = f32[8]{0} negate(%q)
        }
        """,
    )
    (op,) = parse_collective_ops(wrapped)
    assert (op.name, op.bytes, op.bytes_sent) == ("reduce-scatter", 32, 28.0)
    assert op.overlapped_ops == ("fusion", "fusion")


def test_async_chain_is_one_op():
    """The TPU compiler splits an all-gather over a loop of local steps."""
    gather = (
        "f32[64]{0} all-gather(%p{0}), channel_id=2, replica_groups={{}}, "
        'frontend_attributes={{chain_id="0"}}'
    )
    piece = """
        %piece.{0} (p{0}: f32[8]) -> f32[64] {{
          %p{0} = f32[8]{{0}} parameter(0)
          ROOT %g{0} = %s
        }}
        """.replace("%s", gather)
    text = module_text(
        """
        %x = f32[8]{0} parameter(0)
        %s = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece.1
        %w = f32[8]{0} while(%x), condition=%test, body=%body
        ROOT %d = f32[64]{0} fusion(%x), kind=kCustom, calls=%piece.4
        """,
        rest="\n".join(textwrap.dedent(piece.format(i)) for i in (1, 2, 3, 4))
        + textwrap.dedent(
            """
            %body (p: f32[8]) -> f32[8] {
              %p = f32[8]{0} parameter(0)
              %f = f32[64]{0} fusion(%p), kind=kCustom, calls=%piece.2
              ROOT %f.1 = f32[64]{0} fusion(%p), kind=kCustom, calls=%piece.3
            }

            %test (q: f32[8]) -> pred[] {
              %q = f32[8]{0} parameter(0)
              ROOT %c = pred[] constant(false)
            }
            """
        ),
    )
    (op,) = parse_collective_ops(text)
    assert (op.name, op.bytes, op.bytes_sent) == ("all-gather", 32, 224)
    assert (op.control_flow, op.overlapped_ops) == ((), ("while",))


def counted_loop(start="0", limit="6", step="1"):
    """Returns a module with a loop that counts between constants."""
    return module_text(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %zero = s32[]{{:T(128)}} constant({start})
        %i = s32[] copy(%zero)
        %t = (s32[], f32[8]{{0}}) tuple(%i, %x)
        ROOT %w = (s32[], f32[8]{{0}}) while(%t), condition=%test, body=%body
        """,
        rest=f"""
        %test (p: (s32[], f32[8])) -> pred[] {{
          %n = s32[] constant({limit})
          %p = (s32[], f32[8]{{0}}) parameter(0)
          %j = s32[] get-tuple-element(%p), index=0
          ROOT %lt = pred[] compare(%j, %n), direction=LT
        }}

        %body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {{
          %p.1 = (s32[], f32[8]{{0}}) parameter(0)
          %one = s32[] constant({step})
          %j.1 = s32[] get-tuple-element(%p.1), index=0
          %y = f32[8]{{0}} get-tuple-element(%p.1), index=1
          %r = f32[8]{{0}} all-reduce(%y), replica_groups={{}}
          %j.2 = s32[] add(%j.1, %one)
          ROOT %t.1 = (s32[], f32[8]{{0}}) tuple(%j.2, %r)
        }}
        """,
    )


@pytest.mark.parametrize(
    "text, trip_count",
    [
        (counted_loop(), 6),
        (counted_loop(start="2"), 4),
        (counted_loop(step="4"), 2),
        (counted_loop(step="-1"), None),
        (counted_loop(limit="unknown"), None),
        (counted_loop(start="unknown"), None),
        (counted_loop().replace("direction=LT", "direction=GT"), None),
        (counted_loop().replace("add(%j.1", "multiply(%j.1"), None),
    ],
)
def test_trip_count_from_constants(text, trip_count):
    (op,) = parse_collective_ops(text)
    assert op.control_flow == (Loop("w", trip_count),)
    assert op.trip_count == trip_count
    most = float("inf") if trip_count is None else trip_count * 56
    assert total_bytes_sent([op]) == (0 if trip_count is None else most, most)


# Bytes sent.


def test_total_bytes_of_branches_and_loops():
    (op,) = parse_collective_ops(counted_loop())
    inside = [
        op._replace(control_flow=(Branch("a", 0, 3),), bytes_sent=10.0),
        op._replace(control_flow=(Branch("a", 1, 3),), bytes_sent=20.0),
        op._replace(control_flow=(Branch("a", 2, 3), Loop("w", 2)), bytes_sent=3.0),
        op._replace(control_flow=(Branch("b", 1, 2),), bytes_sent=100.0),
        op._replace(control_flow=(Loop("v", 5), Branch("c", 0, 1)), bytes_sent=1000.0),
        op._replace(control_flow=(), bytes_sent=0.5),
    ]
    assert total_bytes_sent(inside) == (6 + 5000.5, 20 + 100 + 5000.5)
    assert [x.in_branch for x in inside] == [True, True, True, True, True, False]
    assert [x.in_loop for x in inside] == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    "name, function, operand_bytes, bytes_sent",
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "worker"), 64, 112),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "worker", tiled=True),
            64,
            56,
        ),
        (
            "all-gather",
            lambda x: jax.lax.all_gather(x, "worker", tiled=True)[:16],
            64,
            448,
        ),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x, "worker", 0, 0, tiled=True),
            64,
            56,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "worker", [(i, 7 - i) for i in range(8)]),
            64,
            64,
        ),
    ],
)
def test_ring_formula_of_each_collective(name, function, operand_bytes, bytes_sent):
    (op,) = lsgd.collective_ops(*sharded(function, ["worker"], shape=(8 * 16,)))
    assert (op.name, op.dtypes) == (name, ("f32",))
    assert (op.bytes, op.bytes_sent) == (operand_bytes, bytes_sent)
    assert (op.axes, op.control_flow, op.overlapped_ops) == (
        ("worker",),
        (),
        None,
    )


AXES = ["pod", "worker", "model"]


@pytest.mark.parametrize(
    "axes", [["pod"], ["worker"], ["model"], ["pod", "model"], ["worker", "pod"], AXES]
)
def test_axes_on_a_mesh_of_three(axes):
    call, argument = sharded(
        lambda x: jax.lax.psum(x, axes), AXES, pod=2, worker=2, model=2
    )
    (op,) = lsgd.collective_ops(call, argument)
    assert op.axes == tuple(sorted(axes, key=AXES.index))
    assert filter_by_axis([op], axes[0]) == (op,)
    assert filter_by_axis([op], [name for name in AXES if name not in axes]) == (
        (op,) if axes == AXES else ()
    )


def test_control_flow_and_order_of_a_compiled_program():
    def function(x):
        def step(x, _):
            return jnp.sin(jax.lax.psum(x, "worker")), None

        x, _ = jax.lax.scan(step, x, length=5)
        return jax.lax.cond(
            x[0] > 0,
            lambda x: jax.lax.all_gather(x, "worker", tiled=True)[:1],
            lambda x: jax.lax.scan(step, x, length=3)[0],
            x,
        )

    reduce, three, gather = lsgd.collective_ops(*sharded(function, ["worker"]))
    assert [x.name for x in (reduce, three, gather)] == [
        "all-reduce",
        "all-reduce",
        "all-gather",
    ]
    assert [scope.trip_count for scope in reduce.control_flow] == [5]
    assert [type(scope) for scope in three.control_flow] == [Branch, Loop]
    assert (
        three.control_flow[0].index,
        three.control_flow[0].count,
        three.trip_count,
    ) == (0, 2, 3)
    assert (gather.control_flow[0].index, gather.control_flow[0].count) == (1, 2)
    # Five times 2 · 7/8 · 4 bytes, and then 3 · 7 or 7 · 4.
    assert total_bytes_sent([reduce, three, gather]) == (5 * 7 + 21, 5 * 7 + 28)


def test_loop_without_static_trip_count():
    def function(x):
        return jax.lax.while_loop(
            lambda x: x[0] < 100, lambda x: 1 + jax.lax.psum(x, "worker"), x
        )

    (op,) = lsgd.collective_ops(*sharded(function, ["worker"]))
    assert op.trip_count is None
    assert total_bytes_sent([op]) == (0, float("inf"))
    assert "loop of ?" in format_table([op])


def test_mesh_of_a_compiled_program():
    call, argument = sharded(
        lambda x: jax.lax.psum(x, "worker"), ["worker"], worker=4, model=2
    )
    compiled = jax.jit(call).lower(argument).compile()
    (op,) = lsgd.collective_ops(compiled)
    assert op.axes == ("worker",)
    renamed = mesh(k=4, m=2)
    assert lsgd.collective_ops(compiled, mesh=renamed)[0].axes == ("k",)


def test_invalid_program_raises():
    with pytest.raises(TypeError, match=r"collective_ops\(program\): .* got 3"):
        lsgd.collective_ops(3)


def test_table_columns():
    call, argument = sharded(lambda x: jax.lax.psum(x, "worker"), ["worker"])
    lines = format_table(lsgd.collective_ops(call, argument)).splitlines()
    assert len(lines) == 2
    assert lines[0].split() == [
        *("collective", "type", "bytes", "sent", "ICI", "sent", "DCN", "axes"),
        *("control", "flow", "overlaps", "source"),
    ]
    assert lines[1].split()[:8] == [
        *("all-reduce", "f32", "4", "7", "0", "worker", "always", "synchronous")
    ]
    assert "test_collective_ops.py:" in lines[1]


def test_persistent_cache_keeps_source_lines(tmp_path):
    """Two equal programs from different lines, with the persistent cache enabled."""

    def first(x):
        return jax.lax.psum(x, "worker")

    def second(x):
        return jax.lax.psum(x, "worker")

    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for function in (first, second):
            function.__name__ = "same"
            (op,) = lsgd.collective_ops(*sharded(function, ["worker"], shape=(24,)))
            assert op.source[:2] == line_of(function, "psum")
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_source_excludes_the_caller_of_the_analysis():
    cluster = cases.cluster("mesh", "average")
    (op,) = lsgd.collective_ops(cluster.sync, cluster.init(network()))
    assert op.source.file.endswith("collectives.py")
