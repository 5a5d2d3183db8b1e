"""Eight CPU devices, rank promotion raises; set before JAX starts."""

import os

os.environ.setdefault("NPROC", "32")  # JAX 0.10 and 0.11 starve with fewer threads.

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
