"""HLO text: types, replica groups and source locations."""

import textwrap

import jax
import pytest

import localsgd_jax as lsgd
from localsgd_jax.analysis import Frame, parse_collective_ops
from localsgd_jax.analysis.hlo import parser, replica_groups, source_locations


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
def test_replica_groups_of_each_form(text, expected):
    assert replica_groups.parse_replica_groups(text, num_devices=4) == expected


@pytest.mark.parametrize("form", ["mesh['a'=4, device_ids=([4])] {'a'}", "V2[4]"])
def test_unknown_replica_groups_raise(form):
    with pytest.raises(NotImplementedError, match="unknown form: .*replica_groups="):
        replica_groups.parse_replica_groups(f"replica_groups={form}", 4)


@pytest.mark.parametrize(
    "groups, expected",
    [
        (((0, 1), (2, 3)), ("model",)),
        (((0, 2), (1, 3)), ("worker",)),
        (((0, 1, 2, 3),), ("worker", "model")),
        (((0, 3), (1, 2)), ("worker", "model")),
        (((0,), (1,), (2,), (3,)), ()),
    ],
)
def test_varying_axes(groups, expected):
    sizes = {"worker": 2, "one": 1, "model": 2}
    assert replica_groups.varying_axes(groups, sizes) == expected


def test_too_small_mesh_raises():
    with pytest.raises(ValueError, match="mesh of 2 devices .* with device 3"):
        replica_groups.varying_axes(((0, 3),), {"worker": 2})


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
def test_type_bytes(text, expected):
    assert parser.type_bytes(text) == expected


def test_text_without_entry_raises():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_collective_ops("HloModule m")


def test_user_frame():
    package = jax.__file__
    library = lsgd.__file__
    calls = (Frame(library, 1), Frame(package, 2), Frame("a.py", 3), Frame("b.py", 4))
    assert source_locations.user_frame(calls) == Frame("a.py", 3)
    assert source_locations.user_frame(calls[:2]) == Frame(library, 1)
    assert source_locations.user_frame(()) is None


@pytest.mark.parametrize("shift", [1, 0])
def test_stack_frames_with_either_parent_numbering(shift):
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
    stacks = source_locations.parse_stack_frames(text)
    assert source_locations.frames_of("metadata={stack_frame_id=2}", stacks) == (
        Frame("step.py", 4, "step"),
        Frame("step.py", 9, "main"),
    )
    assert source_locations.frames_of('source_file="x.py" source_line=3', stacks) == (
        Frame("x.py", 3),
    )
    assert source_locations.frames_of("replica_groups={}", stacks) == ()
