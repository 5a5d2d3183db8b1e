"""One-line error messages of the command line."""

import contextlib
from collections.abc import Iterator

import click

from localsgd_jax.distributed.coordination import CoordinationError

INPUT_ERRORS = (ValueError, TypeError, OSError, CoordinationError)


@contextlib.contextmanager
def click_errors(
    error_types: tuple[type[Exception], ...] = INPUT_ERRORS,
) -> Iterator[None]:
    """Converts input errors into one-line click errors.

    Args:
      error_types: types of the errors to convert.

    Yields:
      Nothing.

    Raises:
      ClickException: in place of an error of these types.
    """
    try:
        yield
    except error_types as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        raise click.ClickException(" ".join(text.split())) from error
