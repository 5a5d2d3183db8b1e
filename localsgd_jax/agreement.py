"""What all processes must have in common, compared before it can make them hang.

Programs that differ between processes wait for each other for ever. The facts travel
through the key-value store of JAX's coordination service, which knows time limits.
"""

import collections
import hashlib
import json
import re
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

# JAX has no public name for the client of its coordination service.
from jax._src.distributed import global_state

TIMEOUT = 300.0
# So that facts fit into the line of a roll call, and differences into its answer.
LARGE = 1 << 15
SHOWN = 200
_calls: collections.Counter = collections.Counter()
_NOTHING = "nothing"


class JobError(RuntimeError):
    """The processes of a job do not fit together, or one is missing."""


def same(
    call: str,
    facts: Mapping[str, object],
    processes: Sequence[int] | None = None,
    timeout: float | None = None,
) -> None:
    """Raises the same error in all processes if they do not have the same facts.

    Args:
      call: for the message, such as "train()"; all processes make the same calls.
      facts: numbers, strings, lists and dicts of them.
      processes: who compares; all if None.
      timeout: seconds to wait for a process; that of `initialize` if None.

    Raises:
      JobError: names what differs, or who did not come.
    """
    everyone = list(range(jax.process_count()) if processes is None else processes)
    if _alone(everyone):
        return
    timeout = TIMEOUT if timeout is None else timeout
    prefix, me, first = _prefix(call, everyone), jax.process_index(), min(everyone)
    store = _store()
    if me != first:
        store.key_value_set(f"{prefix}{me}", json.dumps(facts))
        # Process 0 may wait for all others in turn before it can speak.
        verdict = _get(f"{prefix}verdict", timeout + 30)
        if verdict is None:
            verdict = f"process {first} did not come within {timeout + 30:g} s"
        store.key_value_set(f"{prefix}{me}/heard", "")
    else:
        said = _collect(prefix, facts, everyone, timeout)
        found, lacking = differences(said), sorted(set(everyone) - set(said))
        if lacking:
            found.insert(0, f"{listed(lacking)} did not come within {timeout:g} s")
        verdict = "; ".join(found)
        store.key_value_set(f"{prefix}verdict", verdict)
        for other in said:
            if verdict and other != me:  # They must hear it before this one leaves.
                _get(f"{prefix}{other}/heard", 5)
    if verdict:
        raise JobError(f"{call}: {verdict}")


def told(call: str, say: Callable[[], object], processes: Sequence[int]) -> object:
    """Returns in every process what the first of them computes.

    Args:
      call: for the message; all processes make the same calls.
      say: called in the first process only; returns what JSON can hold.
      processes: who takes part.

    Returns:
      The value.

    Raises:
      JobError: in the others, if `say` raises; the first one's own error there.
    """
    if _alone(processes):
        return say()
    prefix, store = _prefix(call, processes), _store()
    if jax.process_index() != min(processes):
        while (heard := _get(prefix + "said", 60)) is None:
            pass  # If the first process dies, the service dies and this raises.
        message = json.loads(heard)
        if "error" in message:
            raise JobError(
                f"{call}: process {min(processes)} has failed: {message['error']}"
            )
        return message["value"]
    try:
        message = {"value": say()}
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
        store.key_value_set(prefix + "said", json.dumps({"error": failed}))
        raise
    store.key_value_set(prefix + "said", json.dumps(message))
    return message["value"]


class Turns:
    """What processes do in turns, before each of which any may say something.

    A word is written before the barrier and read behind it, so all read the same.
    """

    def __init__(self, call: str, processes: Sequence[int]) -> None:
        """Takes no turn yet.

        Args:
          call: for messages; all processes make the same calls.
          processes: who takes part.
        """
        self.call, self.everyone, self.number = call, list(processes), 0
        self.prefix, self.spoken = _prefix(call, self.everyone), ""

    def take(self, word: object = None) -> dict[int, Any]:
        """Waits for all; returns the words of those who have said one.

        Args:
          word: what JSON can hold, or None.

        Returns:
          The words by process, the same in all.

        Raises:
          JobError: names who did not come within the time of `initialize`.
        """
        if _alone(self.everyone):
            return {}
        self.number += 1
        store, here = _store(), f"{self.prefix}{self.number}/"
        before, self.spoken = self.spoken, ""
        if word is not None:
            self.spoken = f"{here}{jax.process_index()}"
            store.key_value_set(self.spoken, json.dumps(word))
        try:
            store.wait_at_barrier(
                f"{self.prefix}turn", int(TIMEOUT * 1000), self.everyone
            )
        except jax.errors.JaxRuntimeError as error:
            raise JobError(f"{self.call}: {_absent(str(error))}") from error
        if before:  # All have come here, so all have read it.
            store.key_value_delete(before)
        words = store.key_value_dir_get(here)
        return {int(key.rpartition("/")[2]): json.loads(text) for key, text in words}


