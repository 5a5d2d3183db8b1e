"""Meshes of workers: positions across slices and processes, and invalid arguments."""

import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from harness.paths import PROGRAMS, PYTHONPATH
from harness.selection import in_full
from programs.slice_meshes import SLICE_MESHES, check_slice_mesh

import localsgd_jax as lsgd
from localsgd_jax.analysis import compile_targets
from localsgd_jax.distributed import meshes


def device(device_id, process_index, **attributes):
    """Returns a device that is not present."""
    return types.SimpleNamespace(
        id=device_id,
        process_index=process_index,
        platform="cpu",
        device_kind="cpu",
        **attributes,
    )


def process_of_positions(mesh):
    return np.vectorize(lambda d: d.process_index)(mesh.devices).tolist()


@pytest.fixture
def mesh_of_absent_devices(monkeypatch):
    """Replaces `Mesh`, which accepts only devices that are present."""
    monkeypatch.setattr(
        meshes,
        "Mesh",
        lambda grid, names, axis_types: types.SimpleNamespace(
            devices=grid, axis_names=names
        ),
    )


@pytest.mark.usefixtures("mesh_of_absent_devices")
def test_worker_axis_goes_across_processes():
    eight = [device(i, i // 4) for i in range(8)]
    mesh = lsgd.worker_mesh(devices=eight[::-1])
    assert process_of_positions(mesh) == [0] * 4 + [1] * 4
    mesh = lsgd.worker_mesh(inner_axes={"model": 2}, devices=eight)
    assert mesh.axis_names == ("worker", "model")
    assert process_of_positions(mesh) == [[0, 0], [0, 0], [1, 1], [1, 1]]
    mesh = lsgd.worker_mesh(6, devices=eight)
    assert process_of_positions(mesh) == [0] * 3 + [1] * 3
    mesh = lsgd.worker_mesh(2, inner_axes={"m": 2}, devices=eight)
    assert process_of_positions(mesh) == [[0, 0], [1, 1]]


@pytest.mark.usefixtures("mesh_of_absent_devices")
def test_worker_may_span_processes():
    eight = [device(i, i // 4) for i in range(8)]
    mesh = lsgd.worker_mesh(inner_axes={"model": 8}, devices=eight)
    assert process_of_positions(mesh) == [[0] * 4 + [1] * 4]
    mesh = lsgd.worker_mesh(1, inner_axes={"data": 2, "model": 4}, devices=eight)
    assert process_of_positions(mesh) == [[[0] * 4, [1] * 4]]
    sixteen = [device(i, i // 4) for i in range(16)]
    mesh = lsgd.worker_mesh(4, inner_axes={"model": 8}, devices=sixteen)
    assert process_of_positions(mesh) == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
    mesh = lsgd.worker_mesh(1, inner_axes={"model": 8}, devices=sixteen)
    assert process_of_positions(mesh) == [[0] * 4 + [1] * 4]


@pytest.mark.usefixtures("mesh_of_absent_devices")
def test_worker_axis_goes_across_slices():
    pod = [device(i, i // 2, slice_index=i // 4) for i in range(8)]
    mesh = lsgd.worker_mesh(inner_axes={"model": 4}, devices=pod)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices).tolist()
    assert slices == [[0] * 4, [1] * 4]
    mesh = lsgd.worker_mesh(2, devices=pod)
    assert [d.slice_index for d in mesh.devices.flat] == [0, 1]


def tpu_slices(count, shape):
    """Returns the devices of TPU v5e slices, in the order of their coordinates."""
    columns, rows = shape
    return [
        types.SimpleNamespace(
            id=slice_index * 100_000 + row * columns + column,
            process_index=(slice_index * rows + row) // 2,
            slice_index=slice_index,
            coords=(column, row, 0),
            core_on_chip=0,
            platform="tpu",
            device_kind="TPU v5 lite",
        )
        for slice_index in range(count)
        for row in range(rows)
        for column in range(columns)
    ]


@pytest.mark.usefixtures("mesh_of_absent_devices")
@pytest.mark.parametrize("case", SLICE_MESHES, ids=str)
def test_worker_mesh_of_slices(case):
    check_slice_mesh(case, tpu_slices(case.slices, case.chips))


@pytest.mark.usefixtures("mesh_of_absent_devices")
def test_inner_axes_span_neighbouring_chips():
    """A worker on half a slice is a block of 4x2 chips."""
    mesh = lsgd.worker_mesh(8, inner_axes={"fsdp": 8}, devices=tpu_slices(4, (4, 4)))
    for row in mesh.devices:
        columns, rows, _ = zip(*(device.coords for device in row), strict=True)
        assert {len(set(columns)), len(set(rows))} == {4, 2}


@pytest.mark.usefixtures("mesh_of_absent_devices")
def test_parts_of_slices_keep_the_order_of_the_devices():
    """Six chips are not a cuboid, but have a layout."""
    part = tpu_slices(1, (4, 4))[:6]
    mesh = lsgd.worker_mesh(3, inner_axes={"fsdp": 2}, devices=part)
    assert mesh.devices.ravel().tolist() == part


@pytest.mark.full
@pytest.mark.parametrize("family", ["tpu", "gpu"])
def test_worker_mesh_of_compile_targets(family):
    """The devices of compilers, in a child process, since these load before JAX."""
    if not compile_targets.is_compiler_installed(family):
        pytest.skip(compile_targets.install_command(family))
    done = subprocess.run(
        [sys.executable, "slice_meshes.py", family],
        cwd=PROGRAMS,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.endswith("all meshes are right\n"), done.stderr


@pytest.mark.usefixtures("mesh_of_absent_devices")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"workers": 3}, "must be a multiple of the 2 processes or slices, got 3"),
        (
            {"inner_axes": {"model": 3}},
            r"workers of 3 devices must divide .*, got groups of \[4, 4\] devices",
        ),
        in_full(
            {"workers": 1, "inner_axes": {"model": 6}},
            "workers of 6 devices must divide",
        ),
        ({"inner_axes": {"model": 0}}, "the size of an axis must be at least 1, got 0"),
    ],
)
def test_indivisible_devices_raise(arguments, message):
    eight = [device(i, i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=message):
        lsgd.worker_mesh(**arguments, devices=eight)


@pytest.mark.usefixtures("mesh_of_absent_devices")
def test_workers_that_straddle_slices_raise():
    """Three of four chips each: the second of four workers would be on two slices."""
    with pytest.raises(ValueError, match=r"got groups of \[4, 4, 4\] devices"):
        lsgd.worker_mesh(inner_axes={"fsdp": 3}, devices=tpu_slices(3, (2, 2)))
    unequal = [device(i, int(i > 1)) for i in range(6)]
    with pytest.raises(ValueError, match=r"got groups of \[2, 4\] devices"):
        lsgd.worker_mesh(inner_axes={"model": 3}, devices=unequal)
    mesh = lsgd.worker_mesh(inner_axes={"model": 2}, devices=unequal)
    assert process_of_positions(mesh) == [[0, 0], [1, 1], [1, 1]]
    mesh = lsgd.worker_mesh(inner_axes={"model": 6}, devices=unequal)
    assert process_of_positions(mesh) == [[0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"devices": []}, "(devices): must not be empty, got 0 devices"),
        ({"devices": 3}, "(devices): devices must be an iterable, got 3"),
        in_full({"devices": [1, 2]}, "(devices): must be a sequence of devices, got 1"),
        (
            {"inner_axes": {"worker": 1}},
            "(inner_axes): 'worker' is already the worker axis",
        ),
        (
            {"inner_axes": {"": 1}},
            "(inner_axes): axis names must be non-empty strings, got ''",
        ),
        in_full(
            {"inner_axes": {3: 1}},
            "(inner_axes): axis names must be non-empty strings, got 3",
        ),
        ({"inner_axes": ["model"]}, "(inner_axes): inner_axes must be a mapping"),
        in_full(
            {"inner_axes": [("model", 1)]}, "(inner_axes): inner_axes must be a mapping"
        ),
        ({"axis": ""}, "(axis): axis names must be non-empty strings, got ''"),
        in_full(
            {"axis": ("a", "b")},
            "(axis): axis names must be non-empty strings, got ('a', 'b')",
        ),
    ],
)
def test_invalid_mesh_arguments_raise(arguments, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        lsgd.worker_mesh(**arguments)
    assert str(caught.value).startswith("worker_mesh" + message)
    assert "\n" not in str(caught.value)


def test_duplicate_device_raises():
    message = r"worker_mesh\(devices\): must be distinct, got .* twice"
    with pytest.raises(ValueError, match=message):
        lsgd.worker_mesh(devices=[*jax.devices(), jax.devices()[0]])


def test_mesh_of_local_devices():
    assert dict(lsgd.worker_mesh(4).shape) == {"worker": 4}
    inner = lsgd.worker_mesh(inner_axes={"model": 2})
    assert dict(inner.shape) == {"worker": 4, "model": 2}
    assert lsgd.worker_mesh(12).size == 6


def test_submesh_keeps_positions_with_all_devices():
    mesh = lsgd.worker_mesh(inner_axes={"model": 2})
    kept = meshes.submesh(mesh, jax.devices()[:5])
    assert kept.devices.tolist() == mesh.devices[:2].tolist()
    message = r"submesh\(mesh, devices\): no position of .* has all its devices among"
    with pytest.raises(ValueError, match=message):
        meshes.submesh(mesh, [])
