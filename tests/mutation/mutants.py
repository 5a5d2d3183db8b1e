"""Mutants: copies of the library with one fault each, which a test must detect.

From `tests/`, `python -m mutation.mutants NAME` runs one mutant, without a name all.
`pytest -m slow tests/mutation` runs all as tests.
"""

import importlib
import os
import pathlib
import pkgutil
import shutil
import subprocess
import sys
import tempfile

from mutation import faults
from mutation.mutant import Mutant

ROOT = pathlib.Path(__file__).parents[2]

MUTANTS = {
    name: mutant
    for module in pkgutil.iter_modules(faults.__path__)
    for name, mutant in importlib.import_module(
        f"mutation.faults.{module.name}"
    ).MUTANTS.items()
}


def survives(mutant: Mutant) -> bool:
    """Returns whether the tests pass on a copy of the project with the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        for part in ("localsgd_jax", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "localsgd_jax" / mutant.file
        source = path.read_text()
        if source.count(mutant.old) < 1:
            raise ValueError(f"{mutant.file} does not contain {mutant.old!r}")
        path.write_text(source.replace(mutant.old, mutant.new))
        tests = [
            f"tests/{word}" if word.endswith(".py") else word
            for word in mutant.tests.split()
        ]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow"]
        done = subprocess.run(
            [*command, *tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"
        )
    if done.returncode == 1 and "error" in done.stdout.splitlines()[-1]:
        raise RuntimeError(f"the tests did not run: {done.stdout[-2000:]}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Runs the named mutants, or all; returns how many survive."""
    num_survivors = 0
    for name in names or MUTANTS:
        survived = survives(MUTANTS[name])
        print(f"{'SURVIVES' if survived else 'caught  '}  {name}", flush=True)
        num_survivors += survived
    return num_survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
