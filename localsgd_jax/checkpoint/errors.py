"""Errors of checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint does not match the run, is damaged, or could not be written."""


class Damage(Exception):
    """A part of a checkpoint that is unreadable or has another digest."""


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error, at most 200 characters."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
