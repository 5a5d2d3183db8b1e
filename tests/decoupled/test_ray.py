"""Decoupled jobs on Ray, with real processes and signals."""

import os
import signal
import time

import pytest
from harness.decoupled_jobs import full_loss, make_job
from harness.decoupled_processes import DecoupledProcess

from localsgd_jax import decoupled

pytest.importorskip("ray", reason="pip install -e '.[decoupled]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 1600


def undisturbed_loss(**changes):
    """Returns the loss of the job on a virtual clock with equal speeds."""
    job = make_job(steps=STEPS, merge=decoupled.quorum(3, 0.5), **changes)
    return full_loss(decoupled.simulate(job, decoupled.Clock(4))[0])


def contributed(rows, learner, count=1, after=0.0):
    """Returns whether a learner has contributed so often since a time."""
    times = [r["now"] for r in rows if learner in r["learners"] and r["now"] > after]
    return len(times) >= count


def started(rows):
    return all(contributed(rows, k, 2) for k in range(4))


def all_contributed(rows, after):
    return all(contributed(rows, k, 1, after) for k in range(4))


def returned(rows, after):
    """Returns whether a learner was removed, joined, and all have contributed."""
    later = [row for row in rows if row["now"] > after]
    removed = [row["now"] for row in later if row["members"] == 3]
    joined = [
        r["now"]
        for r in later
        if removed and r["now"] > removed[0] and r["members"] == 4
    ]
    return bool(joined) and all_contributed(rows, joined[0])


def run(tmp_path, **changes):
    settings = {"learners": 4, "steps": STEPS, "quorum": [3, 0.5]}
    return DecoupledProcess(checkpoint=str(tmp_path), **settings | changes)


def check(result):
    assert result["steps"] == STEPS and result["equal"] and not result["different"]
    assert result["loss"] == pytest.approx(undisturbed_loss(), rel=0.02)


def test_killed_and_stopped_learners_do_not_stop_the_others(tmp_path):
    with run(tmp_path) as job:
        job.wait_for(started)
        killed, stopped = job.pids("learner")[:2]
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(3)
        os.kill(stopped, signal.SIGCONT)
        moment = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        job.wait_for(
            lambda rows: all(contributed(rows, k, 1, moment) for k in range(4))
        )
        print("seconds from kill to the next contribution", time.monotonic() - moment)
        check(job.end())


def test_killed_raylet_and_added_nodes(tmp_path):
    """The learners of a node are replaced; a learner that is added contributes."""
    settings = {"learners": [2, 6], "nodes": [2, 2], "steps": 6 * STEPS}
    with run(tmp_path, **settings) as job:
        job.wait_for(lambda rows: sum(contributed(rows, k, 2) for k in range(6)) == 4)
        killed, moment = job.raylets[0], time.monotonic()
        os.kill(killed, signal.SIGKILL)
        job.wait_for(lambda rows: rows[-1]["members"] == 2)
        job.add_node(2)
        job.wait_for(lambda rows: rows[-1]["members"] == 4)
        print("seconds from kill of a raylet to 4 members", time.monotonic() - moment)
        job.add_node(2)
        moment = time.monotonic()
        job.wait_for(
            lambda rows: all(contributed(rows, k, 1, moment) for k in range(6))
        )
        print("seconds from a new node to its contribution", time.monotonic() - moment)
        result = job.end()
    assert result["steps"] == 6 * STEPS
    assert result["equal"] and not result["different"]
    assert result["loss"] == pytest.approx(undisturbed_loss(), rel=0.02)


def test_killed_syncer_continues_without_loss(tmp_path):
    with run(tmp_path, save_every=50) as job:
        job.wait_for(started)
        (syncer,) = job.pids("syncer")
        moment = time.monotonic()
        os.kill(syncer, signal.SIGKILL)
        job.wait_for(
            lambda rows: all(contributed(rows, k, 1, moment) for k in range(4))
        )
        check(job.end())


def test_killed_job_resumes_with_another_number_of_learners(tmp_path):
    with run(tmp_path, save_every=50) as job:
        job.wait_for(started)
        last = job.rows[-1]
    with run(tmp_path, learners=2, save_every=50, quorum=[3, 0.5]) as job:
        job.wait_for(lambda rows: any(row["merge"] > last["merge"] for row in rows))
        result = job.end()
    assert result["reissued"] <= 4
    check(result)
    merges = [row["merge"] for row in job.rows]
    assert merges == list(range(1, len(merges) + 1))


@pytest.mark.parametrize(
    "changes", [{"fragments": 2, "bits": 4}, {"overlap": 2, "bits": 8}]
)
def test_fragments_overlap_and_codecs_run_on_ray(tmp_path, changes):
    with run(tmp_path, **changes) as job:
        result = job.end()
    assert result["equal"] and not result["different"]
    assert result["steps"] == STEPS // changes.get("fragments", 1)


def test_two_processes_with_two_devices_each_are_one_learner(tmp_path):
    settings = {"learners": 2, "processes": 2, "quorum": [1, 0.5], "steps": STEPS // 4}
    with run(tmp_path, **settings) as job:
        job.wait_for(lambda rows: all(contributed(rows, k, 2) for k in range(2)))
        assert len(job.pids("learner")) == 4
        moment = time.monotonic()
        os.kill(job.pids("learner")[-1], signal.SIGKILL)
        job.wait_for(lambda rows: rows[-1]["members"] == 1)
        job.wait_for(
            lambda rows: all(contributed(rows, k, 1, moment) for k in range(2))
        )
        result = job.end()
    assert result["steps"] == STEPS // 4 and result["equal"]
    assert result["loss"] == pytest.approx(undisturbed_loss(), rel=0.02)


def throughput(rows, slow, pause):
    """Returns the throughput over the sum of the speeds of the learners."""
    first = next(i for i, _ in enumerate(rows) if started(rows[: i + 1]))
    steps = rows[-1]["steps"] - rows[first]["steps"]
    seconds = rows[-1]["seconds"] - rows[first]["seconds"]
    return steps / seconds * pause / (3 + 1 / slow)


def test_slow_learner_does_not_slow_down_the_others():
    """Steps sleep, so that their time does not depend on the load of the machine."""
    found, pause, slow = {}, 0.25, 4
    for name, quorum, steps in (("decoupled", 3, 800), ("lockstep", 4, 160)):
        settings = {"quorum": [quorum, 0.0], "pause": pause, "slow": {"3": slow}}
        with DecoupledProcess(learners=4, steps=steps, **settings) as job:
            job.end()
        found[name] = throughput(job.rows, slow, pause)
    print("throughput over the ideal", found)
    assert found["decoupled"] > 0.8 > 0.4 > found["lockstep"]


def test_missing_resources_raise_one_line():
    job = DecoupledProcess(learners=2, steps=8, resources={"GPU": 1.0})
    with job:
        job.process.wait(240)
    message = "run(resources): 2 learners need 2 GPU, the cluster has 0"
    assert message in "".join(job.output)


def test_learner_that_fails_again_and_again_raises():
    with DecoupledProcess(learners=2, steps=8, pause=-1.0, restarts=1) as job:
        job.process.wait(240)
    text = "".join(job.output)
    assert "2 are needed, 1 remain" in text and "sleep length" in text
