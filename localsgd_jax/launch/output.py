"""Output of many processes in one place, each line with the number of its process."""

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import IO, TextIO

# After a newline, or after a carriage return as progress bars write it.
_ENDS = re.compile(rb"(?<=\n)|(?<=\r)(?=[^\n])")
PIECE = 1 << 16
# More than a pipe holds: who still writes that much is no process of the job.
REST = 1 << 21
_lock = threading.Lock()


class Copier(threading.Thread):
    """Copies lines until the source ends or nobody takes them."""

    def __init__(
        self, source: IO[bytes], sink: TextIO, prefix: str, events: SimpleQueue
    ) -> None:
        """Starts.

        Args:
          source: what a process writes.
          sink: where it goes.
          prefix: what each line gets in front.
          events: told `(None, code)` if the sink takes no more, `-SIGPIPE` if nobody
            reads it.
        """
        super().__init__(daemon=True)
        self.source, self.sink, self.events = source, sink, events
        self.prefix = prefix.encode()
        self.reading, self.seen, self.limit = False, 0, 0
        self.start()

    def run(self) -> None:
        """Copies."""
        with self.source:
            for lines in whole_lines(self._pieces()):
                try:
                    write(self.sink, b"".join(self.prefix + line for line in lines))
                except BrokenPipeError:
                    self.events.put((None, -signal.SIGPIPE))
                    return
                except (OSError, ValueError) as error:
                    say(f"cannot write the output: {error}")
                    self.events.put((None, 1))
                    return

    def ended(self, deadline: float) -> bool:
        """Whether nothing more is to be waited for, once all processes have ended.

        A reader that is slow gets all that they wrote, but a process that left the job
        may hold the pipe for ever, or fill it for ever.

        Args:
          deadline: when to give up an empty pipe, on the monotonic clock.

        Returns:
          Whether all is copied, or what is missing is none of the job's.
        """
        self.limit = self.limit or self.seen + REST
        late = time.monotonic() >= deadline and self.reading and not self._filled()
        return not self.is_alive() or self.seen > self.limit or late

    def _pieces(self) -> Iterator[bytes]:
        """Reads."""
        while True:
            self.reading = True
            piece = os.read(self.source.fileno(), PIECE)
            self.reading = False
            self.seen += len(piece)
            if not piece:
                return
            yield piece

    def _filled(self) -> bool:
        """Whether there is something to read."""
        try:
            return bool(select.select([self.source], [], [], 0)[0])
        except (OSError, ValueError):  # Closed since then.
            return False


def whole_lines(pieces: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Puts lines together, in linear time however long they are.

    Args:
      pieces: of a text, cut anywhere.

    Yields:
      The lines that have become complete, with their ends; the last one gets one.

    Example:
      >>> list(whole_lines([b"a", b"b\\nc\\r", b"d"]))
      [[b'ab\\n'], [b'c\\r'], [b'd\\n']]
    """
    held, turn = [], b""
    for piece in pieces:
        parts = _ENDS.split(turn + piece)
        # The newline of this carriage return may still come.
        turn = b"\r" if parts[-1].endswith(b"\r") else b""
        parts[-1] = parts[-1].removesuffix(turn)
        first, *rest = parts
        held.append(first)
        if rest:
            yield [b"".join(held), *rest[:-1]]
            held = rest[-1:]
    if last := b"".join(held) + turn:
        yield [last + b"\n"]


def write(sink: TextIO, text: bytes) -> None:
    """Writes all of a text, without a buffer that could lose it.

    Args:
      sink: where.
      text: what.

    Raises:
      OSError: if it cannot be written.
      ValueError: if the sink is closed.
    """
    left = memoryview(text)
    with _lock:
        while left:
            left = left[os.write(sink.fileno(), left) :]


def say(text: str) -> None:
    """Writes a line of the launcher's own, if anybody listens.

    Args:
      text: what.
    """
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"localsgd launch: {text}\n".encode())
