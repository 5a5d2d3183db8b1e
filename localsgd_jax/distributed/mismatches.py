"""Fingerprints of configurations and descriptions of their mismatches."""

import collections
import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence

# A registration of the rendezvous and its reply have to fit into one message.
MAX_CONFIG_BYTES = 1 << 15
MAX_VALUE_CHARS = 200
MAX_MISMATCHES = 5
MAX_LISTED_PROCESSES = 10
_MISSING = "nothing"


def describe_mismatches(fingerprints: Mapping[int, Mapping]) -> list[str]:
    """Describes the differences between fingerprints of processes.

    Args:
      fingerprints: fingerprint of each process; nested mappings are compared entry by
        entry.

    Returns:
      One line per entry that differs, at most five, and the number of further ones.

    Example:
      >>> describe_mismatches({0: {"H": 4}, 1: {"H": 8}, 2: {"H": 8}})
      ['H: 4 in process 0, 8 in processes 1, 2']
    """
    flat = {process: _flatten(entries) for process, entries in fingerprints.items()}
    names = dict.fromkeys(name for process in sorted(flat) for name in flat[process])
    lines = []
    for name in names:
        processes_by_value = collections.defaultdict(list)
        for process in sorted(flat):
            processes_by_value[flat[process].get(name, _MISSING)].append(process)
        if len(processes_by_value) > 1:
            parts = [
                f"{_truncate(value)} in {format_processes(processes)}"
                for value, processes in processes_by_value.items()
            ]
            lines.append(f"{name}: {', '.join(parts)}")
    if (further := len(lines) - MAX_MISMATCHES) > 0:
        return [*lines[:MAX_MISMATCHES], f"and {further} more"]
    return lines


def format_processes(processes: Sequence[int]) -> str:
    """Formats process indices for a message; lists at most ten.

    Args:
      processes: process indices.

    Returns:
      Text such as "processes 0, 3".

    Example:
      >>> format_processes([0, 3])
      'processes 0, 3'
    """
    listed = ", ".join(map(str, processes[:MAX_LISTED_PROCESSES]))
    if len(processes) > MAX_LISTED_PROCESSES:
        listed += ", …"
    return f"process{'es' if len(processes) > 1 else ''} {listed}"


def to_json(call: str, config: Mapping) -> dict:
    """Converts a configuration to JSON values; hashes large values.

    Args:
      call: public call and argument for error messages, such as "initialize(config)".
      config: JSON-serialisable values by name.

    Returns:
      The configuration after a JSON round trip. If it exceeds `MAX_CONFIG_BYTES`,
      long values are replaced by their hashes, and if it still does, all of it by one
      hash.

    Raises:
      TypeError: if `config` is not a mapping, or a name or value is not
        JSON-serialisable.

    Example:
      >>> to_json("initialize(config)", {"H": (4, 8)})
      {'H': [4, 8]}
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"{call}: must be a mapping, got {_short_repr(config)}")
    converted = {}
    for name, value in config.items():
        try:
            converted |= json.loads(json.dumps({name: value}))
        except (TypeError, ValueError, RecursionError):
            raise TypeError(
                f"{call}: names and values must be JSON-serialisable, got "
                f"{_short_repr(value)} for {_short_repr(name)}"
            ) from None
    for shorten in (_hash_values, _hash_config):
        if len(json.dumps(converted)) > MAX_CONFIG_BYTES:
            converted = shorten(converted)
    return converted


def _hash_values(config: Mapping) -> dict[str, str]:
    """Replaces long values by truncated text with a hash."""
    return {
        name: _truncate(json.dumps(value, sort_keys=True))
        for name, value in config.items()
    }


def _hash_config(config: Mapping) -> dict[str, str]:
    """Replaces a configuration by one entry with a hash of all values."""
    return {f"all {len(config)}": _truncate(json.dumps(config, sort_keys=True))}


def _truncate(text: str) -> str:
    """Truncates a long text and appends its SHA-256 hash."""
    if len(text) <= MAX_VALUE_CHARS:
        return text
    return f"{text[:40]}… (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _short_repr(value: object) -> str:
    """Returns an abbreviated `repr` without line breaks."""
    return " ".join(reprlib.repr(value).split())


def _flatten(entries: Mapping, prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to dotted names with JSON text as values."""
    flat = {}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value)
    return flat
