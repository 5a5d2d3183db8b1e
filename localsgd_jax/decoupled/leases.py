"""Leases of batches: each round of the job is computed by one learner at a time."""

from typing import NamedTuple


class Leases(NamedTuple):
    """Rounds that are free and rounds that are being computed.

    A lease is the index of the first batch of a round; it covers `every` batches.

    Attributes:
      next: first lease that was never given out.
      end: number of batches of the job.
      every: batches per lease.
      returned: leases of learners that have left, ascending.
      reissued: number of leases that were returned so far.
    """

    next: int
    end: int
    every: int
    returned: tuple[int, ...] = ()
    reissued: int = 0


def take_lease(leases: Leases) -> tuple[Leases, tuple[int, ...]]:
    """Takes the earliest free lease.

    Args:
      leases: the free leases.

    Returns:
      The others, and a tuple of the lease, empty if there is none.

    Example:
      >>> take_lease(Leases(next=4, end=8, every=4))
      (Leases(next=8, end=8, every=4, returned=(), reissued=0), (4,))
    """
    if leases.returned:
        first, *others = leases.returned
        return leases._replace(returned=tuple(others)), (first,)
    if leases.next < leases.end:
        return leases._replace(next=leases.next + leases.every), (leases.next,)
    return leases, ()


def return_leases(leases: Leases, given: tuple[int, ...]) -> Leases:
    """Returns the leases of a learner that has left.

    Args:
      leases: the free leases.
      given: leases of a learner.

    Returns:
      All free leases.
    """
    return leases._replace(
        returned=tuple(sorted((*leases.returned, *given))),
        reissued=leases.reissued + len(given),
    )
