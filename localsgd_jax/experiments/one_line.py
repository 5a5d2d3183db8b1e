"""Errors for the command line: one line each, without a traceback."""

import contextlib
from collections.abc import Iterator

import click

from localsgd_jax.agreement import JobError


@contextlib.contextmanager
def one_line(
    kinds: tuple[type[Exception], ...] = (
        ValueError,
        TypeError,
        OSError,
        JobError,
    ),
) -> Iterator[None]:
    """Turns errors into one line, those that input can cause.

    Args:
      kinds: which.

    Yields:
      Nothing.

    Raises:
      ClickException: in their place.
    """
    try:
        yield
    except kinds as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        raise click.ClickException(" ".join(text.split())) from error
