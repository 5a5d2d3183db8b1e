"""Meshes of workers: positions across slices and processes, and invalid arguments."""

import types

import jax
import numpy as np
import pytest
from harness.selection import in_full

import localsgd_jax as lsgd
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


@pytest.mark.usefixtures("mesh_of_absent_devices")
def test_worker_axis_goes_across_slices():
    pod = [device(i, i // 2, slice_index=i // 4) for i in range(8)]
    mesh = lsgd.worker_mesh(inner_axes={"model": 4}, devices=pod)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices).tolist()
    assert slices == [[0] * 4, [1] * 4]
    mesh = lsgd.worker_mesh(2, devices=pod)
    assert [d.slice_index for d in mesh.devices.flat] == [0, 1]


@pytest.mark.usefixtures("mesh_of_absent_devices")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"workers": 3}, "must be a multiple of the 2 processes or slices, got 3"),
        (
            {"inner_axes": {"model": 3}},
            "workers of 3 devices must divide the 8 devices",
        ),
        in_full(
            {"workers": 1, "inner_axes": {"model": 8}},
            "workers of 8 devices must divide",
        ),
        ({"inner_axes": {"model": 0}}, "the size of an axis must be at least 1, got 0"),
    ],
)
def test_indivisible_devices_raise(arguments, message):
    eight = [device(i, i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=message):
        lsgd.worker_mesh(**arguments, devices=eight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"devices": []}, "(devices): must not be empty, got 0 devices"),
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
        ({"inner_axes": ["model"]}, "(inner_axes): must map axis names to sizes, got"),
        in_full(
            {"inner_axes": [("model", 1)]}, "(inner_axes): must map axis names to sizes"
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
