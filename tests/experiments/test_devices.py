"""Devices of a command-line run."""

import types

import jax
import pytest

from localsgd_jax.experiments import devices


@pytest.mark.parametrize(
    "workers, requested, expected",
    [(8, None, 8), (6, None, 6), (9, None, 3), (8, 2, 2)],
)
def test_number_of_devices_divides_the_workers(workers, requested, expected):
    mesh = devices.make_local_mesh(workers, requested)
    assert mesh.axis_names == ("worker",) and mesh.size == expected


@pytest.mark.parametrize(
    "workers, requested, expected",
    [(8, None, 4), (6, None, 3), (16, None, 4), (2, 2, 2)],
)
def test_accelerators_are_used_if_present(monkeypatch, workers, requested, expected):
    present = [types.SimpleNamespace(id=i, platform="gpu") for i in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: present)
    monkeypatch.setattr(devices, "Mesh", lambda chosen, names: list(chosen))
    assert devices.make_local_mesh(workers, requested) == present[:expected]
