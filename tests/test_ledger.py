"""The ledger: programs of every kind, groups in every form, culprits by their line."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import batches, cluster, mesh, network
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

import localsgd_jax as lsgd
from localsgd_jax.ledger import (
    Branch,
    Frame,
    Loop,
    along,
    groups,
    hlo,
    read,
    sent,
    sources,
    table,
)


def spread(function, axes, shape=(8,), **sizes):
    """A function of one device's share, on a mesh, and an argument for it."""
    devices = mesh(**(sizes or {"worker": 8}))
    auto = jax.sharding.Mesh(devices.devices, devices.axis_names)
    split = PartitionSpec(tuple(axes))
    call = jax.shard_map(
        function, mesh=auto, in_specs=split, out_specs=split, check_vma=False
    )
    argument = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(auto, split)
    )
    return call, argument


def program(body, devices=8, rest=""):
    """The text of a program with a few lines in its entry computation."""
    return (
        f"HloModule m, is_scheduled=true, num_partitions={devices}\n\n"
        + textwrap.dedent(rest)
        + "\n\nENTRY %main (x: f32[8]) -> f32[8] {\n"
        + textwrap.indent(textwrap.dedent(body), "  ").rstrip()
        + "\n}\n"
    )


# Text.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups={{0,1,2,3}}, to_apply=%x", ((0, 1, 2, 3),)),
        ("replica_groups={}, to_apply=%x", ((0, 1, 2, 3),)),
        ("channel_id=1, to_apply=%x", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=[1,4]<=[4], x=[2,2]", ((0, 1, 2, 3),)),
        (
            "replica_groups=[2,4]<=[2,2,2]T(1,0,2)",
            ((0, 1, 4, 5), (2, 3, 6, 7)),
        ),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_in_every_form(text, expected):
    assert groups.groups(text, devices=4) == expected


@pytest.mark.parametrize("form", ["mesh['a'=4, device_ids=([4])] {'a'}", "V2[4]"])
def test_groups_of_another_form_are_refused(form):
    with pytest.raises(NotImplementedError, match="of another form: .*replica_groups="):
        groups.groups(f"replica_groups={form}", 4)


@pytest.mark.parametrize(
    "found, expected",
    [
        (((0, 1), (2, 3)), ("model",)),
        (((0, 2), (1, 3)), ("worker",)),
        (((0, 1, 2, 3),), ("worker", "model")),
        (((0, 3), (1, 2)), ("worker", "model")),
        (((0,), (1,), (2,), (3,)), ()),
    ],
)
def test_groups_are_named_by_the_axes_that_vary(found, expected):
    assert groups.axes(found, {"worker": 2, "one": 1, "model": 2}) == expected


def test_a_mesh_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="mesh of 2 devices .* names device 3"):
        groups.axes(((0, 3),), {"worker": 2})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("f32[8,2]{1,0}", 64),
        ("f32[]", 4),
        ("bf16[3]{0:T(1024)(128)(2,1)}", 6),
        ("(f32[2]{0}, /*index=1*/s32[], pred[5])", 17),
        ("f8e4m3fn[16]", 16),
        ("s4[5]", 3),
        ("u2[16]", 4),
        ("c64[2]", 16),
        ("f64[<=10]", 80),
        ("(u32[]{:S(2)}, token[])", 4),
    ],
)
def test_bytes_of_a_type(text, expected):
    assert hlo.size(text) == expected


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read("HloModule m")


# Programs as other compilers write them.

