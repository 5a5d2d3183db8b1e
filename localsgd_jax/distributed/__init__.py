"""Multi-process runtime: rendezvous, coordination, meshes and global arrays."""

from localsgd_jax.distributed.shutdown import exit_process

__all__ = ["exit_process"]
