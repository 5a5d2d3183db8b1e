"""Faults planted in `localsgd_jax/asynchronous/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "shrinks aligned updates": Mutant(
        "asynchronous/staleness.py",
        "beta * cosine * norm * m_unit",
        "beta * norm * m_unit",
        "asynchronous/test_staleness.py -k hand",
    ),
    "counts updates from the cutoff on": Mutant(
        "asynchronous/staleness.py",
        "jnp.minimum(jnp.asarray(staleness, jnp.float32), cutoff)",
        "jnp.asarray(staleness, jnp.float32)",
        "asynchronous/test_staleness.py -k numpy",
    ),
}
