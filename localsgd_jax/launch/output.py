"""Output of many processes in one place, each line with the number of its process."""

import os
import re
import signal
import threading
from queue import SimpleQueue
from typing import IO, TextIO

# After a newline, or after a carriage return as progress bars write it.
_ENDS = re.compile(rb"(?<=\n)|(?<=\r)(?=[^\n])")
_lock = threading.Lock()


def copy(
    source: IO[bytes], sink: TextIO, prefix: str, events: SimpleQueue
) -> threading.Thread:
    """Copies lines in a thread of its own, until the source ends.

    Args:
      source: what a process writes.
      sink: where it goes.
      prefix: what each line gets in front.
      events: told `(None, -SIGPIPE)` if nobody reads the sink any more.

    Returns:
      The thread.
    """

    def run() -> None:
        held = b""
        with source:
            while piece := os.read(source.fileno(), 1 << 16):
                *whole, held = _ENDS.split(held + piece)
                if not write(whole):
                    return
            write([held + b"\n"] if held else [])

    def write(lines: list[bytes]) -> bool:
        text = b"".join(prefix.encode() + line for line in lines)
        try:
            with _lock:
                sink.buffer.write(text)
                sink.buffer.flush()
        except (BrokenPipeError, ValueError):
            events.put((None, -signal.SIGPIPE))
            return False
        return True

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
