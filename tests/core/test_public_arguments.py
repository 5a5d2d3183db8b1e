"""Every public function refuses wrong arguments with call, argument, rule and value."""

import inspect

import pytest
from harness.bad_arguments import outcomes
from harness.public_functions import EXEMPT, MODULES, PLANNING, TABLE, arguments, find


def public_functions():
    """Yields the row names of all public functions."""
    seen = set()
    for module, contents in MODULES.items():
        for name in contents.__all__:
            function = getattr(contents, name)
            if inspect.isfunction(inspect.unwrap(function)) and function not in seen:
                seen.add(function)
                yield name if module == "localsgd_jax" else f"{module}.{name}"
    yield from (f"planning.{name}" for name in PLANNING)


def test_every_public_function_is_in_the_table():
    missing = set(public_functions()) - TABLE.keys() - EXEMPT.keys()
    assert not missing, f"add rows for {sorted(missing)}"


@pytest.mark.parametrize("name", TABLE)
def test_wrong_arguments_raise(name):
    good, accepts = TABLE[name]
    function = find(name)
    wrong = [
        f"{argument}={value}: {outcome}"
        for argument, value, outcome in outcomes(
            name, function, arguments(good), accepts
        )
        if outcome != "clear"
    ]
    assert not wrong, "\n".join(wrong)
