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

    A call of `sys.exit` by the user's program is one, since its code would be taken
    for that of the command.

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
    except SystemExit as error:
        raise click.ClickException(
            f"the program must not call sys.exit, got the exit code {error.code!r}"
        ) from error
