"""Faults in the decoupled jobs."""

from mutation.mutant import Mutant

MUTANTS = {
    "counts a contribution twice": Mutant(
        "decoupled/syncer.py",
        "if event.number <= member.number:",
        "if event.number < member.number:",
        "decoupled/test_simulation.py -k counted_once",
    ),
    "loses the rounds of a learner that has left": Mutant(
        "decoupled/leases.py",
        "returned=tuple(sorted((*leases.returned, *given))),",
        "returned=leases.returned,",
        "decoupled/test_simulation.py -k no_batch_is_lost",
    ),
    "merges updates that are not finite": Mutant(
        "decoupled/merging.py",
        "return where(finite, added, total), finite",
        "return added, jnp.bool_(True)",
        "decoupled/test_simulation.py -k not_finite",
    ),
    "waits for every learner in the grace window": Mutant(
        "decoupled/merging.py",
        "return max([opened, *(t for t in expected if t <= opened + grace)])",
        "return opened + grace",
        "decoupled/test_simulation.py -k predicted",
    ),
    "applies events before they are in the log": Mutant(
        "decoupled/syncer_host.py",
        "self._write(event)\n        return self.replay(event)",
        "return self.replay(event)",
        "decoupled/test_restore.py -k restarted",
    ),
}
