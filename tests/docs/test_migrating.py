"""Programs of the page on migrating, before and after its diffs."""

import re

import pytest
from harness.paths import ROOT
from harness.selection import keep

PAGE = (ROOT / "docs/guides/migrating.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MOST_CHANGED_LINES = 10


def styles():
    """Returns the program and the diff of each section, by its title."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        title, blocks = section.partition("\n")[0], BLOCK.findall(section)
        if blocks:
            (kind, program), (other, diff) = blocks
            assert (kind, other) == ("python", "diff"), title
            found[title] = program, diff
    return found


STYLES = styles()


def hunks(diff):
    """Yields the old and the new lines of each hunk."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        yield (
            [line[1:] for line in lines if line[0] in " -"],
            [line[1:] for line in lines if line[0] in " +"],
        )


def apply_diff(program, diff):
    """Returns the program after the changes of a diff."""
    lines = program.splitlines()
    for old, new in hunks(diff):
        starts = [
            i
            for i in range(len(lines) - len(old) + 1)
            if lines[i : i + len(old)] == old
        ]
        assert len(starts) == 1, f"{old} must be in the program once, got {starts}"
        lines[starts[0] : starts[0] + len(old)] = new
    return "\n".join(lines)


def run(program):
    """Returns the error of a program after the data of the page."""
    data = BLOCK.findall(PAGE)[0][1]
    names = {}
    exec(compile(data + program, "migrating", "exec"), names)
    return float(names["error"])


def test_the_page_has_all_styles():
    assert len(STYLES) == 8


@pytest.mark.parametrize("title", STYLES)
def test_at_most_ten_lines_change(title):
    diff = STYLES[title][1]
    changed = [line for line in diff.splitlines() if line[:1] in ("+", "-")]
    assert 0 < len(changed) <= MOST_CHANGED_LINES, changed


@pytest.mark.parametrize("title", keep(STYLES, ["Plain loop", "Equinox"]))
def test_both_programs_learn(title):
    program, diff = STYLES[title]
    before, after = run(program), run(apply_diff(program, diff))
    assert before < 0.06 and after < 0.06, (before, after)
    assert before != after
