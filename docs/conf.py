"""Sphinx configuration of the documentation."""

import ast
import os
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "localsgd_jax"
author = "localsgd_jax contributors"
copyright = "2026, localsgd_jax contributors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "version"
]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "README.md", "development/layers.md"]
default_role = "literal"  # Docstrings mark code with single backticks.

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Cross-references to other projects need their inventories from the network. CI builds
# without a network, so they are read only on request: LOCALSGD_DOCS_INTERSPHINX=1.
if os.environ.get("LOCALSGD_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

html_theme = "sphinx_book_theme"
html_title = "localsgd_jax"
html_static_path = ["_static"]
html_theme_options = {
    "repository_url": "https://github.com/localsgd-jax/localsgd-jax",
    "use_repository_button": True,
    "use_issues_button": True,
    "path_to_docs": "docs",
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def mark_equations(app, what, name, obj, options, lines):
    """Turns indented blocks of a docstring into literal blocks.

    Equations are Unicode text, indented by four columns, after an empty line. Without
    the marker `::` reStructuredText would join their lines into one paragraph. Lines
    `name: text`, indented by two columns after an empty line, become a list. In all
    other lines `*`, `|` and a trailing `_` are text and no markup.
    """
    marked, block, names = [], None, None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip():
            block = block if block is not None and indent >= block else None
            names = names if names is not None and indent >= names else None
        if block is None and line.strip():
            if _starts_block(marked, indent, 2) and re.match(r" +\w+: ", line):
                names = indent
            if _starts_block(marked, indent, 4):
                block = indent
                marked += [" " * _indent_before(marked) + "::", ""]
            elif indent == names:
                line = f"{' ' * indent}- {_escape(line.lstrip())}"
            elif not line.lstrip().startswith((">>>", "...")):
                line = _escape(line)
        marked.append(line)
    lines[:] = _plain_returns(marked)


def _plain_returns(lines):
    """Writes the section `Returns` as a field.

    Napoleon would take text in front of a colon for the type of the result.
    """
    found, inside = [], False
    for line in lines:
        if line == "Returns:":
            inside = True
            found.append(":returns:")
        elif inside and line[:1].strip():
            inside = False
            found.append(line)
        else:
            found.append(f"    {line}".rstrip() if inside else line)
    return found


def _starts_block(marked, indent, columns):
    """Returns whether a line begins a block that is indented after an empty line."""
    if not marked or marked[-1].strip():
        return False
    before = [line for line in marked if line.strip()]
    return bool(before) and indent >= _indent_before(marked) + columns


def _indent_before(marked):
    """Returns the indentation of the last line of text."""
    line = next(line for line in reversed(marked) if line.strip())
    return len(line) - len(line.lstrip())


def _escape(line):
    """Escapes inline markup outside of backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<!\\)([*|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", parts[i])
    # A text that is one letter and a period, such as `workers: K.`, is no enumeration.
    return re.sub(r"(?<=: )([A-Z])\.$", r"\\\1.", "".join(parts))


class Modules(Directive):
    """Lists the modules of the package with the first line of their docstrings."""

    def run(self):
        """Returns one definition list per folder."""
        folders: dict[str, list[tuple[str, str]]] = {}
        for path in sorted((ROOT / "localsgd_jax").rglob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            name = path.relative_to(ROOT / "localsgd_jax")
            rows = folders.setdefault(str(name.parent), [])
            rows.append((name.name, text.partition("\n\n")[0].replace("\n", " ")))
        found = []
        for folder, rows in sorted(folders.items()):
            title = "localsgd_jax/" + ("" if folder == "." else f"{folder}/")
            found.append(nodes.paragraph("", "", nodes.strong("", title)))
            found.append(_bullets([row for row in rows if row[0] != "__init__.py"]))
        return found


def _bullets(rows):
    """Returns a bullet list of file names and descriptions."""
    items = nodes.bullet_list()
    for name, text in rows:
        line = nodes.paragraph("", "", nodes.literal("", name), nodes.Text(f": {text}"))
        items += nodes.list_item("", line)
    return items


def setup(app):
    """Registers the directive, and the hook before that of napoleon."""
    app.add_directive("modules", Modules)
    app.connect("autodoc-process-docstring", mark_equations, priority=400)
