"""Tests that cover each module of the mutation score, the fastest first."""

from collections.abc import Sequence

GROUPS = {
    "rules": ("rules/",),
    "collectives": ("core/collectives.py", "core/pieces.py", "core/pytrees.py"),
    "schedules": ("schedules/",),
    "placement": ("execution/",),
    "checkpoint": ("checkpoint/",),
    "ledger": ("analysis/",),
}

_FIRST = {
    "rules/error_feedback.py": "rules/test_compression.py",
    "rules/codecs.py": "rules/test_codecs.py rules/test_compression.py",
    "schedules/growing.py": "schedules/test_schedules.py",
    "schedules/per_worker.py": "schedules/test_schedules.py",
    "schedules/periodic.py": "schedules/test_schedules.py",
    "schedules/schedule.py": "schedules/test_schedules.py",
    "analysis/jaxpr_bytes.py": "training/test_byte_counter.py",
}

_AFTER = {
    "rules": "rules/test_invariants.py rules/test_conformance.py rules/test_names.py "
    "execution/test_sharded_rules.py",
    "collectives": "core/test_algorithm.py rules/test_averaging.py "
    "rules/test_invariants.py rules/test_decentralized.py rules/test_hierarchies.py "
    "rules/test_compression.py rules/test_robust.py rules/test_sharded.py "
    "execution/test_sharded_rules.py",
    "schedules": "schedules training/test_segments.py",
    "placement": "core/test_algorithm.py execution rules/test_invariants.py "
    "training/test_loop.py multi_process/test_process_local.py",
    "checkpoint": "checkpoint",
    "ledger": "analysis training/test_byte_counter.py rules/test_conformance.py",
}


def group_of(file: str) -> str | None:
    """Returns the group of a module, `None` if it is not scored."""
    for group, prefixes in GROUPS.items():
        if file.startswith(prefixes):
            return group
    return None


def select_tests(file: str, exists: Sequence[str]) -> list[str]:
    """Returns the test files of a module, in the order of running.

    Args:
      file: module, relative to `localsgd_jax/`.
      exists: paths of all test files, relative to `tests/`.
    """
    folder, _, name = file.rpartition("/")
    own = f"{folder}/test_{name}"
    first = _FIRST.get(file, own if own in exists else "").split()
    # pytest drops a file that is inside a folder of the same command, and its position.
    after = [
        test
        for path in _AFTER[group_of(file)].split()
        for test in sorted(exists)
        if test == path or test.startswith(f"{path}/")
    ]
    paths = [f"tests/{test}" for test in first]
    paths.append(f"localsgd_jax/{file}")  # Its doctests.
    return list(dict.fromkeys([*paths, *(f"tests/{test}" for test in after)]))
