"""Architecture: layers, homes of JAX constructs, size, public API and docstrings."""

import ast
import inspect
import pathlib
import re
import sys

import pytest
from harness.paths import ROOT

import localsgd_jax as lsgd

PACKAGE = pathlib.Path(lsgd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = ROOT / "docs" / "development" / "layers.md"
# What `experiments` may use besides the names of `localsgd_jax` itself.
PUBLIC = {
    *("localsgd_jax", "asynchronous", "checkpoint", "data", "distributed"),
    *("execution", "flax", "planning", "reporting", "schedules", "theory"),
}
COLLECTIVES = {
    *("psum", "pmean", "pmax", "pmin", "psum_scatter"),
    *("all_gather", "all_to_all", "ppermute", "axis_index"),
}


def allowed_imports():
    """Reads the table of layers: the folders that each folder may import."""
    rows = re.findall(
        r"^\| (\d) \| `(\w+)` \| .* \| (.*) \|$", LAYERS.read_text(), re.M
    )
    table, layer = {}, {}
    for number, folder, imports in rows:
        named = PUBLIC if imports == "the public API" else set(imports.split(", "))
        table[folder], layer[folder] = named - {"–"}, int(number)
    return table, layer


def folder(path):
    """Returns the folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    """Yields the dotted modules of this package that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "localsgd_jax":
            names = [f"localsgd_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name for name in names if name.split(".")[0] == "localsgd_jax")


def third_party(path):
    """Returns the distributions that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"localsgd_jax"}


def test_the_table_of_layers_is_complete_and_points_down():
    table, layer = allowed_imports()
    assert table.keys() == {folder(path) for path in FILES} - {"__init__"}
    for name, targets in table.items():
        for target in targets & layer.keys():
            assert layer[target] < layer[name], f"{name} may not import {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table_of_layers(path):
    if folder(path) == "__init__":
        return
    table, layer = allowed_imports()
    for module in imported_modules(path):
        target = module.split(".")[1] if "." in module else "localsgd_jax"
        if target not in layer and hasattr(lsgd, target):
            target = "localsgd_jax"  # A public name of the package itself.
        assert target in table[folder(path)] | {folder(path)}, f"imports {module}"


def test_nothing_imports_the_experiments_but_the_command_line():
    for path in FILES:
        if folder(path) not in ("cli", "experiments"):
            modules = list(imported_modules(path))
            assert not any("experiments" in module for module in modules), path


@pytest.mark.parametrize(
    "words, homes",
    [
        (
            COLLECTIVES,
            ["core/collectives.py", "core/pieces.py", "core/axis_binding.py"],
        ),
        ({"shard_map"}, ["core/pieces.py", "execution/"]),
        ({"Mesh"}, ["distributed/meshes.py", "execution/"]),
    ],
    ids=["collectives", "shard_map", "Mesh"],
)
def test_jax_constructs_have_one_home(words, homes):
    elsewhere = ("analysis/", "planning/", "experiments/", "cli/")
    either = "|".join(words)
    named = re.compile(
        rf"\b(?:jax|lax|sharding)\.(?:{either})\b|import .*\b({either})\b"
    )
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith((*homes, *elsewhere)):
            assert not named.search(path.read_text()), name


def test_private_names_of_jax_are_in_one_file():
    private = [path for path in FILES if "jax._src" in path.read_text()]
    assert [path.relative_to(PACKAGE).as_posix() for path in private] == [
        "distributed/_jax_internals.py"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependencies_stay_where_they_are_needed(path):
    allowed = {"jax", "optax", "numpy"}
    name = path.relative_to(PACKAGE).as_posix()
    if name.startswith(("cli/", "__main__", "experiments/")):
        allowed |= {"click", "matplotlib", "pooch", "scipy", "sklearn", "tqdm", "orbax"}
    if name.startswith("planning/"):
        allowed |= {"matplotlib"}
    if name == "reporting/figure.py":
        allowed |= {"plotly"}
    if name == "decoupled/ray_backend.py":
        allowed |= {"ray"}
    if name.startswith("training/progress"):
        allowed |= {"tqdm"}
    allowed |= {"checkpoint/": {"orbax"}, "flax/": {"flax"}}.get(
        name.partition("/")[0] + "/", set()
    )
    assert third_party(path) <= allowed
    if not name.startswith("cli/"):
        assert "click" not in third_party(path) or name == "__main__.py"


def test_packages_only_re_export():
    """No statements but imports and `__all__`; no function hides a module."""
    for path in PACKAGE.rglob("__init__.py"):
        modules = {module.stem for module in path.parent.glob("*.py")}
        modules |= {child.name for child in path.parent.iterdir() if child.is_dir()}
        tree = ast.parse(path.read_text())
        for node in tree.body:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)
            if isinstance(node, ast.ImportFrom):
                hidden = {alias.asname or alias.name for alias in node.names} & modules
                assert not hidden, f"{path}: {hidden}"


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
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                length = node.end_lineno - node.lineno - len(docstring.splitlines())
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"
