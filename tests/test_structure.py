"""The house: floors, public names, documentation."""

import ast
import inspect
import pathlib
import sys

import pytest

import localsgd_jax as lsgd

PACKAGE = pathlib.Path(lsgd.__file__).parent
FLOORS = {
    "base": 0,
    "checks": 0,
    "collectives": 0,
    "fields": 0,
    "trees": 0,
    "agreement": 0,
    "processes": 0,
    "rollcall": 0,
    "shapes": 0,
    "rules": 1,
    "schedules": 1,
    "adaptive": 1,
    "diagnostics": 1,
    "ledger": 1,
    "cost": 1,
    "theory": 1,
    "algorithm": 2,
    "asynchronous": 4,
    "flax": 2,
    "consensus": 3,
    "meshes": 3,
    "placement": 3,
    "deal": 4,
    "distributed": 4,
    "shards": 4,
    "feed": 4,
    "journal": 4,
    "rounds": 4,
    "traffic": 4,
    "train": 4,
    "apart": 4,
    "company": 4,
    "resilient": 4,
    "minutes": 4,
    "checkpoint": 4,
    "audit": 5,
    "experiments": 5,
    "launch": 5,
    "plan": 5,
    "reproduce": 5,
    "cli": 5,
    "__main__": 5,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path):
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """Modules of this package that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "localsgd_jax" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if module(path) == "__init__":
        return
    for target in imported(path):
        assert FLOORS[target] <= FLOORS[module(path)], f"{path.name} imports {target}"


def test_every_file_stands_on_a_floor():
    assert {module(path) for path in FILES} - {"__init__"} <= FLOORS.keys()


def names_in(path):
    """Attributes of jax and jax.lax that a file names."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    } | {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize(
    "words, homes",
    [
        (
            {"psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute"}
            | {"psum_scatter", "axis_index"},
            ["collectives"],
        ),
        ({"shard_map"}, ["placement"]),
        ({"Mesh"}, ["meshes", "placement"]),
    ],
)
def test_collectives_and_meshes_have_their_homes(words, homes):
    core = [path for path in FILES if FLOORS.get(module(path), 9) < 5]
    for path in core:
        if module(path) not in [*homes, "theory"]:
            assert not names_in(path) & words, path


def test_the_core_needs_only_jax_and_optax():
    allowed = {"jax", "optax", "numpy", "localsgd_jax"}
    for path in FILES:
        if FLOORS.get(module(path), 0) == 5:
            continue
        for node in ast.parse(path.read_text()).body:
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module]
            for name in found:
                assert name.split(".")[0] in allowed | sys.stdlib_module_names, (
                    f"{path.name}: {name}"
                )


def test_public_names_are_sorted_and_exist():
    assert lsgd.__all__ == sorted(lsgd.__all__)
    for name in lsgd.__all__:
        assert hasattr(lsgd, name)


@pytest.mark.parametrize("name", lsgd.__all__)
def test_public_names_are_documented(name):
    documented = inspect.getdoc(getattr(lsgd, name))
    assert documented and documented.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(getattr(lsgd, name)):
        for section in ("Returns:", "Example:"):
            assert section in documented, f"{name} lacks {section}"


def test_functions_and_files_stay_small():
    for path in FILES:
        source = path.read_text()
        assert len(source.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                length = node.end_lineno - node.lineno - len(docstring.splitlines())
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"
