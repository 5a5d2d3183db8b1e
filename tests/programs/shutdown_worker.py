"""Process of a recoverable job that exits later the higher its index is.

    python shutdown_worker.py COORDINATOR PROCESSES PROCESS

Prints a line of JSON.
"""

import json
import sys
import time

import jax

import localsgd_jax as lsgd


def main(coordinator, processes, process):
    jax.config.update("jax_platforms", "cpu")
    lsgd.initialize(coordinator, processes, process, recoverable=True, timeout=60)
    time.sleep(2 * process)
    print(json.dumps({"process": process}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
