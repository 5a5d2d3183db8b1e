"""History of a decoupled job: one row per merge, returned as columns."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from localsgd_jax.core.validation import check, check_type

History = dict[str, np.ndarray]
_COLUMNS = (
    *("merge", "fragment", "seconds", "members", "steps", "tokens", "staleness"),
    *("wait", "bytes_received", "bytes_sent", "reissued", "not_finite"),
    *("duplicates", "rejected"),
)


def history_columns(rows: Sequence[dict], learners: int) -> History:
    """Returns rows as columns.

    Args:
      rows: rows of merges, in the order of time.
      learners: number of learner indices.

    Returns:
      One entry per merge; "learners" has the shape `(merges, learners)` and is true
      for the learners that contributed.
    """
    count = max([learners, *(1 + max(row["learners"]) for row in rows)])
    names = dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)])
    history = {
        name: np.array([row.get(name, math.nan) for row in rows])
        for name in names
        if name != "learners"
    }
    contributed = np.zeros((len(rows), count), bool)
    for index, row in enumerate(rows):
        contributed[index, list(row["learners"])] = True
    return history | {"learners": contributed}


def activity(history: History) -> str:
    """Formats a table of the learners of a job.

    Args:
      history: from `run` or `simulate`.

    Returns:
      A line for each learner: contributions, time of the first and the last, and the
      longest time between two of them, in seconds.

    Raises:
      TypeError: if it is not a mapping.
      ValueError: if it lacks a column.

    Example:
      >>> import numpy as np
      >>> history = {"learners": np.array([[True], [True]]),
      ...            "seconds": np.array([1.0, 2.5])}
      >>> print(activity(history))
      learner  contributions   first    last  longest gap
            0              2     1.0     2.5          1.5
    """
    check_type("activity(history)", "history", history, Mapping)
    for name in ("learners", "seconds"):
        check(name in history, "activity(history)", f"it must have {name!r}", history)
    lines = [
        f"{'learner':>7}{'contributions':>15}{'first':>8}{'last':>8}{'longest gap':>13}"
    ]
    for learner, contributed in enumerate(history["learners"].T):
        times = history["seconds"][contributed]
        if not len(times):
            lines.append(f"{learner:>7}{0:>15}{'–':>8}{'–':>8}{'–':>13}")
            continue
        gap = max(np.diff(times), default=0.0)
        lines.append(
            f"{learner:>7}{len(times):>15}{times[0]:>8.1f}{times[-1]:>8.1f}{gap:>13.1f}"
        )
    return "\n".join(lines)
