"""Mutants are detected by the tests that they name."""

import pytest
from harness.paths import ROOT, TESTS
from mutation.mutants import MUTANTS, survives


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_applies_to_the_source(name):
    mutant = MUTANTS[name]
    assert mutant.old in (ROOT / "localsgd_jax" / mutant.file).read_text()
    assert mutant.new != mutant.old
    files = [word for word in mutant.tests.split() if word.endswith(".py")]
    assert files and all((TESTS / file).exists() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_detected(name):
    assert not survives(MUTANTS[name])
