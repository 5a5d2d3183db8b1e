"""Progress bar of a training loop."""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any


class ProgressBar:
    """Progress bar over local steps that shows the last round; invisible without tqdm.

    Attributes:
      bar: a `tqdm` bar, or None.
    """

    def __init__(self, bar: Any = None) -> None:
        """Wraps a bar."""
        self.bar = bar

    def update(self, steps: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Advances the bar.

        Args:
          steps: number of further local steps.
          rows: rows of the history; the last one is shown.
        """
        if self.bar is None:
            return
        if rows:
            self.bar.set_postfix(_postfix(rows[-1]))
        self.bar.update(steps)


@contextlib.contextmanager
def progress_bar(
    progress: bool | None, steps: int | None, batches: Iterable
) -> Iterator[ProgressBar]:
    """Opens a progress bar.

    Args:
      progress: whether to show it; None: if tqdm is installed.
      steps: most local steps of the run, or None.
      batches: batches of the run; their number bounds the steps if it is known.

    Yields:
      The bar.

    Raises:
      ImportError: if `progress` is True and tqdm is not installed.
    """
    if progress is None:
        progress = importlib.util.find_spec("tqdm") is not None
    if not progress:
        yield ProgressBar()
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("train(progress=True) needs tqdm: pip install tqdm") from None
    num_batches = len(batches) if isinstance(batches, Sized) else None
    total = min((n for n in (steps, num_batches) if n is not None), default=None)
    with tqdm(total=total, unit="step") as bar:
        yield ProgressBar(bar)


def _postfix(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that the bar shows of a round."""
    values = {"loss": row["loss"]} if "loss" in row else {}
    values |= {"round": row["round"], "MB": row["bytes"] / 1e6}
    if "live_processes" in row:
        values["live_processes"] = row["live_processes"]
    return values
