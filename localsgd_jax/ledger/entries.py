"""Every collective of a compiled program: where it stands and what it sends."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from localsgd_jax.ledger import groups, hlo, loops, programs, sources

# Bytes that a device sends, per byte of its operand, in a group of n: by the ring
# algorithms, of which reduce-scatter and all-gather are each half an all-reduce.
RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: (n - 1) / n,
}

# Opcodes that occupy a device, among many that only rename or move.
_WORK = {
    "call",
    "conditional",
    "convolution",
    "custom-call",
    "dot",
    "fusion",
    "reduce",
    "scatter",
    "sort",
    "while",
}


class Loop(NamedTuple):
    """A loop around a collective.

    Attributes:
      name: of the instruction.
      times: how often its body runs, None if the program does not say.
    """

    name: str
    times: int | None


class Branch(NamedTuple):
    """A branch of a conditional around a collective.

    Attributes:
      name: of the conditional.
      index: of the branch.
      count: how many branches there are.
    """

    name: str
    index: int
    count: int


class Entry(NamedTuple):
    """A collective of a compiled program.

    Attributes:
      name: such as `all-reduce`; one that is started and awaited apart goes by the
        same name.
      dtypes: element types that it sends, such as `("f32",)`.
      bytes: of a device's operands, each time that it runs.
      sent: bytes that a device sends each time, by the ring formulas.
      groups: which devices talk, by position in the mesh.
      axes: mesh axes along which they do; None if no mesh is known.
      path: the loops and branches around it, outermost first.
      beside: None if devices wait for it; otherwise opcodes of what runs between its
        start and its end, which may be nothing.
      calls: the source that it comes from, innermost call first.
      chain: name of what the compiler for TPUs has cut into pieces that run within
        other work, in a loop of local steps for instance; the pieces are one entry.
    """

    name: str
    dtypes: tuple[str, ...]
    bytes: int
    sent: float
    groups: groups.Groups
    axes: tuple[str, ...] | None
    path: tuple[Loop | Branch, ...] = ()
    beside: tuple[str, ...] | None = None
    calls: tuple[sources.Frame, ...] = ()
    chain: str = ""

    @property
    def conditional(self) -> bool:
        """Whether it stands in a branch."""
        return any(isinstance(place, Branch) for place in self.path)

    @property
    def looped(self) -> bool:
        """Whether it stands in a loop."""
        return any(isinstance(place, Loop) for place in self.path)

    @property
    def times(self) -> int | None:
        """How often it runs if its branches are taken; None if unknown."""
        total = 1
        for place in self.path:
            if isinstance(place, Loop):
                if place.times is None:
                    return None
                total *= place.times
        return total

    @property
    def source(self) -> sources.Frame | None:
        """The innermost call outside installed packages."""
        return sources.culprit(self.calls)


def ledger(program: Any, *args, mesh: Any = None, **kwargs) -> tuple[Entry, ...]:
    """Reads every collective out of a compiled program.

    A device in a group of n, whose operand has b bytes, sends by the ring algorithms

        all-reduce 2(n − 1)/n · b,  all-gather (n − 1) · b,
        reduce-scatter, all-to-all and broadcast (n − 1)/n · b,  permutation b

    What the program says is what runs: collectives that the compiler put in because
    of shardings are there, those of vmap, which stay within a device, are not.

    Args:
      program: a compiled program, or a function, jitted or not, which is compiled for
        the arguments and not run.
      *args, **kwargs: arguments of the function or their `jax.ShapeDtypeStruct`, with
        shardings.
      mesh: the mesh whose axes to name; None for the one of the arguments.

    Returns:
      The entries in the order in which the program runs them; `table` prints them,
      `sent` adds them up.

    Raises:
      TypeError: if `program` is neither.
      ValueError: if the mesh is too small for the program.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5),
      ...                            rule=lsgd.average())
      >>> mesh = jax.make_mesh((jax.device_count(),), ("worker",))
      >>> cluster = lsgd.on_mesh(algorithm, mesh)
      >>> ledger(cluster.step, cluster.init(0.0), jnp.ones(cluster.workers))
      ()
    """
    compiled = programs.compiled(program, args, kwargs)
    return read(compiled.as_text(), programs.axis_sizes(compiled, mesh, (args, kwargs)))


def read(text: str, sizes: Mapping[str, int] | None = None) -> tuple[Entry, ...]:
    """Reads every collective out of the text of a compiled program.

    Args:
      text: as `compiled.as_text()` gives it.
      sizes: of the axes of the mesh, outermost first; None if it has no mesh.

    Returns:
      The entries.
    """
    program = hlo.parse(text)
    name_axes = partial(groups.axes, sizes=sizes) if sizes else lambda found: None
    make = partial(_entry, program, name_axes, sources.frames(text))
    return _join(_walk(program, program.entry, (), make))


def sent(
    entries: Iterable[Entry], axis: str | Sequence[str] | None = None
) -> tuple[float, float]:
    """Adds up the bytes that a device sends when the program runs once.

    Loops count as often as they run. Branches of a conditional may differ: the
    cheapest and the dearest give the least and the most.

    Args:
      entries: of a ledger.
      axis: mesh axis, or several; None for all. A collective along several axes
        counts for each.

    Returns:
      The least and the most bytes; a loop of unknown length may run never or for ever.

    Example:
      >>> psum = Entry("all-reduce", ("f32",), 80, 140.0, ((0, 1, 2, 3, 4, 5, 6, 7),),
      ...              ("worker",), (Branch("cond", 1, 2), Loop("while", 3)))
      >>> sent([psum]), sent([psum], axis="model")
      ((0, 420.0), (0, 0))
    """
    return _add([(entry.sent, entry.path) for entry in along(entries, axis)])


def along(
    entries: Iterable[Entry], axis: str | Sequence[str] | None
) -> tuple[Entry, ...]:
    """Chooses the entries along an axis; those whose axes are unknown are among them.

    Args:
      entries: of a ledger.
      axis: mesh axis, or several, of which one must match; None for all.

    Returns:
      The entries.
    """
    names = {axis} if isinstance(axis, str) else set(axis or ())
    return tuple(
        entry
        for entry in entries
        if not names or entry.axes is None or names & set(entry.axes)
    )


def _add(parts: Sequence[tuple[float, tuple]]) -> tuple[float, float]:
    """Adds bytes up, each with the loops and branches that are still around it."""
    least = most = sum(bytes for bytes, path in parts if not path)
    inside: dict[Loop | Branch, list] = {}
    for bytes, path in parts:
        if path:
            inside.setdefault(path[0], []).append((bytes, path[1:]))
    choices: dict[str, list] = {}
    for place, inner in inside.items():
        low, high = _add(inner)
        if isinstance(place, Branch):
            choices.setdefault(place.name, [place.count]).append((low, high))
        else:
            times = (0, math.inf) if place.times is None else (place.times,) * 2
            least, most = least + times[0] * low, most + times[1] * high
    for count, *ranges in choices.values():
        silent = len(ranges) < count
        least += 0 if silent else min(low for low, _ in ranges)
        most += max(high for _, high in ranges)
    return least, most


def _join(pieces: Iterable[Entry]) -> tuple[Entry, ...]:
    """Makes one entry of the pieces of a chain: its start, what it runs in, its end."""
    found: dict[Any, list[Entry]] = {}
    for number, piece in enumerate(pieces):
        key = (piece.name, piece.chain) if piece.chain else number
        found.setdefault(key, []).append(piece)
    return tuple(
        start._replace(beside=_hosts(start, later[:-1])) if later else start
        for start, *later in found.values()
    )


def _hosts(start: Entry, pieces: Sequence[Entry]) -> tuple[str, ...]:
    """Returns opcodes of what pieces run in, each once."""
    looped = (len(piece.path) > len(start.path) for piece in pieces)
    return tuple(dict.fromkeys("while" if loop else "fusion" for loop in looped))


def _walk(
    program: hlo.Program, name: str, path: tuple, make: Callable
) -> Iterator[Entry]:
    """Yields the collectives of a computation and of all that it calls."""
    lines = program.computations.get(name, ())
    for place, line in enumerate(lines):
        if kind := _collective(line):
            yield make(kind, lines, place, path)
        elif line.opcode == "while":
            times = loops.times(program, line, lines)
            (body,), (test,) = hlo.called(line, "body"), hlo.called(line, "condition")
            more = None if times is None else times + 1
            yield from _walk(program, test, (*path, Loop(line.name, more)), make)
            yield from _walk(program, body, (*path, Loop(line.name, times)), make)
        elif line.opcode == "conditional":
            yield from _branches(program, line, path, make)
        else:
            beside = _beside(line, lines[place + 1 :])
            for inner in (*hlo.called(line, "calls"), *hlo.called(line, "to_apply")):
                for entry in _walk(program, inner, path, make):
                    yield entry._replace(beside=beside) if beside is not None else entry


def _branches(
    program: hlo.Program, line: hlo.Instruction, path: tuple, make: Callable
) -> Iterator[Entry]:
    """Yields the collectives of the branches of a conditional."""
    names = hlo.called(line, "branch_computations") or (
        *hlo.called(line, "true_computation"),
        *hlo.called(line, "false_computation"),
    )
    for index, name in enumerate(names):
        inside = (*path, Branch(line.name, index, len(names)))
        yield from _walk(program, name, inside, make)


def _collective(line: hlo.Instruction) -> str | None:
    """Returns the collective that an instruction is or starts."""
    kind = line.opcode.removesuffix("-start")
    return kind if kind in RING else None


def _entry(
    program: hlo.Program,
    name_axes: Callable,
    known: Mapping,
    kind: str,
    lines: Sequence[hlo.Instruction],
    place: int,
    path: tuple,
) -> Entry:
    """Makes the entry of a collective."""
    line, before = lines[place], {one.name: one.type for one in lines[:place]}
    types = " ".join(before[name] for name in line.operands)
    found = groups.groups(line.attributes, program.devices)
    members = max((len(group) for group in found), default=1)
    payload = hlo.size(types)
    return Entry(
        name=kind,
        dtypes=hlo.dtypes(types),
        bytes=payload,
        sent=RING[kind](members) * payload,
        groups=found,
        axes=name_axes(found),
        path=path,
        beside=_beside(line, lines[place + 1 :]),
        calls=sources.calls_of(line.attributes, known),
        chain=_chain(line),
    )


def _chain(line: hlo.Instruction) -> str:
    """Returns the name that the pieces of a collective share."""
    chain = re.search(r'\bchain_id="(\w+)"', line.attributes)
    channel = re.search(r"\bchannel_id=(\d+)", line.attributes)
    return f"{channel[1] if channel else ''}/{chain[1]}" if chain else ""


def _beside(
    start: hlo.Instruction, later: Sequence[hlo.Instruction]
) -> tuple[str, ...] | None:
    """Lists what runs between a start and its end; None if it is no start."""
    if not start.opcode.endswith("-start") or '"is_sync":true' in start.attributes:
        return None
    names, between = {start.name}, []
    for line in later:
        if names & set(line.operands):
            if line.opcode.endswith("-done"):
                return tuple(between)
            names.add(line.name)
        elif line.opcode in _WORK or _collective(line):
            between.append(line.opcode)
    return tuple(between)
