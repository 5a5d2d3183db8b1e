"""Import and start of Ray, and signals to its processes."""

import contextlib
import os
import signal
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_OBJECT_STORE_BYTES = 200 * 2**20


def import_ray(call: str) -> ModuleType:
    """Imports ray or raises an ImportError with the install command."""
    # Without this variable Ray listens on the address of the network interface.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(f"{call}() needs Ray: pip install 'ray[default]'") from None
    return ray


def connect(ray: ModuleType, address: str | None, cpus: int) -> bool:
    """Connects to a cluster, or starts Ray on this machine.

    Args:
      ray: the module.
      address: address of a cluster, "auto", or None for this machine.
      cpus: logical CPUs of this machine.

    Returns:
      Whether Ray was started or connected by this call.

    Raises:
      ConnectionError: if there is no cluster at the address, or it has another version
        of Ray or Python.
    """
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    # Without an address Ray connects to a cluster that it finds on this machine.
    options["address"] = address or "local"
    if address is None:
        options |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConnectionError(f"run(address={address!r}): {line}") from error
    return True


def check_room(
    ray: ModuleType, learners: int, processes: int, resources: Mapping[str, float]
) -> None:
    """Raises unless the cluster can hold the least number of learners.

    Args:
      ray: the module.
      learners: least number of learners.
      processes: processes of each.
      resources: resources of each process.

    Raises:
      RuntimeError: names the first resource of which there is too little.
    """
    total = ray.cluster_resources()
    for name, amount in resources.items():
        needed = learners * processes * amount
        if total.get(name, 0) < needed:
            raise RuntimeError(
                f"run(resources): {learners} learners need {needed:g} "
                f"{name}, the cluster has {total.get(name, 0):g}"
            )


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Returns the options of an actor with these resources."""
    known = {"CPU": "num_cpus", "GPU": "num_gpus"}
    options: dict[str, Any] = {
        known[name]: amount for name, amount in resources.items() if name in known
    }
    options.setdefault("num_cpus", 0)
    others = {name: x for name, x in resources.items() if name not in known}
    return options | {"resources": others}


def placement_groups(
    ray: ModuleType, learners: int, processes: int, resources: Mapping[str, float]
) -> list[Any]:
    """Reserves resources so that the processes of a learner start together.

    Args:
      ray: the module.
      learners: greatest number of learners.
      processes: processes of each.
      resources: resources of each process.

    Returns:
      A placement group for each learner, None if it has one process.
    """
    if processes == 1:
        return [None] * learners
    bundles = [dict(resources)] * processes
    return [ray.util.placement_group(bundles) for _ in range(learners)]


def placements(group: Any, processes: int) -> list[dict[str, Any]]:
    """Returns actor options that place the processes of a learner.

    Args:
      group: placement group of the learner, or None.
      processes: number of its processes.
    """
    if group is None:
        return [{}] * processes
    from ray.util import (  # pyright: ignore[reportMissingImports]
        scheduling_strategies,
    )

    strategy = scheduling_strategies.PlacementGroupSchedulingStrategy
    return [
        {"scheduling_strategy": strategy(group, placement_group_bundle_index=index)}
        for index in range(processes)
    ]


def kill_process(ray: ModuleType, node: str, pid: int) -> None:
    """Sends SIGKILL to a process of a node, also if it is stopped.

    Args:
      ray: the module.
      node: id of the node.
      pid: id of the process.
    """
    from ray.util import (  # pyright: ignore[reportMissingImports]
        scheduling_strategies,
    )

    strategy = scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_send_kill).options(num_cpus=0, scheduling_strategy=strategy)
    ray.wait([task.remote(pid)], timeout=10)


def _send_kill(pid: int) -> None:
    """Sends SIGKILL to a process of this node."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
