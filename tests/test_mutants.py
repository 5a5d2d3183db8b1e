"""The tests notice when the library is broken."""

import pytest
from mutants import MUTANTS, survives


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_noticed(name):
    assert not survives(MUTANTS[name])
