"""Rows of a history for the loggers of other libraries."""

from collections.abc import Callable, Mapping
from typing import Any

from localsgd_jax.core.validation import check_type, describe
from localsgd_jax.reporting.records import Writer
from localsgd_jax.reporting.rows import flat_row


def to_tensorboard(writer: Any) -> Writer:
    """Returns a function that logs rows to TensorBoard.

    Args:
      writer: `tensorboardX.SummaryWriter(directory)`, that of
        `torch.utils.tensorboard`, or another object with
        `add_scalar(name, value, step)`.

    Returns:
      A function for `train(on_round_end=...)`.

    Raises:
      TypeError: if `writer` has no method `add_scalar`.

    Example:
      >>> class Printer:
      ...     def add_scalar(self, name, value, step):
      ...         print(step, name, value)
      >>> to_tensorboard(Printer())({"step": 4, "loss": 0.5})
      4 loss 0.5
    """
    add_scalar = _method("to_tensorboard(writer)", writer, "add_scalar")

    def log(row: Mapping[str, Any]) -> None:
        for name, value in _scalars(row).items():
            add_scalar(name, value, row["step"])

    return log


def to_wandb(run: Any) -> Writer:
    """Returns a function that logs rows to Weights & Biases.

    Args:
      run: from `wandb.init(...)`, or another object with `log(scalars, step=...)`.

    Returns:
      A function for `train(on_round_end=...)`.

    Raises:
      TypeError: if `run` has no method `log`.

    Example:
      >>> class Printer:
      ...     def log(self, scalars, step):
      ...         print(step, scalars)
      >>> to_wandb(Printer())({"step": 4, "loss": 0.5})
      4 {'loss': 0.5}
    """
    write = _method("to_wandb(run)", run, "log")

    def log(row: Mapping[str, Any]) -> None:
        write(_scalars(row), step=row["step"])

    return log


def to_clu(writer: Any) -> Writer:
    """Returns a function that logs rows to a metric writer of CLU.

    Args:
      writer: `clu.metric_writers.create_default_writer(directory)`, or another object
        with `write_scalars(step, scalars)`.

    Returns:
      A function for `train(on_round_end=...)`.

    Raises:
      TypeError: if `writer` has no method `write_scalars`.

    Example:
      >>> class Printer:
      ...     def write_scalars(self, step, scalars):
      ...         print(step, scalars)
      >>> to_clu(Printer())({"step": 4, "loss": 0.5})
      4 {'loss': 0.5}
    """
    write_scalars = _method("to_clu(writer)", writer, "write_scalars")

    def log(row: Mapping[str, Any]) -> None:
        write_scalars(row["step"], _scalars(row))

    return log


def to_all(*writers: Writer) -> Writer:
    """Returns a function that passes rows to several writers, in their order.

    Args:
      *writers: functions of a row.

    Returns:
      A function for `train(on_round_end=...)`.

    Raises:
      TypeError: if a writer is not callable.

    Example:
      >>> rows = []
      >>> to_all(rows.append, print)({"step": 4})
      {'step': 4}
      >>> rows
      [{'step': 4}]
    """
    for writer in writers:
        check_type("to_all(writers)", "each writer", writer, Callable)

    def write(row: Mapping[str, Any]) -> None:
        for writer in writers:
            writer(row)

    return write


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row but its step; NaN marks values that are missing."""
    flat = flat_row(row)
    return {k: value for k, value in flat.items() if k != "step" and value == value}


def _method(call: str, writer: Any, name: str) -> Callable:
    """Returns a method of an argument; raises a TypeError if it has none."""
    method = getattr(writer, name, None)
    if not callable(method):
        argument = call.partition("(")[2].rstrip(")")
        raise TypeError(
            f"{call}: {argument} must have a method {name}, got {describe(writer)}"
        )
    return method
