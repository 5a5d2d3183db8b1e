"""Output forwarding: merges the pipes of all processes, with a prefix on each line."""

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TextIO

# After a newline, or after a carriage return as progress bars write it.
_LINE_END = re.compile(rb"(?<=\n)|(?<=\r)(?=[^\n])")
CHUNK_BYTES = 1 << 16
# More than the capacity of a pipe: a writer that exceeds it after all processes of the
# job have exited does not belong to the job.
MAX_TRAILING_BYTES = 1 << 21
_write_lock = threading.Lock()


class OutputForwarder(threading.Thread):
    """Thread that forwards lines of a pipe with a prefix."""

    def __init__(
        self,
        source: IO[bytes],
        sink: TextIO,
        prefix: str,
        report_failure: Callable[[int], None],
    ) -> None:
        """Starts the thread.

        Args:
          source: pipe of a process.
          sink: output of the launcher.
          prefix: text in front of each line.
          report_failure: called with an exit code if the sink cannot be written:
            −SIGPIPE if its reader has closed it, otherwise 1.
        """
        super().__init__(daemon=True)
        self.source, self.sink, self.report_failure = source, sink, report_failure
        self.prefix = prefix.encode()
        self.is_reading, self.num_bytes, self.max_bytes = False, 0, 0
        self.start()

    def run(self) -> None:
        """Forwards lines; reports a failure of the sink."""
        with self.source:
            for lines in split_lines(self._read_chunks()):
                try:
                    write_all(self.sink, b"".join(map(self._add_prefix, lines)))
                except BrokenPipeError:
                    self.report_failure(-signal.SIGPIPE)
                    return
                except (OSError, ValueError) as error:
                    log(f"cannot write the output: {error}")
                    self.report_failure(1)
                    return

    def is_drained(self, deadline: float) -> bool:
        """Returns whether the output is complete, once all processes have exited.

        A slow reader of the sink receives all output of the job. A process that has
        left the job, however, may keep the pipe open or write to it indefinitely.

        Args:
          deadline: time on the monotonic clock after which an empty pipe counts as
            drained.

        Returns:
          Whether everything is forwarded, or the rest does not belong to the job.
        """
        self.max_bytes = self.max_bytes or self.num_bytes + MAX_TRAILING_BYTES
        is_late = time.monotonic() >= deadline
        return (
            not self.is_alive()
            or self.num_bytes > self.max_bytes
            or (is_late and self.is_reading and not self._is_readable())
        )

    def _add_prefix(self, line: bytes) -> bytes:
        """Returns a line with the prefix; a progress bar begins with an empty line."""
        return line if line == b"\r" else self.prefix + line

    def _read_chunks(self) -> Iterator[bytes]:
        """Yields chunks of the pipe until EOF."""
        while True:
            self.is_reading = True
            chunk = os.read(self.source.fileno(), CHUNK_BYTES)
            self.is_reading = False
            self.num_bytes += len(chunk)
            if not chunk:
                return
            yield chunk

    def _is_readable(self) -> bool:
        """Returns whether the pipe holds data."""
        try:
            return bool(select.select([self.source], [], [], 0)[0])
        except (OSError, ValueError):  # Closed by another thread.
            return False


def split_lines(chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Splits chunks of text into lines, in linear time.

    Args:
      chunks: chunks of a text, cut anywhere.

    Yields:
      The lines that a chunk completes, with their ends; the last line gets a newline.

    Example:
      >>> list(split_lines([b"a", b"b\\nc\\r", b"d"]))
      [[b'ab\\n'], [b'c\\r'], [b'd\\n']]
    """
    partial_line, pending_cr = [], b""
    for chunk in chunks:
        parts = _LINE_END.split(pending_cr + chunk)
        # The next chunk may begin with the newline of this carriage return.
        pending_cr = b"\r" if parts[-1].endswith(b"\r") else b""
        parts[-1] = parts[-1].removesuffix(pending_cr)
        first, *rest = parts
        partial_line.append(first)
        if rest:
            yield [b"".join(partial_line), *rest[:-1]]
            partial_line = rest[-1:]
    if last := b"".join(partial_line) + pending_cr:
        yield [last + b"\n"]


def write_all(sink: TextIO, text: bytes) -> None:
    """Writes a text unbuffered.

    A buffer would lose text when the process is killed.

    Args:
      sink: open file.
      text: bytes to write.

    Raises:
      OSError: if the text cannot be written.
      ValueError: if the sink is closed.
    """
    remaining = memoryview(text)
    with _write_lock:
        while remaining:
            remaining = remaining[os.write(sink.fileno(), remaining) :]


def log(text: str) -> None:
    """Writes a message of the launcher to stderr; ignores a closed stderr.

    Args:
      text: message without a newline.
    """
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"localsgd launch: {text}\n".encode())
