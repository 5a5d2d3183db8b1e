"""Prints the schedule around each transfer between two TPU slices, as JSON.

The programs are those of `train` for a rule and a schedule, compiled for two slices of
v5e, and the gated step for comparison. Usage: overlap_schedules.py RULE.
"""

import json
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import localsgd_jax as lsgd
from localsgd_jax.training.dispatch import Dispatcher
from localsgd_jax.training.segments import next_segment

WIDTH, MAX_STEPS = 512, 64
DELAY = lsgd.interpolate(lsgd.delay(lsgd.diloco()), 0.5)
RULES = {
    "diloco": (lsgd.diloco(), lsgd.every(100)),
    "overlap": (lsgd.overlap(lsgd.diloco()), lsgd.every(100)),
    "overlap_short": (lsgd.overlap(lsgd.diloco()), lsgd.every(8)),
    "delay": (DELAY, lsgd.with_lead(lsgd.every(100), 5)),
    "streaming": (
        lsgd.fragment(DELAY, 2, rounds_per_fragment=2),
        lsgd.with_lead(lsgd.evenly_spaced(100, 2), 5),
    ),
}
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
ASSIGNMENT = re.compile(r"(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")


def loss_fn(params, x):
    hidden = jax.nn.gelu(x @ params["up"].astype(jnp.bfloat16))
    return jnp.mean((hidden @ params["down"].astype(jnp.bfloat16)) ** 2)


def two_slices():
    """Returns a mesh with one worker on each of two slices of four chips."""
    topology = topologies.get_topology_desc("v5e:2x2", "tpu", num_slices=2)
    devices = np.array(topology.devices).reshape(2, 4)
    return Mesh(devices, ("worker", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def shape(mesh, sizes, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))


def computations(text):
    """Returns the lines of each computation of a scheduled HLO module."""
    result, lines = {}, []
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            lines = result[match[1]] = []
        elif line.startswith("  "):
            lines.append(line.strip())
    return result


def has_matmul(name, program):
    """Returns whether a computation, or one that it calls, multiplies matrices."""
    text = "\n".join(program[name])
    called = set(CALLED.findall(text)) & set(program)
    return bool(re.search(r" (convolution|dot)\(", text)) or any(
        has_matmul(inner, program) for inner in called
    )


def read_transfers(text):
    """Returns, for each transfer between slices, whether local steps overlap."""
    program, result = computations(text), []
    for lines in program.values():
        for i, line in enumerate(lines):
            match = ASSIGNMENT.match(line)
            if not match or match[2] not in ("send", "recv"):
                continue
            done = re.compile(rf"-done\(.*%?{re.escape(match[1])}\)")
            end = next(j for j in range(i, len(lines)) if done.search(lines[j]))
            loops = [x for x in lines[i:end] if " while(" in x]
            bodies = [re.search(r"body=%?([\w.\-]+)", loop)[1] for loop in loops]
            result.append(
                {
                    "opcode": match[2],
                    "beside_local_steps": any(has_matmul(b, program) for b in bodies),
                }
            )
    return {"transfers": result, "conditionals": text.count(" conditional(")}


def programs_of_train(cluster, state, batch, schedule, steps=200):
    """Yields the lowered programs of `train` that synchronise, each once."""
    dispatcher = Dispatcher(cluster, None, state)
    alike, seen, step, round_number = dispatcher.round_programs.are_alike, set(), 0, 1
    while step < steps:
        segment = next_segment(schedule, step, MAX_STEPS, MAX_STEPS, alike)
        if period := segment.period:
            round_class = dispatcher.round_programs.choose(round_number)
            key = (segment.steps, period, round_class)
            if key not in seen:
                # Without weights of the rounds.
                arguments = state, batch(segment.steps), None, None
                lowered = dispatcher._rounds.lower(
                    *arguments, period=period, round_class=round_class
                )
                yield key, lowered
            seen.add(key)
        step, round_number = segment.end_step, round_number + sum(segment.due)


def main(name):
    mesh, (rule, schedule) = two_slices(), RULES[name]
    cluster = lsgd.on_mesh(
        lsgd.local_sgd(loss_fn, optax.sgd(0.1, momentum=0.9), rule=rule), mesh
    )
    state = cluster.init(
        {
            "up": shape(mesh, (WIDTH, 4 * WIDTH), P("fsdp")),
            "down": shape(mesh, (4 * WIDTH, WIDTH), P(None, "fsdp")),
        }
    )

    def batch(steps):
        spec = P(None, "worker", "fsdp")
        return shape(mesh, (steps, 2, 64, WIDTH), spec, jnp.bfloat16)

    step = lsgd.gated(cluster, schedule)
    gated = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))
    report = {"gated": read_transfers(gated.lower(state, batch(8)).compile().as_text())}
    report["train"] = [
        {"steps": key[0], "period": key[1]}
        | read_transfers(lowered.compile().as_text())
        for key, lowered in programs_of_train(cluster, state, batch, schedule)
    ]
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