def differences(said: Mapping[int, Mapping]) -> list[str]:
    """Names the facts in which processes differ.

    Args:
      said: for each process its facts; mappings in them are compared one by one.

    Returns:
      A line for each, at most five.

    Example:
      >>> differences({0: {"H": 4, "K": 2}, 1: {"H": 8, "K": 2}, 2: {"H": 8, "K": 2}})
      ['H: 4 in process 0, 8 in processes 1, 2']
    """
    flat = {process: _flat(facts) for process, facts in sorted(said.items())}
    names = dict.fromkeys(name for facts in flat.values() for name in facts)
    lines = []
    for name in names:
        who = collections.defaultdict(list)
        for process, facts in flat.items():
            who[facts.get(name, _NOTHING)].append(process)
        if len(who) > 1:
            parts = [f"{_shown(x)} in {listed(owners)}" for x, owners in who.items()]
            lines.append(f"{name}: {', '.join(parts)}")
    more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
    return lines[:5] + more


def plain(call: str, config: Mapping) -> dict:
    """Returns settings as JSON gives them back, large ones as their fingerprints.

    Args:
      call: for the message.
      config: anything that JSON can hold, under names.

    Returns:
      As many settings; where they are too long for a line, one for all.

    Raises:
      TypeError: if it is no mapping, or JSON cannot hold a value or its name.

    Example:
      >>> plain("initialize(config)", {"H": (4, 8)})
      {'H': [4, 8]}
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"{call}: it must be a mapping, got {_line(config)}")
    found = {}
    for name, value in config.items():
        try:
            found |= json.loads(json.dumps({name: value}))
        except (TypeError, ValueError, RecursionError):
            raise TypeError(
                f"{call}: JSON must be able to hold every value, got {_line(value)} "
                f"for {_line(name)}"
            ) from None
    for shorter in (_fingerprints, _fingerprint):
        if len(json.dumps(found)) > LARGE:
            found = shorter(found)
    return found


def _fingerprints(config: Mapping) -> dict[str, str]:
    """Returns the fingerprint of each value."""
    return {
        name: _shown(json.dumps(value, sort_keys=True))
        for name, value in config.items()
    }


def _fingerprint(config: Mapping) -> dict[str, str]:
    """Returns one fingerprint for all."""
    return {f"all {len(config)}": _shown(json.dumps(config, sort_keys=True))}


def _shown(text: str) -> str:
    """Returns a text, or its beginning and what tells it from others."""
    if len(text) <= SHOWN:
        return text
    return f"{text[:40]}… (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _line(value: object) -> str:
    """Returns what a value looks like, in part and in one line."""
    return " ".join(reprlib.repr(value).split())


def _collect(
    prefix: str, facts: Mapping, everyone: Sequence[int], timeout: float
) -> dict[int, Mapping]:
    """The first process collects the facts of those who come in time."""
    deadline, me = time.monotonic() + timeout, jax.process_index()
    said = {me: json.loads(json.dumps(facts))}
    for other in everyone:
        if other != me:
            heard = _get(f"{prefix}{other}", max(deadline - time.monotonic(), 1))
            if heard is not None:
                said[other] = json.loads(heard)
    return said


def _store() -> Any:
    """Returns the client of JAX's coordination service."""
    return global_state.client


def _alone(everyone: Sequence[int]) -> bool:
    """Whether there is nobody to compare with: the processes of a target do not run."""
    return len(everyone) < 2 or jax.process_count() < 2


def _get(key: str, seconds: float) -> str | None:
    """Waits for a key; None if it does not come in time."""
    try:
        return _store().blocking_key_value_get(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def _absent(error: str) -> str:
    """Says who did not come to a barrier, as far as its error tells."""
    if "DEADLINE_EXCEEDED" not in error:
        return error.splitlines()[0]
    _, _, names = error.partition("timed out task names:")
    numbers = re.findall(r"(\d+)$", names.partition("\n\n")[0], re.MULTILINE)
    who = listed(sorted(map(int, numbers))) if numbers else "a process"
    return f"{who} did not come within {TIMEOUT:g} s"


def _prefix(call: str, everyone: Sequence[int]) -> str:
    """Returns where in the store a call of these processes has its keys."""
    group = f"{call}/{'-'.join(map(str, everyone))}"
    _calls[group] += 1
    return f"localsgd/{group}/{_calls[group]}/"


def _flat(facts: Mapping, prefix: str = "") -> dict[str, str]:
    """Returns the facts without nesting, as text."""
    found = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(value)
    return found


def listed(processes: Sequence[int]) -> str:
    """Names processes, the first ten of them."""
    shown = ", ".join(map(str, processes[:10])) + (", …" if processes[10:] else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"
