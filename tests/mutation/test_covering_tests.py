"""Modules of the mutation score have tests, and its rows can be counted."""

import pytest
from harness.paths import ROOT, TESTS
from mutation.covering_tests import GROUPS, group_of, select_tests
from mutation.equivalents import EQUIVALENT
from mutation.score import Score, score, table

FILES = [
    path.relative_to(ROOT / "localsgd_jax").as_posix()
    for path in (ROOT / "localsgd_jax").rglob("*.py")
]
EXISTS = [path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")]


@pytest.mark.parametrize("group", GROUPS)
def test_covering_tests_exist(group):
    files = [file for file in FILES if group_of(file) == group]
    assert files
    for file in files:
        paths = select_tests(file, EXISTS)
        assert all((ROOT / path).exists() for path in paths)
        assert f"localsgd_jax/{file}" in paths and len(paths) >= 2


def test_equivalent_mutants_have_existing_modules_and_reasons():
    for name, reason in EQUIVALENT.items():
        assert name.split()[0] in FILES and len(reason) > 10


def test_score_counts_rows():
    rows = [{"outcome": "killed", "name": "a", "group": "rules"}] * 19
    rows += [{"outcome": "survived", "name": "b", "group": "ledger"}]
    assert score(rows) == Score(drawn=20, killed=19, equivalent=0)
    assert score(rows).survived == 1
    low, high = score(rows).interval
    assert (round(low, 3), round(high, 3)) == (0.764, 0.991)  # Wilson, 19 of 20.
    assert "| all | 20 | 19 | 0 | 1 | 95% | 76% to 99% |" in table(rows)
