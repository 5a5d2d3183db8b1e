"""Child process: meshes of the devices that the TPU or GPU compiler describes.

    python slice_meshes.py tpu|gpu

Ends with the line "all meshes are right".
"""

import itertools
import sys
from typing import NamedTuple

import numpy as np

import localsgd_jax as lsgd
from localsgd_jax.analysis import compile_targets


class SliceMesh(NamedTuple):
    """Arguments of `worker_mesh` for TPU slices, and the expected mesh.

    Attributes:
      slices: number of slices.
      chips: columns and rows of each.
      workers: K, or None.
      inner: sizes of the axes inside a worker.
      shape: shape of the mesh.
    """

    slices: int
    chips: tuple[int, int]
    workers: int | None
    inner: tuple[int, ...]
    shape: tuple[int, ...]


SLICE_MESHES = [
    SliceMesh(4, (4, 4), 8, (8,), (8, 8)),
    SliceMesh(4, (4, 4), 16, (), (16,)),
    SliceMesh(4, (4, 4), 4, (4, 4), (4, 4, 4)),
    SliceMesh(4, (4, 4), 8, (4, 2), (8, 4, 2)),
    SliceMesh(4, (4, 4), 32, (2,), (32, 2)),
    SliceMesh(4, (4, 4), 64, (), (64,)),
    SliceMesh(4, (4, 4), 12, (4,), (12, 4)),
    SliceMesh(4, (4, 4), 4, (8,), (4, 8)),
    SliceMesh(4, (4, 4), 2, (32,), (2, 32)),
    SliceMesh(4, (4, 4), 1, (4, 16), (1, 4, 16)),
    SliceMesh(8, (8, 8), 8, (64,), (8, 64)),
    SliceMesh(8, (8, 8), 16, (32,), (16, 32)),
    SliceMesh(8, (8, 8), 4, (128,), (4, 128)),
    SliceMesh(8, (8, 8), None, (), (512,)),
]


def check_slice_mesh(case: SliceMesh, devices: list) -> None:
    """Raises unless workers are inside slices, or consist of whole slices."""
    names = ["x", "y"][: len(case.inner)]
    inner_axes = dict(zip(names, case.inner, strict=True))
    mesh = lsgd.worker_mesh(case.workers, inner_axes=inner_axes, devices=devices)
    assert mesh.devices.shape == case.shape
    assert mesh.axis_names == ("worker", *names)
    rows = mesh.devices.reshape(case.shape[0], -1)
    slices = [sorted({device.slice_index for device in row}) for row in rows]
    chips = case.chips[0] * case.chips[1]
    assert {len(each) for each in slices} == {max(1, rows.shape[1] // chips)}
    assert slices == sorted(slices)
    assert len({id(device) for device in rows.flat}) == rows.size


def check_tpu() -> None:
    """Checks the meshes of all topologies; needs the TPU compiler."""
    from jax.experimental import topologies

    # Prepares the environment of the compiler.
    compile_targets.topology_devices("tpu:v5e:2x2")
    for (count, chips), cases in itertools.groupby(SLICE_MESHES, lambda case: case[:2]):
        name = f"v5e:{chips[0]}x{chips[1]}"
        topology = topologies.get_topology_desc(name, "tpu", num_slices=count)
        for case in cases:
            check_slice_mesh(case, topology.devices)


def check_gpu() -> None:
    """Checks the meshes of two hosts with eight GPUs; needs the GPU compiler."""
    devices = compile_targets.topology_devices("gpu:h100:2x8")
    for workers, fsdp, shape in [(2, 8, (2, 8)), (4, 4, (4, 4)), (1, 16, (1, 16))]:
        mesh = lsgd.worker_mesh(workers, inner_axes={"fsdp": fsdp}, devices=devices)
        assert mesh.devices.shape == shape
        hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
        assert all(len(set(row)) == max(1, fsdp // 8) for row in hosts.tolist())


if __name__ == "__main__":
    {"tpu": check_tpu, "gpu": check_gpu}[sys.argv[1]]()
    print("all meshes are right")
