"""One process of the library: one CPU device, one worker, gloo."""

import argparse
import os

import jax

import localsgd_jax as lsgd
from benchmarks.peers import in_jax, problem
from benchmarks.peers.serving import own_output, serve

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
    options, answers = parser.parse_args(), own_output()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    jax.distributed.initialize(address, options.ranks, options.rank)
    given = problem.make(options.model, options.tiny)
    turn, look = in_jax.fused(given, RULES[options.rule]())
    serve(answers, turn, lambda: jax.tree.leaves(jax.device_get(look())))


if __name__ == "__main__":
    main()
