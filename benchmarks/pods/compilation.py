"""Compilation in a child process with limits of time and memory.

The compiler may abort the process, take minutes or exhaust the memory of the machine.
Each of these is a result, not the end of the measurement.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_SIZE = r"\(?([\d.]+[KMGT])\)?"
_OUT_OF_MEMORY = (
    rf"{_SIZE} exceeds available HBM {_SIZE}",
    rf"Used {_SIZE} of {_SIZE}",
)


class Limits(NamedTuple):
    """Limits of a compilation.

    Attributes:
      seconds: largest running time of the process.
      gigabytes: largest resident memory of the process, in 10⁹ bytes.
    """

    seconds: float
    gigabytes: float


class Compilation(NamedTuple):
    """Result of a compilation.

    Attributes:
      measured: sizes in bytes and times in seconds, by name.
      text: the compiled program as HLO text; "" if there is none.
      failure: reason why there is no program; "" if there is one.
    """

    measured: dict[str, Any]
    text: str
    failure: str


def compile_in_process(
    function: str, options: dict, limits: Limits, package: Path = ROOT
) -> Compilation:
    """Lowers and compiles a program in a process of its own.

    Args:
      function: `module:name` of a function that returns `(lowered, measured)`.
      options: its keyword arguments, which JSON can represent.
      limits: limits of the process.
      package: directory with the `localsgd_jax` to compile with.

    Returns:
      The compilation.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Without -P the current directory would hide the package.
        command = [sys.executable, "-P", "-m", "benchmarks.pods.compilation"]
        start = time.monotonic()
        with open(Path(folder, "stderr"), "wb") as stderr:
            process = subprocess.Popen(
                [*command, function, json.dumps(options), folder],
                env=_environment(package),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            failure = _wait(process, limits)
        measured = {"process_s": round(time.monotonic() - start, 1)}
        return _read_result(Path(folder), measured, failure)


def _environment(package: Path) -> dict[str, str]:
    """Returns the environment of the child process."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package.resolve()), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        # A cached program would have no compile time.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "1",
    }


def _wait(process: subprocess.Popen, limits: Limits) -> str:
    """Waits for the end of a process; returns the reason of a failure, or ""."""
    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            failure = ""
            if time.monotonic() > deadline:
                failure = f"no program within {limits.seconds:.0f} s"
            elif _resident_bytes(process.pid) > limits.gigabytes * 1e9:
                failure = f"no program within {limits.gigabytes:g} GB of the host"
            if failure:
                process.kill()
                process.wait()
                return failure
        else:
            if code < 0:
                return f"the compiler aborts ({signal.Signals(-code).name})"
            return f"exit status {code}" if code else ""


def _resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process; 0 where it is unknown."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _read_result(folder: Path, measured: dict, failure: str) -> Compilation:
    """Returns the files of the child process as a compilation."""
    text = folder / "program.hlo"
    result = folder / "result.json"
    if result.exists():
        measured |= json.loads(result.read_text())
    error = measured.pop("error", "")
    if failure.startswith("exit status"):
        last = (folder / "stderr").read_text(errors="replace").strip().splitlines()[-1:]
        failure = f"{failure}: {''.join(last)}"
    return Compilation(
        measured, text.read_text() if text.exists() else "", error or failure
    )


def describe_error(error: Exception) -> str:
    """Returns the reason of a failed compilation in one line."""
    text = str(error)
    for pattern in _OUT_OF_MEMORY:
        if found := re.search(pattern, text):
            return f"out of memory: needs {found[1]} of {found[2]} per device"
    return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"


def main(function: str, options: str, folder: str) -> None:
    """Compiles in this process and writes the numbers and the program as files."""
    module, _, name = function.partition(":")
    measured: dict[str, Any] = {}
    try:
        start = time.perf_counter()
        lower = getattr(importlib.import_module(module), name)
        lowered, measured = lower(**json.loads(options))
        measured["lower_s"] = time.perf_counter() - start
        # Also there if the compiler aborts.
        Path(folder, "result.json").write_text(json.dumps(measured))
        start, cpu_start = time.perf_counter(), time.process_time()
        compiled = lowered.compile()
        measured["compile_s"] = time.perf_counter() - start
        # Unlike the wall time, independent of other load on the machine.
        measured["compile_cpu_s"] = time.process_time() - cpu_start
        memory = compiled.memory_analysis()
        measured |= {
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "temp_bytes": memory.temp_size_in_bytes,
        }
        Path(folder, "program.hlo").write_text(compiled.as_text())
    except Exception as error:  # Every failure of the compiler is a result.
        measured["error"] = describe_error(error)
    Path(folder, "result.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
