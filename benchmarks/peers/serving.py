"""What a worker process says and hears: one line asks for a turn or for a file."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import numpy as np


def own_output() -> TextIO:
    """Keeps the standard output for answers: what libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(
    answers: TextIO, turn: Callable, params: Callable[[], Sequence[np.ndarray]]
) -> None:
    """Takes a turn, or writes the parameters to the path named, for each line heard."""
    answers.write("ready\n")
    for line in sys.stdin:
        if line == "turn\n":
            turn()
        else:
            np.savez(line.strip(), *params())
        answers.write("done\n")
