"""One planted fault."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault: in `file`, `old` becomes `new`; `tests` must fail."""

    file: str
    old: str
    new: str
    tests: str
