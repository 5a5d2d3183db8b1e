"""What is sent: read from compiled programs, and counted before there is one."""

from localsgd_jax.ledger.entries import (
    RING,
    Branch,
    Entry,
    Loop,
    along,
    ledger,
    read,
    sent,
)
from localsgd_jax.ledger.silent import NoisyStepError, assert_silent
from localsgd_jax.ledger.sources import Frame
from localsgd_jax.ledger.table import table
from localsgd_jax.ledger.traced import sent_bytes

__all__ = [
    "RING",
    "Branch",
    "Entry",
    "Frame",
    "Loop",
    "NoisyStepError",
    "along",
    "assert_silent",
    "ledger",
    "read",
    "sent",
    "sent_bytes",
    "table",
]