ASYNC = program(
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


def test_what_runs_between_a_start_and_its_end():
    (entry,) = read(ASYNC, {"worker": 4, "model": 2})
    assert (entry.name, entry.bytes, entry.sent) == ("all-reduce", 32, 32.0)
    assert entry.beside == ("while", "fusion")
    assert entry.axes == ("model",)
    assert "while, fusion" in table([entry])


def test_a_start_whose_devices_wait_is_not_asynchronous():
    waits = ASYNC.replace(
        "{{0,1},{2,3}}", '{{0,1},{2,3}}, backend_config={"is_sync":true}'
    )
    assert [entry.beside for entry in read(waits)] == [None]


def test_a_collective_started_by_a_computation_of_its_own():
    wrapped = program(
        """
        %x = f32[8]{0} parameter(0)
        %s = ((f32[8]{0}), f32[1]{0}) async-start(%x), calls=%wrapped
        %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner
        %u = ((f32[8]{0}), f32[1]{0}) async-update(%s)
        %f.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner
        ROOT %d = f32[1]{0} async-done(%u)
        """,
        rest="""
        %wrapped (p: f32[8]) -> f32[1] {
          %p = f32[8]{0} parameter(0)
          ROOT %r = f32[1]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8]
        }
        """,
    )
    (entry,) = read(wrapped)
    assert (entry.name, entry.bytes, entry.sent) == ("reduce-scatter", 32, 28.0)
    assert entry.beside == ("fusion", "fusion")


def counted(start="0", limit="6", step="1"):
    """A loop whose length only its constants tell."""
    return program(
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
    "text, times",
    [
        (counted(), 6),
        (counted(start="2"), 4),
        (counted(step="4"), 2),
        (counted(step="-1"), None),
        (counted(limit="unknown"), None),
        (counted(start="unknown"), None),
        (counted().replace("direction=LT", "direction=GT"), None),
        (counted().replace("add(%j.1", "multiply(%j.1"), None),
    ],
)
def test_loops_are_counted_by_their_constants(text, times):
    (entry,) = read(text)
    assert entry.path == (Loop("w", times),)
    assert entry.times == times
    most = float("inf") if times is None else times * 56
    assert sent([entry]) == (0 if times is None else most, most)


# What is sent.


def test_branches_and_loops_add_up():
    (entry,) = read(counted())
    inside = [
        entry._replace(path=(Branch("a", 0, 3),), sent=10.0),
        entry._replace(path=(Branch("a", 1, 3),), sent=20.0),
        entry._replace(path=(Branch("a", 2, 3), Loop("w", 2)), sent=3.0),
        entry._replace(path=(Branch("b", 1, 2),), sent=100.0),
        entry._replace(path=(Loop("v", 5), Branch("c", 0, 1)), sent=1000.0),
        entry._replace(path=(), sent=0.5),
    ]
    assert sent(inside) == (6 + 5000.5, 20 + 100 + 5000.5)
    assert [x.conditional for x in inside] == [True, True, True, True, True, False]
    assert [x.looped for x in inside] == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    "name, function, payload, ring",
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
def test_every_collective_by_its_ring_formula(name, function, payload, ring):
    (entry,) = lsgd.ledger(*spread(function, ["worker"], shape=(8 * 16,)))
    assert (entry.name, entry.dtypes) == (name, ("f32",))
    assert (entry.bytes, entry.sent) == (payload, ring)
    assert (entry.axes, entry.path, entry.beside) == (("worker",), (), None)


AXES = ["pod", "worker", "model"]


@pytest.mark.parametrize(
    "axes", [["pod"], ["worker"], ["model"], ["pod", "model"], ["worker", "pod"], AXES]
)
def test_axes_of_a_mesh_of_three(axes):
    call, argument = spread(
        lambda x: jax.lax.psum(x, axes), AXES, pod=2, worker=2, model=2
    )
    (entry,) = lsgd.ledger(call, argument)
    assert entry.axes == tuple(sorted(axes, key=AXES.index))
    assert along([entry], axes[0]) == (entry,)
    assert along([entry], [name for name in AXES if name not in axes]) == (
        (entry,) if axes == AXES else ()
    )


def test_loops_branches_and_the_order_of_a_real_program():
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

    reduce, three, gather = lsgd.ledger(*spread(function, ["worker"]))
    assert [x.name for x in (reduce, three, gather)] == [
        "all-reduce",
        "all-reduce",
        "all-gather",
    ]
    assert [place.times for place in reduce.path] == [5]
    assert [type(place) for place in three.path] == [Branch, Loop]
    assert (three.path[0].index, three.path[0].count, three.times) == (0, 2, 3)
    assert (gather.path[0].index, gather.path[0].count) == (1, 2)
    # Five times 2 · 7/8 · 4 bytes, and then 3 · 7 or 7 · 4.
    assert sent([reduce, three, gather]) == (5 * 7 + 21, 5 * 7 + 28)


def test_a_loop_of_unknown_length():
    def function(x):
        return jax.lax.while_loop(
            lambda x: x[0] < 100, lambda x: 1 + jax.lax.psum(x, "worker"), x
        )

    (entry,) = lsgd.ledger(*spread(function, ["worker"]))
    assert entry.times is None
    assert sent([entry]) == (0, float("inf"))
    assert "loop of ?" in table([entry])


def test_a_compiled_program_knows_its_mesh():
    call, argument = spread(
        lambda x: jax.lax.psum(x, "worker"), ["worker"], worker=4, model=2
    )
    compiled = jax.jit(call).lower(argument).compile()
    (entry,) = lsgd.ledger(compiled)
    assert entry.axes == ("worker",)
    renamed = mesh(k=4, m=2)
    assert lsgd.ledger(compiled, mesh=renamed)[0].axes == ("k",)


def test_what_is_no_program_is_refused():
    with pytest.raises(TypeError, match=r"ledger\(program\): .* got 3"):
        lsgd.ledger(3)


def test_the_table_says_what_the_readme_explains():
    call, argument = spread(lambda x: jax.lax.psum(x, "worker"), ["worker"])
    lines = table(lsgd.ledger(call, argument)).splitlines()
    assert len(lines) == 2
    assert lines[0].split() == [
        *("collective", "type", "bytes", "sent", "axes", "runs", "beside", "source")
    ]
    assert lines[1].split()[:7] == [
        *("all-reduce", "f32", "4", "7", "worker", "always", "waits")
    ]
    assert "test_ledger.py:" in lines[1]


# Whom to blame.


def line_of(function, text):
    """Where a function says something: its file and the line."""
    lines, start = inspect.getsourcelines(function)
    (offset,) = (i for i, line in enumerate(lines) if text in line)
    return inspect.getsourcefile(function), start + offset


def test_a_metric_reduced_at_each_step_is_found_at_its_line():
    verbs = cluster("mesh", "average")

    def noisy(state, batch):
        state, metrics = verbs.step(state, batch)
        return state, jnp.mean(metrics["loss"])

    state, batch = verbs.init(network()), verbs.put(batches(1)[0])
    with pytest.raises(lsgd.NoisyStepError, match=r"talks along worker") as caught:
        lsgd.assert_silent(noisy, state, batch)
    (entry,) = caught.value.entries
    assert entry.source[:2] == line_of(noisy, "jnp.mean")
    assert f"test_ledger.py:{entry.source.line}" in str(caught.value)
    assert isinstance(caught.value, AssertionError)


def test_a_counter_read_across_workers_is_found_at_its_line():
    """A counter that lives in the workers' part: the condition asks everybody."""
    verbs = cluster("mesh", "average")

    def step(state, count, batch):
        state, _ = verbs.step(state, batch)
        due = count[0] % 4 == 0
        return jax.lax.cond(due, verbs.sync, lambda state: state, state), count + 1

    state, batch = verbs.init(network()), verbs.put(batches(1)[0])
    count = verbs.put(np.zeros(8, np.int32))
    with pytest.raises(lsgd.NoisyStepError) as caught:
        lsgd.assert_silent(step, state, count, batch)
    always = [entry for entry in caught.value.entries if not entry.conditional]
    assert {entry.source[:2] for entry in always} == {line_of(step, "count[0]")}


def test_a_step_that_is_silent_passes_and_so_does_talk_along_another_axis():
    verbs = cluster("sharded", "average")
    state, batch = verbs.init(network()), verbs.put(batches(1)[0])
    lsgd.assert_silent(verbs.step, state, batch)
    with pytest.raises(lsgd.NoisyStepError):
        lsgd.assert_silent(verbs.sync, state)
    (entry,) = lsgd.assert_silent(verbs.sync, state, axis="model")
    assert entry.axes == ("worker",)
    with pytest.raises(lsgd.NoisyStepError):
        lsgd.assert_silent(verbs.sync, state, axis=("model", "worker"))


def test_a_gated_step_is_not_silent():
    verbs = cluster("mesh", "average")
    state, batch = verbs.init(network()), verbs.put(batches(1)[0])
    with pytest.raises(lsgd.NoisyStepError, match="branch 2 of 2"):
        lsgd.assert_silent(lsgd.gated(verbs, lsgd.every(4)), state, batch)


@pytest.mark.parametrize(
    "place, axis, message",
    [
        ("simulate", "worker", "lie on no mesh"),
        ("mesh", "workers", r"has the axes \('worker',\), and no 'workers'"),
        ("one_device", "worker", "'worker' has a single place"),
    ],
)
def test_a_proof_that_would_prove_nothing_is_refused(place, axis, message):
    verbs = cluster(place, "average")
    state, batch = verbs.init(network()), verbs.put(batches(1)[0])
    with pytest.raises(ValueError, match=r"assert_silent\(.*" + message):
        lsgd.assert_silent(verbs.step, state, batch, axis=axis)


def test_a_program_kept_on_disk_does_not_bring_stale_lines(tmp_path):
    """Two equal programs from different lines, with JAX's cache on."""

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
            (entry,) = lsgd.ledger(*spread(function, ["worker"], shape=(24,)))
            assert entry.source[:2] == line_of(function, "psum")
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_the_call_to_blame_is_the_users():
    package = jax.__file__
    own = lsgd.__file__
    calls = (Frame(own, 1), Frame(package, 2), Frame("a.py", 3), Frame("b.py", 4))
    assert sources.culprit(calls) == Frame("a.py", 3)
    assert sources.culprit(calls[:2]) == Frame(own, 1)
    assert sources.culprit(()) is None


def test_who_asked_for_the_program_is_not_to_blame():
    verbs = cluster("mesh", "average")
    (entry,) = lsgd.ledger(verbs.sync, verbs.init(network()))
    assert entry.source.file.endswith("collectives.py")


@pytest.mark.parametrize("shift", [1, 0])
def test_stack_frames_of_both_numberings(shift):
    text = textwrap.dedent(
        f"""
        FileNames
        1 "step.py"

        FunctionNames
        1 "main"
        2 "step"

        FileLocations
        1 {{file_name_id=1 function_name_id=1 line=9 end_line=9 column=1}}
        2 {{file_name_id=1 function_name_id=2 line=4 end_line=4 column=1}}

        StackFrames
        1 {{file_location_id=1 parent_frame_id={shift}}}
        2 {{file_location_id=2 parent_frame_id={1 + shift}}}

        """
    )
    found = sources.frames(text)
    assert sources.calls_of("metadata={stack_frame_id=2}", found) == (
        Frame("step.py", 4, "step"),
        Frame("step.py", 9, "main"),
    )
    assert sources.calls_of('source_file="x.py" source_line=3', found) == (
        Frame("x.py", 3),
    )
    assert sources.calls_of("replica_groups={}", found) == ()
