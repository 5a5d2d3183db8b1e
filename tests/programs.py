"""Reads compiled programs: which collectives stand where, over how many bytes."""

import math
import re

# In types of many parts the compiler counts them: `/*index=5*/`.
COLLECTIVE = re.compile(
    r"= (?P<type>(?:/\*.*?\*/|[^=])*?) "
    r"(?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
ARRAY = re.compile(
    r"(?P<kind>pred|bf16|f8\w*|[fsuc])(?P<bits>\d*)\[(?P<shape>[\d,]*)\]"
)
CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


def computations(text: str) -> dict[str, list[str]]:
    """Splits a program into its computations; the entry is called ENTRY."""
    found, name = {}, None
    for line in text.splitlines():
        if opening := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = "ENTRY" if opening[1] else opening[2]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def collectives(text: str) -> list[tuple[str, int]]:
    """Lists each collective with the bytes of its result."""
    return [
        (match["name"], size(match["type"]))
        for line in text.splitlines()
        if (match := COLLECTIVE.search(line))
    ]


def unconditional(text: str) -> list[str]:
    """Lists the collectives that run even if no conditional takes its branch."""
    return _reachable(computations(text), ["ENTRY"], skip=" conditional(")


def in_loops(text: str) -> list[str] | None:
    """Lists the collectives inside loops; None if there is no loop."""
    parts = computations(text)
    loops = [line for lines in parts.values() for line in lines if " while(" in line]
    bodies = [re.search(r"body=%?([\w.\-]+)", line)[1] for line in loops]
    return _reachable(parts, bodies) if loops else None


def _reachable(parts: dict, names: list[str], skip: str | None = None) -> list[str]:
    """Lists the collectives of computations and of all that they call."""
    seen, todo, found = set(), list(names), []
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in parts[name]:
            if match := COLLECTIVE.search(line):
                found.append(match["name"])
            if skip is None or skip not in line:
                for one, many in CALLED.findall(line):
                    todo += [one] if one else re.findall(r"[\w.\-]+", many)
    return found


def size(text: str) -> int:
    """Returns the bytes of a type, such as `(f32[8,2]{1,0}, s32[])`."""
    total = 0
    for match in ARRAY.finditer(text):
        bits = {"pred": 8, "bf16": 16}.get(match["kind"], match["bits"])
        total += math.prod(map(int, filter(None, match["shape"].split(",")))) * int(
            bits
        )
    return total // 8
