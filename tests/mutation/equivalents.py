"""Random mutants that no test can detect, by name, each with the reason."""

EQUIVALENT: dict[str, str] = {
    "checkpoint/leaves.py ReplaceTrueWithFalse 0": (
        "strict zip of the leaves of the workers and their specs, of one length"
    ),
    "checkpoint/run_checkpointer.py ReplaceTrueWithFalse 0": (
        "strict zip of two lists that both have one element per leaf"
    ),
    "core/collectives.py NumberReplacer 19": (
        "the first and the last element of a list of one argument"
    ),
    "core/pieces.py NumberReplacer 7": (
        "only map_vectors, which sets the number, calls functions that read it"
    ),
    "core/pieces.py ReplaceTrueWithFalse 5": (
        "strict zip of the leaves of a tree and of its specs, which have one length"
    ),
    "execution/batches.py ReplaceTrueWithFalse 0": (
        "strict zip of the leaves of a batch and of its specs, which have one length"
    ),
    "rules/compression.py NumberReplacer 0": (
        "a limit on temporary memory; the result does not depend on it"
    ),
    "rules/decentralized.py NumberReplacer 3": (
        "the first and the last element of a list whose length is 1"
    ),
    "rules/partitioning.py ReplaceTrueWithFalse 3": (
        "strict zip of the leaves of a tree and of their labels, which have one length"
    ),
    "schedules/growing.py NumberReplacer 18": (
        "stages beyond int32 are removed after the loop; the period is below h"
    ),
}
