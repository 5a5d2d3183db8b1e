"""One process of several: does things together that fail in one of them.

    python company_process.py COORDINATOR PROCESSES PROCESS

Prints a line of JSON: what was returned, and how often each thing was tried.
"""

import json
import os
import sys
import threading

os.environ.setdefault("NPROC", "8")

import jax

import localsgd_jax as lsgd
from localsgd_jax.company import Company, CompanyError


def main(coordinator, processes, process):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    lsgd.initialize(coordinator, processes, process, recoverable=True, timeout=60)
    company, tried = Company(jax.devices(), timeout=1), []

    def once(devices):
        """Fails in process 1, the first time only."""
        tried.append(len(devices))
        if process == 1 and len(tried) == 1:
            raise OSError("a cable")
        return len(tried)

    def never(devices):
        """Takes too long in process 0, always."""
        tried.append(len(devices))
        if process == 0:
            threading.Event().wait(60)
        return len(tried)

    found = {"once": company.together(once), "tried": list(tried)}
    tried.clear()
    try:
        company.together(never)
    except CompanyError as error:
        found |= {"error": str(error), "then": len(tried)}
    # A new company knows nothing of the failures of the one before.
    found["again"] = Company(jax.devices(), timeout=20).together(len)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
