"""Process of a job in which calls of `run_atomically` fail in one process.

    python membership_worker.py COORDINATOR PROCESSES PROCESS

Prints a line of JSON: returned values, errors and numbers of attempts.
"""

import json
import os
import sys
import threading

os.environ.setdefault("NPROC", "8")

import jax

import localsgd_jax as lsgd
from localsgd_jax.fault_tolerance.membership import Membership, MembershipError


def main(coordinator, processes, process):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    lsgd.initialize(coordinator, processes, process, recoverable=True, timeout=60)
    membership, attempts = Membership(jax.devices(), timeout=1), []

    def fail_once(devices):
        """Raises in process 1 at the first attempt."""
        attempts.append(len(devices))
        if process == 1 and len(attempts) == 1:
            raise OSError("a cable")
        return len(attempts)

    def block(devices):
        """Exceeds the timeout in process 0 at each attempt."""
        attempts.append(len(devices))
        if process == 0:
            threading.Event().wait(60)
        return len(attempts)

    found = {"fail_once": membership.run_atomically(fail_once)}
    found["devices"] = list(attempts)
    attempts.clear()
    try:
        membership.run_atomically(block)
    except MembershipError as error:
        found |= {"error": str(error), "attempts": len(attempts)}
    # Failures that another instance has published do not count here.
    found["new_instance"] = Membership(jax.devices(), timeout=20).run_atomically(len)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
