"""Random mutants that no test can detect, by name, each with the reason."""

EQUIVALENT: dict[str, str] = {}
