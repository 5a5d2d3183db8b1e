"""Collectives across TPU slices and hosts: groups, bytes on ICI and DCN, overlap."""

import json
import os
import re
import subprocess
import sys

import pytest
from analysis.test_audit import audit_for_target, skip_without_compiler
from analysis.test_collective_ops import module_text
from harness.paths import PROGRAMS, PYTHONPATH, ROOT
from harness.selection import in_full

from localsgd_jax.analysis import (
    Frame,
    compile_targets,
    format_table,
    parse_collective_ops,
    total_bytes_sent,
)
from localsgd_jax.analysis.device_layout import DeviceLayout, make_layout
from localsgd_jax.analysis.ring_bytes import (
    DCN_BYTES_FACTOR,
    RING_BYTES_FACTOR,
    sent_bytes,
)


def slices(order, devices_per_slice=4, **sizes):
    """Returns a mesh of TPU slices; `order` has the devices slice by slice."""
    devices = [divmod(device, devices_per_slice) for device in order]
    ids = tuple((one + 1) * 100_000 + local for one, local in devices)
    return DeviceLayout(sizes, ids, tuple(one for one, _ in devices))


TWO = slices(range(8), worker=2, fsdp=4)
EIGHT = slices(range(8), worker=8)
FOUR = slices(range(16), pod=2, worker=2, fsdp=4)


