"""Random mutants that no test can detect, by name, each with the reason."""

EQUIVALENT: dict[str, str] = {
    "checkpoint/run_checkpointer.py ReplaceTrueWithFalse 0": (
        "strict zip of two lists that both have one element per leaf"
    ),
}
