"""Pages of the documentation: links, API coverage, size of the README, build."""

import importlib
import os
import re
import subprocess
import sys
import tomllib

import pytest
from harness.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
PAGES += [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
PUBLIC_PACKAGES = [
    *("localsgd_jax", "localsgd_jax.analysis", "localsgd_jax.asynchronous"),
    *("localsgd_jax.checkpoint", "localsgd_jax.data", "localsgd_jax.decoupled"),
    *("localsgd_jax.distributed", "localsgd_jax.execution"),
    *("localsgd_jax.fault_tolerance", "localsgd_jax.flax"),
    *("localsgd_jax.planning", "localsgd_jax.reporting", "localsgd_jax.rules"),
    *("localsgd_jax.schedules", "localsgd_jax.theory", "localsgd_jax.training"),
]


def without_code(path):
    """Returns the text of a page without its code blocks."""
    return re.sub(r"^( *)```.*?^ *```", "", path.read_text(), flags=re.M | re.S)


def anchor(heading):
    """Returns the anchor of a heading, as forges and MyST form it."""
    text = re.sub(r"[`*\\]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path):
    """Returns the anchors of a page: its headings and explicit targets."""
    text = without_code(path)
    found = {anchor(x) for x in re.findall(r"^#+ (.*)$", text, re.M)}
    return found | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    links += re.findall(r"^```\{figure\} (\S+)$", page.read_text(), re.M)
    for link in links:
        if re.match(r"https?:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if fragment:
            assert fragment in anchors(target), f"{page.name}: {link}"


def test_all_pages_are_in_a_table_of_contents():
    listed = set()
    for path in DOCS.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.S):
            names = [line for line in tree.splitlines() if line and line[0] != ":"]
            listed |= {(path.parent / f"{name}.md").resolve() for name in names}
    outside = {DOCS / "index.md", DOCS / "README.md", DOCS / "development/layers.md"}
    pages = {path for path in PAGES if path.is_relative_to(DOCS)}
    assert pages - outside == listed & pages
    assert all(path.exists() for path in listed)


def api_entries():
    """Returns module and name of each entry of the API reference."""
    entries = []
    for page in sorted(DOCS.glob("reference/api/*.md")):
        module = None
        for line in page.read_text().splitlines():
            if found := re.match(r"\.\. currentmodule:: ([\w.]+)", line):
                module = found[1]
            elif found := re.match(r"\.\. (?:auto(?!summary)\w+|data):: (\w+)", line):
                entries.append((module, found[1]))
    return entries


def test_entries_of_the_api_reference_exist_once():
    entries = api_entries()
    assert len(entries) == len(set(entries))
    for module, name in entries:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_public_names_are_in_the_api_reference(package):
    """The entry may be in another public package that exports the same object."""
    documented = [
        (name, getattr(importlib.import_module(module), name))
        for module, name in api_entries()
    ]
    exported = importlib.import_module(package)
    for public in getattr(exported, "__all__", ()):
        value = getattr(exported, public)
        assert any(n == public and v is value for n, v in documented), public


def test_layers_page_lists_all_folders():
    text = (DOCS / "development/layers.md").read_text()
    for path in (ROOT / "localsgd_jax").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"`{path.name}`" in text, path.name


def test_paths_on_the_pages_exist():
    """Paths in backticks that begin with a folder of the repository or the package."""
    package = ROOT / "localsgd_jax"
    roots = {path.name for path in ROOT.iterdir() if path.is_dir()}
    folders = {path.name for path in package.iterdir() if path.is_dir()}
    for page in PAGES:
        code = " ".join(re.findall(r"`([^`\n]+)`", without_code(page)))
        for name in re.findall(r"(?<!\S)[\w.]+(?:/[\w.]*)+(?!\S)", code):
            home = {name.split("/")[0]}
            if name == "docs/_build":  # Output of the command that the page shows.
                continue
            if home <= roots:
                assert (ROOT / name).exists(), f"{page.name}: {name}"
            elif home <= folders:
                assert (package / name).exists(), f"{page.name}: {name}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8 * 1024


def test_versions_are_equal():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {project['version']}\n" in citation
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first and first[1] in (project["version"], "Unreleased")


@pytest.mark.full
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx_book_theme", reason="pip install -e '.[docs]'")
    options = ["-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
