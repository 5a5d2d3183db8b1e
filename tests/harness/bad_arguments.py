"""Values that an argument may get by mistake, and the table of public functions."""

import inspect
import math

import numpy as np

NOTHING = object()
FAMILY = {
    "text": "x",
    "empty text": "",
    "bytes": b"3",
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "complex": 1j,
    "true": True,
    "list": [1.5],
    "dict": {"a": 1},
    "object": NOTHING,
    "minus one": -1,
    "half": 0.5,
    "large float": 1e9,
    "huge int": 10**30,
    "array": np.ones(2),
    "array of text": np.array(["a"]),
    "function": lambda *args: 0.5,
    "class": int,
}
TEXTS = ("text", "empty text")


def numbers_in(low, high, *, integer=False):
    """Names the values of the family that are numbers in a closed range."""
    kinds = int if integer else (int, float)
    return tuple(
        name
        for name, value in FAMILY.items()
        if isinstance(value, kinds)
        and not isinstance(value, bool)
        and low <= value <= high
    )


def check_refusal(call, argument, value, error):
    """Returns why an error does not name call, argument, rule and value, or None."""
    text = str(error)
    name = call.rpartition(".")[2]
    head = text.partition(":")[0]
    if not isinstance(error, TypeError | ValueError):
        return f"{type(error).__name__}: {text[:100]}"
    # A nested call, such as a rule made inside another, may be the one that is named.
    if not (head.startswith(f"{name}(") and argument in head):
        return f"does not name {name}({argument}): {text[:100]}"
    if "got" not in text and "must" not in text:
        return f"names no value: {text[:100]}"
    return None


def outcomes(name, function, good, accepts):
    """Calls a function once for each argument and bad value.

    Args:
      name: qualified name of the function.
      function: the function.
      good: valid arguments by name.
      accepts: for each argument the names of legitimate values of the family.

    Yields:
      Tuples (argument, name of the value, outcome); the outcome is "clear", "accepted",
      "legitimate", or a text that says what is unclear.
    """
    for argument in good:
        for label, value in FAMILY.items():
            if label in accepts.get(argument, ()):
                continue
            try:
                call = inspect.signature(function).bind(**good | {argument: value})
                function(*call.args, **call.kwargs)
            except Exception as error:
                outcome = check_refusal(name, argument, value, error) or "clear"
            else:
                outcome = "accepted"
            yield argument, label, outcome
