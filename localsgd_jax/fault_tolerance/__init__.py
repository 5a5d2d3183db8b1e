"""Training that continues when processes fail."""

from localsgd_jax.fault_tolerance.loop import train
from localsgd_jax.fault_tolerance.membership import Membership, MembershipError
from localsgd_jax.fault_tolerance.status import EXIT_PREEMPTED, EXIT_TOO_FEW_PROCESSES

__all__ = [
    "EXIT_PREEMPTED",
    "EXIT_TOO_FEW_PROCESSES",
    "Membership",
    "MembershipError",
    "train",
]
