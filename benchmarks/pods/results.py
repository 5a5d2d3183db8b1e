"""Result files, Markdown tables and pages of programs compiled ahead of time."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import reporting

GIB = 2**30


def machine() -> dict:
    """Returns processor, cores, load and versions, of the TPU compiler as well."""
    try:
        compiler = version("libtpu")
    except PackageNotFoundError:
        compiler = "not installed"
    return reporting.machine() | {"libtpu": compiler}


def read(path: Path) -> dict:
    """Returns the content of a result file; no rows if there is no file."""
    if not path.exists():
        return {"commands": [], "machine": {}, "rows": []}
    return json.loads(path.read_text())


def keys_of(path: Path, keys: Sequence[str]) -> set[tuple]:
    """Returns the values of some columns in all rows of a result file."""
    return {tuple(row[key] for key in keys) for row in read(path)["rows"]}


def update(path: Path, row: dict, keys: Sequence[str], command: str) -> None:
    """Writes a row with its command; it replaces the earlier one with equal keys."""
    earlier = read(path)
    rows = {tuple(old[key] for key in keys): old for old in earlier["rows"]}
    rows[tuple(row[key] for key in keys)] = row
    content = {
        "commands": list(dict.fromkeys([*earlier["commands"], command])),
        "machine": earlier["machine"] or machine(),
        "rows": list(rows.values()),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def versions(path: Path) -> str:
    """Returns the commands and versions of a result file as a paragraph."""
    content = read(path)
    found = content["machine"]
    commands = ", ".join(f"`{command}`" for command in content["commands"])
    return (
        f"{commands}: Python {found['python']}, JAX {found['jax']}, libtpu "
        f"{found['libtpu']}, {found['cores']} cores ({found['processor']}), load "
        f"{found['load']} at the start of the first."
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats cells, the first row of which is the header, as a Markdown table."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_bytes(count: float | None) -> str:
    """Formats bytes in GiB, or smaller units below a thousandth of it."""
    if count is None:
        return "–"
    if count < 1e6:
        return f"{count:.0f} B" if count else "0"
    return f"{count / GIB:.3g}"


def fill_page(page: Path, blocks: Mapping[str, str]) -> None:
    """Replaces the blocks between the comments `begin NAME` and `end NAME` of a page.

    Raises a ValueError if the page lacks a block.
    """
    text = page.read_text()
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
        start, stop = text.find(begin), text.find(end)
        if not 0 <= start < stop:
            raise ValueError(f"{page}: there must be a block {name!r}")
        text = text[: start + len(begin)] + content + text[stop:]
    page.write_text(text)
