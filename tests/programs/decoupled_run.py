"""Runs a decoupled job on Ray; prints rows and the result as lines of JSON."""

import json
import os
import sys
import time

import jax
import numpy as np
from harness.decoupled_jobs import batches, full_loss, make_job

from localsgd_jax import decoupled

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "NPROC": "16",
    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


def main():
    settings = json.loads(sys.argv[1])
    pause, slow = settings.pop("pause", 0.02), settings.pop("slow", {})

    def paused_batches(learner, start):
        for batch in batches(learner, start):
            time.sleep(pause * slow.get(str(learner), 1))
            yield batch

    policy = decoupled.immediate()
    if "quorum" in settings:
        policy = decoupled.quorum(*settings.pop("quorum"))
    bits = settings.pop("bits", None)
    changes = {"compress": decoupled.integers(bits, 8)} if bits else {}
    names = ("steps", "fragments", "overlap", "every")
    changes |= {name: settings.pop(name) for name in names if name in settings}
    job = make_job(merge=policy, batches=paused_batches, **changes)

    def record(row):
        print(json.dumps({"row": row}), flush=True)

    start = time.monotonic()
    params, history = decoupled.run(
        job,
        settings.pop("learners"),
        environment=ENVIRONMENT,
        record=record,
        progress=False,
        **settings,
    )
    result = {
        "seconds": time.monotonic() - start,
        "loss": full_loss(params),
        "steps": int(history["steps"][history["fragment"] == 0][-1]),
        "reissued": int(history["reissued"].max()),
        "duplicates": int(history["duplicates"].max()),
    }
    if directory := settings.get("checkpoint"):
        log = decoupled.read_log(job, directory)
        repeated, _ = decoupled.replay(job, log)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(repeated), strict=True)
        result["equal"] = all(np.array_equal(a, b) for a, b in pairs)
        plain = make_job(merge=policy, **changes)
        recomputed = decoupled.recompute(plain, log)
        result["recomputed"] = recomputed.equal
        result["different"] = len(recomputed.different)
    print(json.dumps({"result": result}), flush=True)


if __name__ == "__main__":
    main()
