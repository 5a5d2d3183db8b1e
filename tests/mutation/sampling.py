"""Random mutants: positions in the sources, each with one mutation of cosmic-ray."""

import ast
import functools
import pathlib
import random
from typing import NamedTuple

import cosmic_ray.plugins
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from mutation.covering_tests import GROUPS, group_of

# Removes a cache or a context manager; `ExceptionReplacer` names an undefined class.
_EXCLUDED_OPERATORS = ("core/RemoveDecorator", "core/ExceptionReplacer")


class RandomMutant(NamedTuple):
    """One mutation of one position.

    Attributes:
      group: name of the group of modules.
      file: module, relative to the package.
      line: line of the position.
      operator: name of the operator of cosmic-ray.
      occurrence: index of the position among those of the operator in the module.
    """

    group: str
    file: str
    line: int
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        """Name by which equivalent mutants are listed."""
        operator = self.operator.removeprefix("core/")
        return f"{self.file} {operator} {self.occurrence}"


def mutated_source(mutant: RandomMutant, source: str) -> str:
    """Applies the mutation to the source of its module."""
    operator = cosmic_ray.plugins.get_operator(mutant.operator)()
    return mutate_code(source, operator, mutant.occurrence)


def sample(
    package: pathlib.Path, sizes: dict[str, int], seed: int
) -> list[RandomMutant]:
    """Draws positions without replacement in each group, and one mutation of each.

    Args:
      package: folder of the package.
      sizes: number of mutants of each group.
      seed: seed of the draw.

    Returns:
      The mutants of all groups in random order, so that a part is a sample as well.
    """
    mutants = []
    for group in GROUPS:
        positions = _positions(package, group)
        rng = random.Random(f"{seed} {group}")
        drawn = rng.sample(sorted(positions), min(sizes[group], len(positions)))
        mutants += [rng.choice(positions[position]) for position in drawn]
    random.Random(seed).shuffle(mutants)
    return mutants


@functools.cache
def _positions(package: pathlib.Path, group: str) -> dict[tuple, list[RandomMutant]]:
    """Returns the mutants of each position of a group."""
    positions = {}
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        if group_of(file) != group:
            continue
        ignored = _ignored_spans(path.read_text())
        for item in _all_work_items([path], {}):
            (mutation,) = item.mutations
            start, end = mutation.start_pos, mutation.end_pos
            inside = any(low <= start and end <= high for low, high in ignored)
            if inside or mutation.operator_name in _EXCLUDED_OPERATORS:
                continue
            mutant = RandomMutant(
                group, file, start[0], mutation.operator_name, mutation.occurrence
            )
            positions.setdefault((file, start, end), []).append(mutant)
    return positions


def _ignored_spans(source: str) -> list[tuple]:
    """Returns the spans of annotations, of raised errors and of imports for types."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        ignored = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.Raise | ast.JoinedStr):
            ignored.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            ignored.append(node)
        spans += [
            ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset))
            for n in ignored
            if n is not None
        ]
    return spans
