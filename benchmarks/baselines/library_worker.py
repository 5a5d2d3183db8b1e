"""Worker process of the library: one CPU device, one worker, gloo."""

import argparse
import os

import jax

import localsgd_jax as lsgd
from benchmarks.baselines import jax_baselines, problem
from benchmarks.baselines.stdio_protocol import redirect_stdout, serve_stdin

RULES = {
    "average": lsgd.average,
    "flat average": lambda: lsgd.flatten(lsgd.average()),
    "diloco": lsgd.diloco,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rule", required=True, choices=list(RULES))
    parser.add_argument("--model", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--ranks", required=True, type=int)
    options, answers = parser.parse_args(), redirect_stdout()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    jax.distributed.initialize(address, options.ranks, options.rank)
    instance = problem.make(options.model, options.tiny)
    step, params = jax_baselines.fused(instance, RULES[options.rule]())
    serve_stdin(answers, step, lambda: jax.tree.leaves(jax.device_get(params())))


if __name__ == "__main__":
    main()
