"""Paths of the repository, and the PYTHONPATH of child processes."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
TESTS = ROOT / "tests"
PROGRAMS = TESTS / "programs"
PYTHONPATH = os.pathsep.join([str(ROOT), str(TESTS)])
