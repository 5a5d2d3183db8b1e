"""Command line of the measurements, with a subprocess for each number of devices.

    python -m benchmarks                    all measurements that need only a CPU
    python -m benchmarks overhead --tiny    one, small enough to check that it runs
    python -m benchmarks accelerator        needs a GPU or a TPU
    python -m benchmarks pods --help        needs the compiler for TPUs, no TPU

Writes NAME.json and NAME.txt into --out (default: benchmark-results), and
benchmarks.png with all measurements found there.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import reporting, summary_figure

CPU_BENCHMARKS = {
    "overhead": "benchmarks.overhead",
    "scaling": "benchmarks.scaling",
    "startup": "benchmarks.import_time",
    "prediction": "benchmarks.cost_model_accuracy",
    "baselines": "benchmarks.baselines",
    "convolutions": "benchmarks.convolutions",
}
ACCELERATOR_BENCHMARKS = {"accelerator": "benchmarks.accelerator_lanes"}
BENCHMARKS = CPU_BENCHMARKS | ACCELERATOR_BENCHMARKS
# Each with its own options.
OWN_OPTIONS = {
    "control_variates": "benchmarks.control_variates",
    "convergence": "benchmarks.convergence",
    "goodput": "benchmarks.goodput",
    "mean_costs": "benchmarks.mean_costs",
    "pods": "benchmarks.pods.command",
    "sharded_rules": "benchmarks.sharded_rules",
}
DESCRIPTIONS = {
    "overhead": "a round over its local steps alone",
    "scaling": "time, memory and compile time over K, H and the number of parameters",
    "startup": "import and first step over jax and optax alone",
    "prediction": "predicted over measured times of rounds",
    "baselines": "comparison with plain JAX, DrJAX, PyTorch, accelerate and torchft",
    "convolutions": "a CNN on CPUs over a plain loop with the same gradients",
    "accelerator": "lanes of a GPT on one GPU or TPU",
    "control_variates": "control variates and local SGD on heterogeneous w8a shards",
    "convergence": "held-out loss of DiLoCo and related algorithms",
    "goodput": "goodput under failures: lockstep, elastic and decoupled learners",
    "mean_costs": "means of many leaves and of fragments over a mean of one leaf",
    "pods": "memory, traffic and predicted times of a GPT on 32 to 512 TPU chips",
    "sharded_rules": "memory and traffic of each rule with 16 chips per worker",
}
SCRIPTS = """
other measurements, each with its own options:

    python -m benchmarks.slow_link              time to a loss over slow links (root)
    python -m benchmarks.slow_link.decoupled_nodes   the same on two Ray nodes (root)
    python -m benchmarks.rule_costs             bytes, state and time of every rule
    python -m benchmarks.simulation_throughput  simulated worker-steps per second
    python -m benchmarks.train_overhead         the training loop over a bare loop
    python -m benchmarks.checkpoint_digests     digests as a share of saving
"""


def load_module(name: str) -> Any:
    """Imports the module of a measurement."""
    return importlib.import_module((BENCHMARKS | OWN_OPTIONS)[name])


def parse_arguments() -> argparse.Namespace:
    listed = "".join(f"    {name:<13} {DESCRIPTIONS[name]}\n" for name in DESCRIPTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"measurements:\n\n{listed}{SCRIPTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all on CPU")
    parser.add_argument("--tiny", action="store_true", help="small enough for a test")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"NAME must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    return options


def run_in_process(name: str, devices: int, tiny: bool) -> None:
    """Runs one measurement in this process and prints its rows as JSON."""
    import jax

    if tiny or name not in ACCELERATOR_BENCHMARKS:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    print(json.dumps(load_module(name).run(devices, tiny)))


def run_in_subprocess(name: str, devices: int, tiny: bool) -> list[dict]:
    """Runs one measurement in another process and returns its rows."""
    command = [sys.executable, "-m", "benchmarks", name, "--devices", str(devices)]
    done = subprocess.run(
        [*command, *(["--tiny"] if tiny else [])],
        env=os.environ | {"NPROC": str(num_threads(devices))},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.returncode)  # Its stderr is shown already.
    return json.loads(done.stdout.splitlines()[-1])


def num_threads(devices: int) -> int:
    """Returns the number of threads of JAX.

    With fewer than two per device JAX 0.10 and 0.11 may stall; with many more than
    cores a small matrix product takes twice as long.
    """
    return max(2 * devices, len(os.sched_getaffinity(0)))


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name in OWN_OPTIONS:
        load_module(name).main(arguments)
        return
    options = parse_arguments()
    if options.devices:
        run_in_process(options.names[0], options.devices, options.tiny)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or CPU_BENCHMARKS:
        module = load_module(name)
        machine = reporting.machine()
        rows = [
            row
            for devices in module.DEVICES
            for row in run_in_subprocess(name, devices, options.tiny)
        ]
        result = {"name": name, "tiny": options.tiny, "machine": machine, "rows": rows}
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        title = module.__doc__.splitlines()[0]
        text = f"{name}: {title}\n{reporting.format_table(rows)}\n"
        (options.out / f"{name}.txt").write_text(text)
        print(text, flush=True)
    specs = {name: load_module(name).FIGURE for name in CPU_BENCHMARKS}
    summary_figure.plot(options.out, specs)


if __name__ == "__main__":
    main()