def transfer(kind, target, operand="8,128", result="8,128", rendezvous="psum.7_0"):
    """Returns the four instructions of a transfer, as the TPU compiler prints them."""
    attributes = (
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",'
        f'_xla_host_transfer_rendezvous="{rendezvous}",'
        f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
    )
    done = (
        "is_host_transfer=true, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    )
    context = "{1,0:T(8,128)}, u32[]{:S(2)}, token[])"
    return [
        f"%s = (f32[{operand}]{context} send(%x, %t), channel_id=2, {attributes}",
        f"%r = (f32[{result}]{context} recv(%t), channel_id=1, {attributes}",
        f"%sd = token[] send-done(%s), channel_id=2, {done}",
        f"%rd = (f32[{result}]{{1,0:T(8,128)}}, token[]) recv-done(%r), channel_id=1, "
        + done,
    ]


def program(*instructions, operand="8,128"):
    """Returns the module of one of several slices with four devices."""
    return module_text(
        "\n".join(
            [
                f"%x = f32[{operand}]{{1,0}} parameter(0)",
                "%t = token[] after-all()",
                *instructions,
            ]
        ),
        devices=4,
    )


PRODUCT = '"{1,2}x{0:3}"'
LISTS = "{{100000,300000},{100001,300001},{200000,400000},{200001,400001}}"
ALL = "{{100000,100001,100002,100003,200000,200001,200002,200003}}"
PAIRS = "{{100003->200000},{200003->100000}}"
SIZE = 8 * 128 * 4


@pytest.mark.parametrize(
    "mesh, kind, target, result, name, axes, ici, dcn",
    [
        (TWO, "ALL_REDUCE", PRODUCT, "8,128", "all-reduce", "worker", 0, SIZE),
        (TWO, "ALL_GATHER", PRODUCT, "16,128", "all-gather", "worker", 0, SIZE),
        (TWO, "REDUCE_SCATTER", PRODUCT, "4,128", "reduce-scatter", "worker", 0, 0.5),
        (FOUR, "ALL_REDUCE", LISTS, "8,128", "all-reduce", "pod", 0, SIZE),
        (EIGHT, "ALL_TO_ALL", ALL, "8,128", "all-to-all", "worker", 3 / 8, 1 / 2),
        (EIGHT, "ONE_TO_ONE", PAIRS, "8,128", "collective-permute", "worker", 0, SIZE),
    ],
)
def test_transfer_of_each_kind(mesh, kind, target, result, name, axes, ici, dcn):
    text = program(*transfer(kind, target, result=result))
    (op,) = parse_collective_ops(text, mesh)
    assert (op.name, op.axes, op.bytes, op.dtypes) == (name, (axes,), SIZE, ("f32",))
    # Fractions are those of the operand.
    expected = [x * SIZE if 0 < x < 1 else x for x in (ici, dcn)]
    assert [op.ici_bytes_sent, op.dcn_bytes_sent] == expected
    assert op.bytes_sent == sum(expected)


def test_groups_of_each_form_are_positions():
    four = slices(range(16), worker=4, fsdp=4)
    text = program(*transfer("ALL_REDUCE", '"{1,2,3,4}x{0:1,3}"'))
    (op,) = parse_collective_ops(text, four)
    assert op.groups == ((0, 4, 8, 12), (1, 5, 9, 13), (3, 7, 11, 15))
    assert op.dcn_bytes_sent == 2 * 3 / 4 * SIZE
    (op,) = parse_collective_ops(program(*transfer("ALL_REDUCE", LISTS)), FOUR)
    assert op.groups == ((0, 8), (1, 9), (4, 12), (5, 13))
    (op,) = parse_collective_ops(program(*transfer("ONE_TO_ONE", PAIRS)), EIGHT)
    assert op.groups == ((3, 4), (7, 0))


@pytest.mark.parametrize(
    "mesh, groups, axes, positions",
    [
        (TWO, "{{0,1,2,3}}", ("fsdp",), ((0, 1, 2, 3), (4, 5, 6, 7))),
        (EIGHT, "{{0,2},{1,3}}", ("worker",), ((0, 2), (1, 3), (4, 6), (5, 7))),
        # Slices alternate along the mesh: local devices 0, 1, … are not positions.
        (
            slices([0, 4, 1, 5, 2, 6, 3, 7], fsdp=4, worker=2),
            "{{0,1,2,3}}",
            ("fsdp",),
            ((0, 2, 4, 6), (1, 3, 5, 7)),
        ),
        (
            slices([0, 1, 4, 5, 2, 3, 6, 7], a=4, b=2),
            "{{0,2},{1,3}}",
            ("a",),
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
    ],
)
def test_groups_inside_slices_are_positions(mesh, groups, axes, positions):
    text = program(f"%a = f32[8,128]{{1,0}} all-reduce(%x), replica_groups={groups}")
    (op,) = parse_collective_ops(text, mesh)
    assert (op.axes, op.groups, op.dcn_bytes_sent) == (axes, positions, 0)


def test_workers_that_share_a_slice_have_both_parts():
    """The mean over eight workers on two slices, as compiled for v5e 2x2."""
    text = (
        program(
            "%a = f32[32,128]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}",
            *transfer("ALL_REDUCE", PRODUCT)[:1],
            *transfer("ALL_REDUCE", PRODUCT)[1:],
            "%q = f32[8,128]{1,0} get-tuple-element(%rd), index=0",
            "%g = f32[32,128]{1,0} all-gather(%q), replica_groups={{0,1,2,3}}",
            operand="32,128",
        )
        .replace("send(%x", "send(%part")
        .replace(
            "%t = token[]",
            "%part = f32[8,128]{1,0} slice(%x), slice={[0:8], [0:128]}\n  %t = token[]",
        )
    )
    inside, across, gather = parse_collective_ops(text, EIGHT)
    assert [op.axes for op in (inside, across, gather)] == [("worker",)] * 3
    assert inside.ici_bytes_sent == inside.bytes_sent == 2 * 3 / 4 * 4 * SIZE
    assert across.dcn_bytes_sent == across.bytes_sent == SIZE
    assert gather.ici_bytes_sent == 3 * SIZE
    ops = (inside, across, gather)
    assert total_bytes_sent(ops, "worker", "dcn") == (SIZE, SIZE)
    assert total_bytes_sent(ops, "worker", "ici") == (9 * SIZE, 9 * SIZE)
    assert total_bytes_sent(ops, "worker") == (10 * SIZE, 10 * SIZE)
    row = format_table(ops).splitlines()[2].split()
    assert row[2:5] == [str(SIZE), "0", str(SIZE)]


def test_total_of_an_unknown_network_raises():
    with pytest.raises(ValueError, match=r"\(network\): network must be"):
        total_bytes_sent((), network="nvlink")


def test_overlap_and_source_of_a_transfer():
    send, recv, send_done, recv_done = transfer("ALL_REDUCE", PRODUCT)
    text = program(
        send,
        "%early = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%inner",
        recv,
        "%c = f32[8,128]{1,0} convolution(%x, %x), dim_labels=bf_io->bf",
        '%z = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"',
        send_done,
        "%f = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%inner",
        recv_done,
        "%late = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%inner, metadata={"
        'source_file="late.py" source_line=1}',
        "%q = f32[8,128]{1,0} get-tuple-element(%rd), index=0",
        "%m = f32[8,128]{1,0} multiply(%q, %q), metadata={"
        'source_file="step.py" source_line=7}',
    ).replace(
        "\n\nENTRY",
        "\n\n%inner (p: f32[8,128]) -> f32[8,128] {\n"
        "  ROOT %p = f32[8,128]{1,0} parameter(0)\n}\n\nENTRY",
    )
    (op,) = parse_collective_ops(text, TWO)
    assert op.overlapped_ops == ("convolution", "fusion")
    assert op.source == Frame("step.py", 7)


def test_transfer_in_a_branch_of_a_loop():
    start = transfer("ALL_REDUCE", PRODUCT)
    text = module_text(
        """
        %x = f32[8,128]{1,0} parameter(0)
        ROOT %w = f32[8,128]{1,0} while(%x), condition=%test, body=%body, """
        """backend_config={"known_trip_count":{"n":"5"}}
        """,
        devices=4,
        rest="\n".join(
            [
                "%sync (x: f32[8,128]) -> f32[8,128] {",
                "  %x = f32[8,128]{1,0} parameter(0)",
                "  %t = token[] after-all()",
                *("  " + line for line in start),
                "  ROOT %q = f32[8,128]{1,0} get-tuple-element(%rd), index=0",
                "}\n",
                "%skip (y: f32[8,128]) -> f32[8,128] {",
                "  ROOT %y = f32[8,128]{1,0} parameter(0)",
                "}\n",
                "%body (b: f32[8,128]) -> f32[8,128] {",
                "  %b = f32[8,128]{1,0} parameter(0)",
                "  %i = s32[] constant(1)",
                "  ROOT %c = f32[8,128]{1,0} conditional(%i, %b, %b), "
                "branch_computations={%skip, %sync}",
                "}\n",
                "%test (z: f32[8,128]) -> pred[] {",
                "  %z = f32[8,128]{1,0} parameter(0)",
                "  ROOT %p = pred[] constant(false)",
                "}",
            ]
        ),
    )
    (op,) = parse_collective_ops(text, TWO)
    assert (op.trip_count, op.in_branch, op.in_loop) == (5, True, True)
    assert total_bytes_sent([op], network="dcn") == (0, 5 * SIZE)


@pytest.mark.parametrize(
    "mesh, lines, problem",
    [
        (TWO, transfer("BROADCAST", PRODUCT), "transfer across slices 'BROADCAST'"),
        (TWO, transfer("ALL_REDUCE", '"{1,2}"'), "transfer across slices to '{1,2}'"),
        (TWO, transfer("ALL_REDUCE", PAIRS), "transfer across slices to"),
        (TWO, transfer("ALL_TO_ALL", PRODUCT), "transfer across slices to"),
        (TWO, transfer("ALL_GATHER", PRODUCT), "of 4096 bytes that receives 4096"),
        (FOUR, transfer("ALL_REDUCE", '"{7,8}x{0:3}"'), "device 700000 outside the"),
        ({"worker": 8}, transfer("ALL_REDUCE", PRODUCT), "without a mesh"),
        (None, transfer("ALL_REDUCE", PRODUCT), "without a mesh"),
        (TWO, transfer("ALL_REDUCE", PRODUCT)[:1], "send across slices without a recv"),
        (TWO, transfer("ALL_REDUCE", PRODUCT)[1:2], "recv from the host"),
    ],
)
def test_unreadable_transfer_counts_for_every_axis(mesh, lines, problem):
    (op,) = parse_collective_ops(program(*lines), mesh)
    assert (op.name, op.axes) == ("not understood", None)
    assert problem in op.problem
    assert total_bytes_sent([op], "anything") == (0, float("inf"))
    assert op.ici_bytes_sent == op.dcn_bytes_sent == float("inf")
    assert format_table([op]).splitlines()[1].count("?") == 3


def test_two_transfers_are_paired_by_their_rendezvous():
    first = transfer("ALL_REDUCE", PRODUCT, rendezvous="a")
    second = [
        line.replace("%s", "%s2").replace("%r", "%r2").replace("%sd", "%sd2")
        for line in transfer("ALL_REDUCE", PRODUCT, rendezvous="b")
    ]
    fusion = "%d = f32[8,128]{1,0} dot(%x, %x)"
    text = program(*second[:2], *first, fusion, *second[2:])
    late, early = parse_collective_ops(text, TWO)
    assert (late.overlapped_ops, early.overlapped_ops) == (("dot",), ())


# Bytes of groups that extend over several slices or hosts.


@pytest.mark.parametrize("name", RING_BYTES_FACTOR)
def test_dcn_part_of_the_ring_formulas(name):
    ring, across = RING_BYTES_FACTOR[name], DCN_BYTES_FACTOR[name]
    assert across(8, 1) == 0
    assert across(8, 8) == pytest.approx(ring(8))
    assert 0 < across(8, 2) <= ring(8)


def test_hierarchical_parts_add_up():
    """Inside hosts of m devices, then across s hosts: the sum is the ring formula."""
    s, m, size = 2, 8, 1 << 20
    total, across = sent_bytes("all-reduce", size, [range(16)], [0] * m + [1] * m)
    assert total - across == pytest.approx(2 * (m - 1) / m * size)
    assert across == pytest.approx(2 * (s - 1) / s * size / m)
    total, across = sent_bytes("all-gather", size, [range(16)], [0] * m + [1] * m)
    assert total - across == (m - 1) * s * size


def test_hosts_of_other_devices_are_their_processes():
    class Device:
        def __init__(self, number, platform, **attributes):
            self.id, self.platform = number, platform
            self.process_index = number // 2
            vars(self).update(attributes)

    class Mesh:
        shape = {"worker": 4}

        def __init__(self, devices):
            self.devices = devices

    hosts = Mesh([Device(number, "gpu") for number in range(4)])
    assert make_layout(hosts).slices == (0, 0, 1, 1)
    one_slice = Mesh([Device(number, "tpu") for number in range(4)])
    assert make_layout(one_slice).slices == (0, 0, 0, 0)
    two = Mesh([Device(number, "tpu", slice_index=number % 2) for number in range(4)])
    assert make_layout(two).slices == (0, 1, 0, 1)
    # Compile-only GPUs all have the slice index 0.
    one_index = Mesh([Device(number, "gpu", slice_index=0) for number in range(4)])
    assert make_layout(one_index).slices == (0, 0, 1, 1)


# Notation of several slices.


@pytest.mark.parametrize(
    "target, message",
    [
        ("tpu:v5e:2x2x2", "two dimensions; for 2 slices write tpu:v5e:2x2:slices=2"),
        ("tpu:v6e:4x4x8", "write tpu:v6e:4x4:slices=8"),
        ("tpu:v5e:2x2:slices=0", "must look like tpu:v5e:2x4, tpu:v5e:4x4:slices=2"),
        ("tpu:v5e:2x2:2", "must look like"),
        ("tpu:2*v5e:2x2", "must look like"),
        ("gpu:h100:8:slices=2", "GPUs have no slices; for 2 hosts write gpu:h100:2x8"),
    ],
)
def test_misleading_targets_raise(target, message):
    with pytest.raises(ValueError, match="--target") as caught:
        compile_targets.topology_devices(target)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# With the compilers.


@pytest.mark.parametrize("family", [in_full("tpu")])
def test_guide_shows_what_the_audit_prints(family, tmp_path):
    """But for the source column, which depends on the installation."""
    skip_without_compiler(family)
    page = (ROOT / "docs/guides/communication_analysis.md").read_text()
    (code,) = re.findall(r"```python\n(# audited\.py\n.*?)```", page, re.DOTALL)
    (tmp_path / "audited.py").write_text(code)
    (shown,) = [
        block
        for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL)
        if "slices=2\n" in block
    ]
    command, _, expected = shown.partition("\n")
    done = subprocess.run(
        [sys.executable, "-m", "localsgd_jax", *command.split()[2:]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    column = expected.splitlines()[1].index("source")
    table = slice(1, 5)
    printed, wanted = done.stdout.splitlines(), expected.splitlines()
    assert [x[:column] for x in printed[table]] == [x[:column] for x in wanted[table]]
    assert printed[:1] + printed[5:] == wanted[:1] + wanted[5:]


@pytest.mark.parametrize("family", [in_full("tpu")])
def test_compiled_programs_of_several_slices(family):
    """Collectives, rules and kernels, in one child process."""
    skip_without_compiler(family)
    done = subprocess.run(
        [sys.executable, "slice_collectives.py"],
        cwd=PROGRAMS,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("all collectives are right\n"), done.stderr


@pytest.mark.parametrize("family", [in_full("gpu")])
def test_bytes_between_gpu_hosts(family):
    status, result = audit_for_target(
        family, "gated", "--kind", "gated", "--target", "gpu:h100:2x8"
    )
    assert (status, result["ok"]) == (0, True)
    assert result["devices"].endswith(" in 2 hosts")
    (op,) = result["collectives"]
    size = 256 * 512 * 4
    assert op["dcn_bytes_sent"] == pytest.approx(2 / 16 * size)
    assert op["ici_bytes_sent"] == pytest.approx(2 * 14 / 16 * size)
    assert result["dcn_bytes_sent"] == [0, op["dcn_bytes_sent"]]


# Bytes that a chip sends across slices; infinite where a step is not understood.
SLICE_PROGRAMS = {
    "all-reduce, one worker per slice": 4096,
    "all-reduce, two workers per slice": 4096,
    "all-reduce, worker across slices": 0,
    "all-reduce, devices in any order": 4096,
    "all-reduce inside, one worker per slice": None,
    "all-reduce inside, worker across slices": None,
    "permutation across, one way, one worker per slice": 4096,
    "permutation in slice 1 only, two workers per slice": 0,
    "permutation from slice 0, two workers per slice": 4096,
    "all-to-all, two workers per slice": 2048,
    "gather along both axes, one worker per slice": 4096,
    "nested loops, one worker per slice": 4096,
    "branch of a scan, one worker per slice": 4096,
    "debug print, one worker per slice": float("inf"),
    "pure callback, one worker per slice": float("inf"),
    "sort, two workers per slice": None,
}


@pytest.mark.parametrize("family", [in_full("tpu")])
def test_unusual_communication_between_workers_raises(family):
    """Real programs for two slices; None stands for steps that are allowed."""
    skip_without_compiler(family)
    done = subprocess.run(
        [sys.executable, PROGRAMS / "slice_programs.py"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows.keys() == SLICE_PROGRAMS.keys()
    for case, sent in SLICE_PROGRAMS.items():
        assert rows[case]["raises"] == (sent is not None), case
        if sent is not None:
            assert float(rows[case]["dcn_bytes"]) == sent, case
