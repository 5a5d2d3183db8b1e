"""Event log: each event of a syncer on disk before it is applied.

A record is a line of JSON, which ends with the shapes and dtypes of the arrays of a
payload, and the bytes of these arrays.
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from localsgd_jax.core.types import PyTree
from localsgd_jax.core.validation import check_type
from localsgd_jax.decoupled import events
from localsgd_jax.decoupled.events import Contribution, Event
from localsgd_jax.decoupled.fragments import split
from localsgd_jax.decoupled.job import Job, check_job, shared_params
from localsgd_jax.decoupled.payload import encode_update

_KINDS = {
    kind.__name__: kind
    for kind in (events.Join, events.Leave, events.Request, Contribution, events.Tick)
}


class EventLog:
    """Files of events in the directory of a fragment.

    A file is named after the number of events before it.
    """

    def __init__(self, directory: str, count: int) -> None:
        """Opens a new file.

        Args:
          directory: directory of the fragment.
          count: number of events before.
        """
        os.makedirs(directory, exist_ok=True)
        self._directory, self.count = directory, count
        self._file: BinaryIO = open(_path(directory, count), "ab", buffering=0)

    def append(self, event: Event) -> None:
        """Writes an event; it survives the end of the process."""
        self._file.write(_encode(event))
        self.count += 1

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_events(directory: str, payload: PyTree, start: int = 0) -> Iterator[Event]:
    """Yields the events of a directory from a number on.

    A record at the end of a file that is not complete is left out.

    Args:
      directory: directory of a fragment.
      payload: gives the structure of payloads.
      start: number of the first event.

    Yields:
      Events.
    """
    structure = jax.tree.structure(payload)
    counts = sorted(
        int(re.sub(r"\D", "", os.path.basename(path)))
        for path in glob.glob(_path(directory, "*"))
    )
    position = 0
    for number in counts:
        position = number
        with open(_path(directory, number), "rb") as file:
            while (event := _decode(file, structure)) is not None:
                if position >= start:
                    yield event
                position += 1


def read_log(job: Job, directory: str) -> list[tuple[int, Event]]:
    """Reads the events of a run.

    Args:
      job: the job of the run.
      directory: argument `checkpoint` of `run`.

    Returns:
      Pairs of fragment and event for `replay`: all events of fragment 0, then those of
      fragment 1, and so on.

    Raises:
      TypeError: if an argument has the wrong type.
      FileNotFoundError: if the directory has no events.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> from localsgd_jax import decoupled
      >>> algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1),
      ...                            rule=lsgd.average())
      >>> job = decoupled.Job(algorithm, {"w": jnp.zeros(())}, lambda k, start: [],
      ...                     every=2, steps=4, merge=decoupled.immediate())
      >>> try:
      ...     decoupled.read_log(job, tempfile.mkdtemp())
      ... except FileNotFoundError as error:
      ...     print(str(error)[:30])
      read_log(directory): no events
    """
    check_job("read_log", job)
    check_type("read_log(directory)", "directory", directory, str, os.PathLike)
    log = [
        (fragment, event)
        for fragment in range(job.fragments)
        for event in read_events(
            fragment_directory(directory, fragment), payload_like(job, fragment)
        )
    ]
    if not log:
        raise FileNotFoundError(f"read_log(directory): no events in {directory}")
    return log


def fragment_directory(directory: str, fragment: int) -> str:
    """Returns the directory of the events and checkpoints of a fragment."""
    return os.path.join(os.path.abspath(directory), f"fragment-{fragment}")


def payload_like(job: Job, fragment: int) -> PyTree:
    """Returns shapes and dtypes of the payloads of a fragment."""
    part = split(shared_params(job), job.fragments)[fragment]
    size = sum(jnp.size(leaf) for leaf in part.values())
    vector = jax.ShapeDtypeStruct((size,), jnp.float32)
    encode = jax.eval_shape(
        lambda p, e: encode_update(job.compress, p, e)[0], vector, vector
    )
    return encode


def _path(directory: str, count: int | str) -> str:
    """Returns the path of a file of events."""
    number = count if isinstance(count, str) else f"{count:012d}"
    return os.path.join(directory, f"events-{number}")


def _encode(event: Event) -> bytes:
    """Returns the record of an event."""
    values: dict[str, Any] = event._asdict() | {"kind": type(event).__name__}
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(values.pop("payload", ()))]
    values["arrays"] = [[leaf.dtype.name, leaf.shape] for leaf in arrays]
    header = json.dumps(values).encode() + b"\n"
    return b"".join([header, *(leaf.tobytes() for leaf in arrays)])


def _decode(file: BinaryIO, structure: Any) -> Event | None:
    """Reads a record; returns None at the end of the complete records."""
    header = file.readline()
    if not header.endswith(b"\n"):
        return None
    values, arrays = json.loads(header), []
    for name, shape in values.pop("arrays"):
        dtype = np.dtype(name)
        count = int(np.prod(shape, dtype=int))
        data = file.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            return None
        arrays.append(np.frombuffer(data, dtype).reshape(shape))
    kind = _KINDS[values.pop("kind")]
    if kind is Contribution:
        values["payload"] = structure.unflatten(arrays)
    return kind(**values)
