"""Child process: batches of sharded workers on the devices of several processes.

    python batch_layout_worker.py COORDINATOR_ADDRESS NUM_PROCESSES PROCESS_ID

Prints one line of JSON: whether all shards are right, and the losses of a run.
"""

import json
import os
import sys

os.environ.setdefault("NPROC", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd

WORKERS, WIDTH, STEPS = 2, 8, 4


def loss_fn(params, batch):
    return jnp.mean((batch @ params) ** 2)


def make_batches():
    rng = np.random.default_rng(0)
    return [
        rng.normal(size=(WORKERS, 4, WIDTH)).astype(np.float32) for _ in range(STEPS)
    ]


def initial_params():
    return np.eye(WIDTH, dtype=np.float32)


def meshes() -> dict[str, Mesh]:
    """Workers inside processes, and workers of which each spans both processes."""
    devices = np.array(jax.devices()).reshape(2, 2)
    kinds = (AxisType.Auto,) * 2
    return {
        "inside": Mesh(devices, ("worker", "fsdp"), axis_types=kinds),
        "across": Mesh(devices.T, ("worker", "fsdp"), axis_types=kinds),
    }


def has_shards(x, values, shape):
    """Returns whether the shards of this process have a shape and these values."""
    return len(x.addressable_shards) == 2 and all(
        shard.data.shape == shape and np.array_equal(shard.data, values[shard.index])
        for shard in x.addressable_shards
    )


def layouts(cluster, mesh, rows):
    """Checks host batches with all rows and with local rows, and placed batches."""
    batch, stacked = make_batches()[0], np.stack(make_batches())
    # A process may also hold only the examples of its devices.
    sharding = NamedSharding(mesh, P("worker", "fsdp"))
    indices = sharding.addressable_devices_indices_map(batch.shape)
    blocks = [jax.device_put(batch[index], device) for device, index in indices.items()]
    placed = jax.make_array_from_single_device_arrays(batch.shape, sharding, blocks)
    one, several = (1, 2, WIDTH), (STEPS, 1, 2, WIDTH)
    put = cluster.shard_batch
    return {
        "all rows": has_shards(put(batch), batch, one),
        "local rows": has_shards(put(batch[rows]), batch, one),
        "placed": has_shards(put(placed), batch, one),
        "all rows, time": has_shards(put(stacked, time=True), stacked, several),
        "local rows, time": has_shards(
            put(stacked[:, rows], time=True), stacked, several
        ),
    }


def main() -> None:
    """Checks the layouts on both meshes and trains on each."""
    address, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    lsgd.initialize(address, processes, process)
    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.1), rule=lsgd.average())
    results = {}
    for name, mesh in meshes().items():
        cluster = lsgd.on_mesh(algorithm, mesh)
        rows = lsgd.local_workers(cluster)
        right = layouts(cluster, mesh, rows)
        replicated = lsgd.on_mesh(algorithm, mesh, batch_spec=P())
        batch = make_batches()[0]
        unsplit = replicated.shard_batch(batch)
        right["replicated"] = has_shards(unsplit, batch, (1, 4, WIDTH))
        state = cluster.init(initial_params())
        data = [batch[rows] for batch in make_batches()]
        _, history = lsgd.train(cluster, state, data, schedule=2, progress=False)
        results[name] = {
            "rows": rows.tolist(),
            "right": right,
            "loss": history["loss"].tolist(),
        }
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_preemption_service", False)
    main()
