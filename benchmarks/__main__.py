"""Runs measurements, each for each number of devices in a process of its own.

    python -m benchmarks                    all that need but a CPU
    python -m benchmarks overhead --tiny    one, small enough to see that it works
    python -m benchmarks accelerator        the one that needs a GPU or a TPU

Writes NAME.json and NAME.txt into --out (default: benchmark-results), and
benchmarks.png with all measurements that are there.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import figure, record

NAMES = ("overhead", "scaling", "startup", "prediction", "peers")
ACCELERATED = ("accelerator",)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=", ".join(NAMES + ACCELERATED)
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in given.names:
        if name not in NAMES + ACCELERATED:
            parser.error(
                f"there is no measurement {name!r}; there are {NAMES + ACCELERATED}"
            )
    return given


def here(name: str, devices: int, tiny: bool) -> None:
    """Runs one measurement in this process and prints its rows."""
    import jax

    if tiny or name not in ACCELERATED:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    rows = importlib.import_module(f"benchmarks.{name}").run(devices, tiny)
    print(json.dumps(rows))


def elsewhere(name: str, devices: int, tiny: bool) -> list[dict]:
    """Runs one measurement in another process."""
    command = [sys.executable, "-m", "benchmarks", name, "--devices", str(devices)]
    done = subprocess.run(
        [*command, *(["--tiny"] if tiny else [])],
        env=os.environ | {"NPROC": str(threads(devices))},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.returncode)  # It has said why.
    return json.loads(done.stdout.splitlines()[-1])


def threads(devices: int) -> int:
    """Returns how many threads JAX gets.

    With fewer than two for each device JAX 0.10 and 0.11 starve; with many more than
    there are cores a small matrix product takes twice as long.
    """
    return max(2 * devices, len(os.sched_getaffinity(0)))


def main() -> None:
    given = arguments()
    if given.devices:
        here(given.names[0], given.devices, given.tiny)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        place = record.machine()
        rows = [
            row
            for devices in module.DEVICES
            for row in elsewhere(name, devices, given.tiny)
        ]
        result = {"name": name, "tiny": given.tiny, "machine": place, "rows": rows}
        (given.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        text = f"{name}: {module.__doc__.splitlines()[0]}\n{record.table(rows)}\n"
        (given.out / f"{name}.txt").write_text(text)
        print(text, flush=True)
    figure.draw(given.out, NAMES)


if __name__ == "__main__":
    main()
