"""Test session: eight CPU devices, rank promotion raises, compiled programs cached."""

import importlib.util
import os
import pathlib

# JAX reads its environment when it is imported; child processes inherit it.
os.environ.setdefault("NPROC", "32")  # JAX 0.10 and 0.11 starve with fewer threads.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs of the extra `mutation`.
if importlib.util.find_spec("cosmic_ray") is None:
    collect_ignore = ["mutation/run.py", "mutation/sampling.py"]
