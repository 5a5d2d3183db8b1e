"""Every public function refuses wrong arguments with call, argument, rule and value."""

import inspect

import pytest
from harness.bad_arguments import outcomes
from harness.paths import ROOT
from harness.public_functions import (
    EXEMPT,
    EXEMPT_CLASSES,
    MODULES,
    PLANNING,
    TABLE,
    arguments,
    find,
)


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


def public_classes():
    """Yields the row names of all public classes that are no errors."""
    seen = set()
    for module, contents in MODULES.items():
        for name in contents.__all__:
            value = getattr(contents, name)
            if not inspect.isclass(value) or issubclass(value, Exception):
                continue
            if value not in seen:
                seen.add(value)
                yield name if module == "localsgd_jax" else f"{module}.{name}"


def test_every_public_function_is_in_the_table():
    missing = set(public_functions()) - TABLE.keys() - EXEMPT.keys()
    assert not missing, f"add rows for {sorted(missing)}"


def test_every_public_class_is_in_the_table():
    missing = set(public_classes()) - TABLE.keys() - EXEMPT_CLASSES.keys()
    assert not missing, f"add rows or reasons for {sorted(missing)}"


def test_no_exemption_is_stale():
    names = {*public_functions(), *public_classes()}
    assert EXEMPT.keys() | EXEMPT_CLASSES.keys() <= names
    assert not (EXEMPT.keys() | EXEMPT_CLASSES.keys()) & TABLE.keys()


def test_modules_of_the_table_are_all_public_packages():
    packages = {
        path.parent.name
        for path in (ROOT / "localsgd_jax").glob("*/__init__.py")
        if "__all__" in path.read_text()
    }
    assert packages == MODULES.keys() - {"localsgd_jax"}


@pytest.mark.parametrize("name", TABLE)
def test_rows_have_every_argument(name):
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(find(name)).parameters.items()
    names = {name for name, p in parameters if p.kind not in variable}
    assert names <= TABLE[name][0].keys()


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
