"""Runs the tests on a random sample of mutants and writes a row per mutant.

From `tests/`, `python -m mutation.run --sample N --seed S` draws N mutants per group
of modules. An interrupted run continues where it stopped.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from mutation.covering_tests import GROUPS, select_tests
from mutation.sampling import RandomMutant, mutated_source, sample

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parent / "results"
CPU_SECONDS = 240  # A mutant that needs more does not end.
SECONDS = 900
# Imported once and inherited by the process of each mutant. No JAX backend is started.
PRELOADED = ["jax", "jax.experimental", "optax", "flax", "orbax.checkpoint", "pytest"]


class _FirstFailure:
    """Plugin of pytest that stores the name of the first test that fails."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.name = self.name or report.nodeid

    def pytest_collectreport(self, report):
        if report.failed:
            self.name = self.name or report.nodeid


def _run_pytest(copy: str, tests: list[str], results: str) -> None:
    """Runs tests of the copy in this process; writes the first failure and code."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy
    sys.path[:] = [copy, *(p for p in sys.path if str(ROOT) not in p)]
    log = os.open(f"{results}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    first = _FirstFailure()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [first])
    row = {"code": int(code), "detected_by": first.name}
    pathlib.Path(results).write_text(json.dumps(row))


def outcome(copy: pathlib.Path, tests: list[str]) -> dict:
    """Runs tests on a copy of the project and returns the outcome.

    Returns:
      "outcome", "killed" or "survived", "detected_by", the first failing test, or the
      limit that was exceeded, and "seconds".
    """
    results = copy / "outcome.json"
    results.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    start = time.monotonic()
    process = context.Process(
        target=_run_pytest, args=(str(copy), tests, str(results)), daemon=False
    )
    process.start()
    process.join(SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    seconds = round(time.monotonic() - start, 1)
    if not results.exists():
        return {"outcome": "killed", "detected_by": "no end", "seconds": seconds}
    row = json.loads(results.read_text())
    survived = row["code"] == 0
    return {
        "outcome": "survived" if survived else "killed",
        "detected_by": row["detected_by"] or f"pytest code {row['code']}",
        "seconds": seconds,
    } | ({"detected_by": None} if survived else {})


def _try_mutant(mutant: RandomMutant, copy: pathlib.Path, exists: list[str]) -> dict:
    """Runs the covering tests on one mutant; restores the copy."""
    path = copy / "localsgd_jax" / mutant.file
    source = path.read_text()
    mutated = mutated_source(mutant, source)
    pairs = zip(source.splitlines(), mutated.splitlines(), strict=False)
    old, new = next((a, b) for a, b in pairs if a != b)
    path.write_text(mutated)
    try:
        row = outcome(copy, select_tests(mutant.file, exists))
    finally:
        path.write_text(source)
    return (
        mutant._asdict() | {"name": mutant.name, "old": old.strip(), "new": new.strip()}
    ) | row


def _assert_passes_unchanged(test: str, copy: pathlib.Path, passed: set) -> None:
    """Exits if a test that has detected a mutant fails without one, too."""
    function = test.partition("[")[0]
    if "::" not in function or function in passed:
        return
    if outcome(copy, [function])["outcome"] == "killed":
        sys.exit(f"{function} fails without a mutant; --deselect it in PYTEST_ADDOPTS")
    passed.add(function)


def _versions() -> dict:
    """Returns the commit and the versions that determine the result."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD", "HEAD:localsgd_jax"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    commit, sources = done.stdout.split()
    packages = ("cosmic-ray", "jax", "pytest")
    return {
        "commit": commit[:10],
        "sources": sources[:10],
        "python": sys.version.split()[0],
    } | {name: importlib.metadata.version(name) for name in packages}


def main() -> None:
    """Runs the sample; rows are appended to a JSON-lines file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=60, help="mutants per group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of mutants to repeat")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "rows.jsonl")
    options = parser.parse_args()
    options.output.parent.mkdir(exist_ok=True)
    options.output.touch()
    rows, versions = map(json.loads, options.output.open()), _versions()
    passed: set[str] = set()
    done = {row["name"] for row in rows if row["sources"] == versions["sources"]}
    sizes = dict.fromkeys(GROUPS, options.sample)
    mutants = sample(ROOT / "localsgd_jax", sizes, options.seed)
    if options.only:
        mutants, done = [m for m in mutants if m.name in options.only], set()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder).resolve() / "copy"
        ignore = shutil.ignore_patterns("__pycache__", "results")
        for part in ("localsgd_jax", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        tests = (copy / "tests").rglob("test_*.py")
        exists = [p.relative_to(copy / "tests").as_posix() for p in tests]
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for mutant in mutants:
            if mutant.name in done:
                continue
            row = _try_mutant(mutant, copy, exists) | versions
            _assert_passes_unchanged(row["detected_by"] or "", copy, passed)
            with options.output.open("a") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            text = row["detected_by"] or ""
            print(row["outcome"], row["name"], row["seconds"], text, flush=True)


if __name__ == "__main__":
    main()
