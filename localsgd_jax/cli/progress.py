"""Progress bar of the command line."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def step_progress(total: int) -> Iterator[Callable]:
    """Shows a progress bar on a terminal.

    Args:
      total: number of steps.

    Yields:
      A function that advances the bar by one step.
    """
    from tqdm import tqdm

    with tqdm(total=total, unit="step", disable=None) as bar:
        yield bar.update
