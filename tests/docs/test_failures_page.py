"""The tests and commands in the page on failures and wrong input exist."""

import ast
import re

import pytest
from harness.paths import ROOT, TESTS

PAGE = (ROOT / "docs/development/failures.md").read_text()
NODES = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
COMMANDS = sorted(set(re.findall(r"python -m stress\.(\w+)", PAGE)))


@pytest.mark.parametrize("path", sorted({path for path, _ in NODES}))
def test_tests_exist(path):
    functions = {
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {name for p, name in NODES if p == path} <= functions


def test_commands_exist():
    assert COMMANDS and all((TESTS / f"stress/{x}.py").exists() for x in COMMANDS)


def test_each_line_names_a_test_or_a_command():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    headers = ("| Case", "| | Case", "| Fault", "| ---")
    cases = [row for row in rows if not row.startswith(headers)]
    assert len(cases) > 35
    assert all("::test_" in row or "python -m stress" in row for row in cases)
