"""Rows of methods: memory and traffic per step, and the step time of the cost model."""

from collections.abc import Sequence

from benchmarks.accelerator_lanes import PEAK_TFLOPS
from benchmarks.pods import gpt
from benchmarks.pods.methods import DATA_PARALLEL, LOCAL_STEP, METHODS
from localsgd_jax.planning.cost_model import Link, Workload, round_time

PERIOD = 100
# Assumptions: nothing of this kind is measured without the hardware.
PEAK_FRACTION = 0.4
CHIPS_PER_HOST = 4
LATENCY_SECONDS = 1e-4
GBIT_PER_HOST = (100, 25, 5)


def method_rows(rows: Sequence[dict], shape: gpt.Shape) -> list[dict]:
    """Returns a row for each pod and method, from the rows of the programs.

    Args:
      rows: rows of the programs of one model.
      shape: the model.

    Returns:
      Rows with memory in bytes per chip, traffic in bytes per chip and step, compile
      times, and `step_s` and `speedup` by Gbit/s per host.
    """
    pods = {(row["target"], row["slices"]): {} for row in rows}
    for row in rows:
        pods[row["target"], row["slices"]][row["program"]] = row
    return [
        row
        for programs in pods.values()
        for method in (DATA_PARALLEL, *METHODS)
        if method in programs
        for row in [_method_row(method, programs, shape)]
    ]


def _method_row(method: str, programs: dict, shape: gpt.Shape) -> dict:
    """Returns the row of a method on one pod."""
    is_local = method != DATA_PARALLEL
    step = programs[LOCAL_STEP if is_local else DATA_PARALLEL]
    parts = [step, programs[method]] if is_local else [step]
    case = {key: step[key] for key in ("target", "slices", "chips")}
    row = case | {"method": method}
    failures = [part["failure"] for part in parts if part["failure"]]
    if any(part.get("dcn_bytes", 0) is None for part in parts if not part["failure"]):
        failures.append("traffic not understood")
    row |= {
        "failure": "; ".join(failures),
        "compile_cpu_s": [part.get("compile_cpu_s") for part in parts],
    }
    if failures:
        return row
    # Arguments of a synchronisation are the state; the batch of a step is small.
    state = parts[-1]["argument_bytes"]
    return row | {
        "state_bytes": state,
        "peak_bytes": state + max(part["temp_bytes"] for part in parts),
        "ici_bytes": _per_step("ici_bytes", method, parts),
        "dcn_bytes": _per_step("dcn_bytes", method, parts),
        "predicted": _predict(method, programs, shape),
    }


def _per_step(name: str, method: str, parts: Sequence[dict]) -> float:
    """Returns the bytes per step, with one cycle of rounds per period."""
    step, *syncs = parts
    return step[name] + sum(sync[name] for sync in syncs) / PERIOD


def step_seconds(shape: gpt.Shape) -> float:
    """Returns the assumed seconds of a local step."""
    peak = PEAK_TFLOPS["TPU v5 lite"] * 1e12
    return shape.flops_per_device / (PEAK_FRACTION * peak)


def _predict(method: str, programs: dict, shape: gpt.Shape) -> dict[str, dict]:
    """Returns step time and speedup over data parallel by Gbit/s per host."""
    predicted = {}
    for gbit in GBIT_PER_HOST:
        seconds = predicted_step_seconds(method, programs, shape, gbit)
        baseline = predicted_step_seconds(DATA_PARALLEL, programs, shape, gbit)
        predicted[str(gbit)] = {"step_s": seconds, "speedup": baseline / seconds}
    return predicted


def predicted_step_seconds(
    method: str, programs: dict, shape: gpt.Shape, gbit: float
) -> float:
    """Returns the seconds per step that the cost model predicts.

    The link of a worker is that of all hosts of its slice. The bits per parameter are
    those of the all-reduce that sends as many bytes as the compiled program.
    """
    row = programs[method]
    slices, chips = row["slices"], row["chips"] // row["slices"]
    bandwidth = chips / CHIPS_PER_HOST * gbit * 1e9 / 8
    chosen = METHODS.get(method)
    workload = Workload(
        workers=slices,
        step_seconds=step_seconds(shape),
        parameters=shape.parameters,
        bits=8 * chips * row["dcn_bytes"] / _ring_factor(slices) / shape.parameters,
        fragments=chosen.fragments if chosen else 1,
        overlap_steps=chosen.overlap_steps if chosen else 0,
    )
    period = PERIOD if chosen else 1
    return round_time(workload, Link(LATENCY_SECONDS, bandwidth), period) / period


def _ring_factor(workers: int) -> float:
    """Returns the bytes that a worker sends per byte of a ring all-reduce."""
    return 2 * (workers - 1) / workers
