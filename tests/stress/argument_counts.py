"""Counts how the public functions answer wrong arguments.

Run `cd tests && python -m stress.argument_counts`. Counts the calls of the table in
`harness.public_functions`: each argument with each value of `harness.bad_arguments`
that the table does not call legitimate.
"""

import collections
import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

from harness.bad_arguments import outcomes
from harness.public_functions import TABLE, arguments, find

SECONDS_PER_FUNCTION = 20


class DidNotReturn(BaseException):
    """A call took longer than the limit."""


def _stop(*signal_and_frame):
    """Interrupts a call."""
    raise DidNotReturn


def main():
    """Prints the number of calls with each outcome."""
    signal.signal(signal.SIGALRM, _stop)
    counts = collections.Counter()
    for name, (good, accepts) in TABLE.items():
        signal.alarm(SECONDS_PER_FUNCTION)
        try:
            for *_, outcome in outcomes(name, find(name), arguments(good), accepts):
                kind = outcome if outcome in ("clear", "accepted") else "unclear"
                counts[kind] += 1
        except DidNotReturn:
            counts["did not return"] += 1
        signal.alarm(0)
    print(f"{len(TABLE)} functions, {sum(counts.values())} calls:", dict(counts))


if __name__ == "__main__":
    main()
