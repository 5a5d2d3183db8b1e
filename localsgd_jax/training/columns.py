"""Names of history columns, which are not available to metrics and evaluations."""

from collections.abc import Iterable

from localsgd_jax.core.validation import check

COLUMNS = ("step", "round", "bytes", "seconds")
# A column that only some histories have.
DEVICE_BYTES = "device_bytes"


def check_column_names(
    call: str, names: Iterable[str], reserved: Iterable[str] = ()
) -> None:
    """Raises a ValueError if new columns have names of other columns.

    Args:
      call: public call and argument, such as "train(evaluate)".
      names: names of the new columns.
      reserved: names of further columns, besides those of every history.

    Raises:
      ValueError: names the columns.
    """
    all_reserved = {*COLUMNS, DEVICE_BYTES, *reserved}
    clashes = sorted(all_reserved.intersection(names))
    rule = "names must differ from those of other columns of the history"
    check(not clashes, call, rule, ", ".join(map(repr, clashes)))
