"""Memory, traffic and predicted step time of a GPT on TPU pods.

Command: python -m benchmarks pods (10 minutes; needs the compiler for TPUs)
Expected: memory per chip does not grow with the slices, bytes across slices only by the
factor 2(K − 1)/K of a ring; DiLoCo sends across slices a fiftieth of a data-parallel
step, whose gradients are in bfloat16.

The local step, the synchronisation of each method and a data-parallel step are compiled
ahead of time for TPU slices, each in a process of its own, and read. Nothing is run.
The step time comes from the cost model of `localsgd_jax.planning`, with an assumed
fraction of the peak of a chip.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pods import compilation, figure, gpt, prediction, results, traffic
from benchmarks.pods.methods import DATA_PARALLEL, LOCAL_STEP, METHODS
from benchmarks.pods.topology import Topology, missing_compiler

KEYS = ("target", "slices", "program", "size")
# Slices of 4 × 4 and 8 × 8 chips: 32 to 512 chips.
PODS = [
    (f"tpu:v5e:{shape}", slices, chips)
    for shape, chips in (("4x4", 16), ("8x8", 64))
    for slices in (2, 4, 8)
]
SMALL_PODS = [("tpu:v5e:2x2", 2, 4)]


def compile_program(
    program: str,
    described: Topology,
    shape: gpt.Shape,
    limits: compilation.Limits,
) -> dict[str, Any]:
    """Compiles a program in another process; returns its sizes, traffic and times."""
    compiled = compilation.compile_in_process(
        "benchmarks.pods.methods:lower",
        {
            "program": program,
            "topology": described._asdict(),
            "shape": shape._asdict(),
        },
        limits,
    )
    sent = dict.fromkeys(traffic.Traffic._fields)
    if compiled.text:
        sent = traffic.read(compiled.text, described)._asdict()
    return compiled.measured | sent | {"failure": compiled.failure}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pods", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--small", action="store_true", help="small enough for a test")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seconds", type=float, default=900, help="limit of a program")
    parser.add_argument("--gigabytes", type=float, default=8, help="limit of a program")
    parser.add_argument("--resume", action="store_true", help="only missing rows")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument(
        "--page", type=Path, help="writes the results into a page and measures nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    path = options.out / "pods.json"
    if options.page:
        write_page(path, options.page)
        return
    if reason := missing_compiler("tpu"):
        raise SystemExit(f"pods: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks", "pods", *arguments])
    size = "small" if options.small else "large"
    shape = gpt.SMALL if options.small else gpt.LARGE
    limits = compilation.Limits(options.seconds, options.gigabytes)
    done = results.keys_of(path, KEYS) if options.resume else set()
    for target, slices, chips in SMALL_PODS if options.small else PODS:
        described = Topology(target, slices, {"worker": slices, "fsdp": chips})
        for program in (DATA_PARALLEL, LOCAL_STEP, *(options.methods or METHODS)):
            if (target, slices, program, size) in done:
                continue
            case = {"target": target, "slices": slices, "program": program}
            case |= {"size": size, "chips": slices * chips}
            row = case | compile_program(program, described, shape, limits)
            results.update(path, row, KEYS, command)
            print(_progress(row), flush=True)
    rows = [row for row in results.read(path)["rows"] if row["size"] == size]
    figure.plot(prediction.method_rows(rows, shape), options.out)


def _progress(row: dict) -> str:
    """Returns a row as a line of text, sizes in GiB."""
    name = f"{row['target']} x {row['slices']}  {row['program']:<18}"
    if row["failure"]:
        return f"{name} {row['failure']}"
    sizes = ("argument_bytes", "temp_bytes", "ici_bytes", "dcn_bytes")
    cells = "  ".join(f"{results.format_bytes(row[size]):>8}" for size in sizes)
    return f"{name} {cells}  {row['compile_s']:6.1f} s"


def write_page(path: Path, page: Path) -> None:
    """Writes the tables of the result file into a page."""
    programs = [row for row in results.read(path)["rows"] if row["size"] == "large"]
    rows = prediction.method_rows(programs, gpt.LARGE)
    results.fill_page(
        page,
        {
            "memory and traffic": memory_table(rows),
            "versions": results.versions(path),
            "predicted times": prediction_table(rows),
        },
    )


def memory_table(rows: Sequence[dict]) -> str:
    """Returns memory, traffic per step and compile time of each method and pod."""
    head = ["chips", "method", "state", "peak", "ICI per step", "DCN per step"]
    lines = [[*head, "compile time"]]
    for row in rows:
        cells = [_chips(row), row["method"]]
        if row["failure"]:
            lines.append([*cells, row["failure"], "", "", "", ""])
            continue
        sizes = ("state_bytes", "peak_bytes", "ici_bytes", "dcn_bytes")
        seconds = " + ".join(f"{value:.0f}" for value in row["compile_cpu_s"])
        cells += [results.format_bytes(row[size]) for size in sizes]
        lines.append([*cells, f"{seconds} s"])
    return results.markdown_table(lines)


def prediction_table(rows: Sequence[dict]) -> str:
    """Returns the predicted step time and speedup of each method and pod."""
    links = prediction.GBIT_PER_HOST
    lines = [["chips", "method", *[f"{gbit} Gbit/s" for gbit in links]]]
    for row in rows:
        if not row["failure"]:
            cells = (_prediction(row["predicted"][str(gbit)]) for gbit in links)
            lines.append([_chips(row), row["method"], *cells])
    return results.markdown_table(lines)


def _chips(row: dict) -> str:
    return f"{row['slices']} × {row['chips'] // row['slices']}"


def _prediction(predicted: dict) -> str:
    return f"{predicted['step_s']:.3g} s ({predicted['speedup']:.3g} ×)"
