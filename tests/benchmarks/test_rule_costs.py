"""The table of rules: every rule has bytes and state of its compiled program."""

import inspect
import json
import re

import pytest
from harness.paths import ROOT
from harness.selection import keep

import localsgd_jax as lsgd
from benchmarks import rule_costs
from localsgd_jax import rules

RESULTS = ROOT / "benchmarks" / "results" / "rule_costs.json"
PAGE = ROOT / "docs" / "reference" / "rules.md"


def measured():
    return json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]


def rows_of(name):
    return [row for row in measured() if row["rule"].startswith(f"{name}(")]


def page_rows():
    """Returns the rules of each row of the page, its MB and its state."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
    return [
        (re.findall(r"`(\w+)\(", first), megabytes, state)
        for first, _, _, megabytes, state, _ in cells
    ]


def public_rules():
    """Returns the names of the public functions that make a rule."""
    functions = {name: getattr(lsgd, name, None) for name in rules.__all__}
    return [
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and inspect.signature(function).return_annotation in ("SyncRule", lsgd.SyncRule)
    ]


def test_every_rule_has_a_row():
    in_page = {name for names, _, _ in page_rows() for name in names}
    missing = [name for name in public_rules() if name not in in_page]
    assert not missing and {"average", "sparseloco", "desloc"} <= in_page
    assert not [name for name in public_rules() if not rows_of(name)]


def test_page_shows_the_measured_bytes_and_state():
    for names, megabytes, state in page_rows():
        found = [row for name in names for row in rows_of(name)]
        assert found, names
        assert set(re.findall(r"\d+\.\d{3}", megabytes)) == {
            f"{row['MB']:.3f}" for row in found
        }, names
        states = {f"{row['shared']:.3g} + {row['local']:.3g}" for row in found}
        assert state in states, (names, states)


@pytest.mark.full
@pytest.mark.parametrize("name", keep(list(rule_costs.ROWS), []))
def test_results_are_those_of_the_compiled_program(name):
    expected = next(row for row in measured() if row["rule"] == name)
    row = rule_costs.count_costs(name, 1_000_000, 10)
    assert row == pytest.approx(expected)
