"""Line-based stdin/stdout protocol of a worker process."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

import numpy as np


def redirect_stdout() -> TextIO:
    """Returns a stream for answers, and redirects stdout of libraries to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve_stdin(
    answers: TextIO, step: Callable, params: Callable[[], Sequence[np.ndarray]]
) -> None:
    """Answers each line of stdin: "step" runs a step, a path saves the parameters."""
    answers.write("ready\n")
    for line in sys.stdin:
        if line == "step\n":
            step()
        else:
            np.savez(line.strip(), *params())
        answers.write("done\n")
