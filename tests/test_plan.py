"""`localsgd plan`: from numbers, from a measurement, and with the theory's cap."""

import json

import audited
import jax
import numpy as np
import pytest
from click.testing import CliRunner

import localsgd_jax as lsgd
from localsgd_jax import cost, theory
from localsgd_jax.audit import targets
from localsgd_jax.cli import cli
from localsgd_jax.ledger import ledger
from localsgd_jax.plan import cap, measure, report

LINK = cost.Link(latency=0.001, bandwidth=1e8)
JOB = ["--compute", "0.2", "--parameters", "124000000"]


@pytest.fixture(autouse=True, scope="module")
def eight_devices():
    """JAX has started before a command asks it to start with fewer devices."""
    jax.devices()


def plan(*args):
    return CliRunner().invoke(cli, ["plan", *args])


def as_json(*args):
    done = plan(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_a_line_for_each_link():
    lines = plan(*JOB).output.splitlines()
    assert lines[0] == (
        "8 workers, 200 ms a local step, 496 MB a round; H for at most 10% of waiting"
    )
    assert [line.split()[0] for line in lines[2:]] == [*cost.LINKS]
    # 2 · 7 · 100 µs and 2 · 7/8 · 496 MB at 125 MB/s.
    assert lines[5].split()[:4] == ["1-gbit", "6.95", "s", "313"]


def test_a_link_of_ones_own_and_what_the_model_says_of_it():
    found = as_json(*JOB, "--latency", "0.01", "--bandwidth", "1e7", "--workers", "4")
    job = cost.Job(workers=4, compute=0.2, parameters=124_000_000)
    link = cost.Link(0.01, 1e7)
    assert cost.Job(**found["job"]) == job
    row = found["links"][0]
    assert row["link"] == "yours"
    assert row["period"] == cost.period_for_share(job, link, 0.1)
    assert row["seconds_per_step"]["64"] == cost.round_time(job, link, 64) / 64


def test_fragments_and_overlap():
    done = plan(*JOB, "--fragments", "4", "--overlap", "5", "--bits", "4")
    assert "62 MB a round, 4 fragments, overlap 5 steps" in done.output
    assert "H=1 " not in done.output and "step at H=16" in done.output


def test_the_theory_caps_the_period():
    constants = ["--constants", "0.01", "1", "1", "1"]
    done = plan(*JOB, *constants, "--steps", "1000000")
    assert "constants given: mu = 0.01, L = 1, sigma2 = 1, G2 = 1: drift" in done.output
    assert "* drift asks for no longer period" in done.output
    found = as_json(*JOB, *constants, "--steps", "1000000")
    assert found["longest"] == theory.longest_period(
        theory.Constants(0.01, 1, 1, 1),
        theory.Run(workers=8, period=1, steps=1_000_000),
        theory.shift(0.01, 1, period=1),
    )
    for row in found["links"]:
        assert row["period"] <= found["longest"]


def test_the_figure(tmp_path):
    path = tmp_path / "plan.png"
    assert plan(*JOB, "--figure", str(path)).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--compute and --parameters are needed, or --measure"),
        ([*JOB, "--latency", "1"], "--latency and --bandwidth go together"),
        ([*JOB, "--steps", "10"], "--steps needs --constants, or --measure"),
        ([*JOB, "--constants", "1", "1", "1", "1"], "--mu need --steps"),
        ([*JOB, "--mu", "1", "--steps", "9"], "--mu goes with --measure, and not"),
        (["--measure", "audited:local"], "must return (cluster, state, batch)"),
        ([*JOB, "--constants", "2", "1", "1", "1", "--steps", "9"], "mu must be at"),
    ],
)
def test_what_is_refused(args, message):
    done = plan(*args)
    assert done.exit_code == 1 and message in done.output
    assert len(done.output.splitlines()) == 1


@pytest.fixture
def quick(monkeypatch):
    """Short steps; the times of a link that is known."""
    monkeypatch.setattr(measure, "SHORTEST", 1e-4)
    monkeypatch.setattr(
        measure,
        "all_reduce_seconds",
        lambda mesh, axis, size, repeats: cost.all_reduce_time(LINK, mesh.size, size),
    )


def test_a_measured_job(quick):
    found = as_json("--measure", "audited:measured", "--workers", "4")
    job = found["job"]
    assert (job["workers"], job["parameters"], job["bits"]) == (4, 256 * 512, 32)
    assert job["compute"] > 0
    here = found["links"][0]
    assert here["link"] == "here"
    assert here["latency"] == pytest.approx(LINK.latency)
    assert here["bandwidth"] == pytest.approx(LINK.bandwidth)


def test_measured_constants_cap_the_period(quick):
    args = ["--measure", "audited:logistic", "--workers", "4", "--steps", "1000000"]
    found = as_json(*args)
    *_, (features, labels) = audited.logistic(targets.mesh(None, {"worker": 4}))
    curvature = theory.logistic_curvature(features, audited.PENALTY)
    measured = dict(found["constants"])
    assert measured.pop("measured")
    constants = theory.Constants(**measured)
    # The run begins at 0: there are the largest curvature and gradients, aᵢ/2.
    assert constants.smoothness == pytest.approx(curvature[1], rel=1e-3)
    assert curvature[0] < constants.mu < constants.smoothness
    gradients = features * labels[:, None] / 2
    assert constants.second_moment == pytest.approx(
        np.mean(np.sum(gradients**2, 1)), rel=1e-3
    )
    noise = np.sum((gradients - gradients.mean(0)) ** 2, 1)
    assert constants.variance == pytest.approx(np.mean(noise), rel=1e-3)
    # Two lanes on each of four devices, and the examples of a batch.
    run = theory.Run(workers=8, period=1, steps=1_000_000, batch=5)
    a = theory.shift(constants.mu, constants.smoothness, period=1)
    assert found["longest"] == theory.longest_period(constants, run, a) > 1


@pytest.mark.parametrize("variance, steps", [(1.0, 10**6), (1.0, 10**9), (1e4, 50)])
def test_the_cap_is_the_longest_period_that_its_own_shift_allows(variance, steps):
    constants = theory.Constants(1.0, 1.0, variance, 1.0)
    run = theory.Run(workers=4, period=1, steps=steps)

    def allowed(period):
        shift = theory.shift(1.0, 1.0, period)
        return theory.longest_period(constants, run, shift)

    longest = cap.cap(constants, False, run).longest
    assert longest == allowed(longest)
    # Every longer one, at small distances and large, is longer than allowed.
    longer = {longest + i for i in range(1, 50)} | {longest * 2**i for i in range(1, 9)}
    assert all(allowed(x) < x for x in longer if x <= steps)


def test_a_curvature_that_is_known(quick):
    args = ["--measure", "audited:logistic_of_the_batch", "--steps", "1000000"]
    done = plan(*args, "--workers", "2", "--mu", "0.05")
    assert "constants measured: mu = 0.05, L = " in done.output
    assert "drift asks for H of at most " in done.output
    known = as_json(*args, "--workers", "2", "--mu", "0.05", "--batch", "1")
    assert known["constants"]["mu"] == 0.05
    # Examples of the batch alone: of 20, in place of 400.
    whole = as_json("--measure", "audited:logistic", "--steps", "9", "--workers", "2")
    assert known["constants"]["smoothness"] != pytest.approx(
        whole["constants"]["smoothness"], rel=1e-3
    )


def test_the_run_that_is_measured_goes_on():
    """Constants are the extremes of several points of a run, not of its start alone."""
    made = audited.logistic(targets.mesh(None, {"worker": 2}))
    path = [*cap.path_of(*made[:3])]
    assert len(path) == cap.POINTS
    state = made[1]
    for _ in range(cap.STRIDE):
        state, _ = made[0].step(state, made[2])
    np.testing.assert_allclose(path[1], lsgd.consensus(state), rtol=1e-5)
    least, most = theory.curvature(made[3], made[4], path)
    found = cap.measure_constants(*made)
    assert (found.mu, found.smoothness) == (least, most)
    assert least < theory.curvature(made[3], made[4], path[:1])[0]


def test_a_loss_that_the_theory_does_not_know(quick):
    args = ["--measure", "audited:saddle", "--workers", "2", "--steps", "1000"]
    (line,) = [x for x in plan(*args).output.splitlines() if "constants" in x]
    assert line.startswith("constants measured: mu = -6, L = 2, ")
    assert line.endswith(
        "not strongly convex there, so there is no cap (--mu gives a known mu)"
    )
    found = as_json(*args)
    assert found["longest"] is None and not any(x["capped"] for x in found["links"])


def test_constants_without_a_loss(quick):
    done = plan("--measure", "audited:measured", "--workers", "2", "--steps", "10")
    assert done.exit_code == 1 and "(cluster, state, batch, loss)" in done.output


def test_what_a_round_is_made_of(monkeypatch):
    """Steps that say nothing, and besides them all that a round of one step takes."""
    devices, programs = targets.mesh(None, {"worker": 4}), {}

    def known(function, state, batches, *first):
        talk = ledger(function, state, batches, *first, mesh=devices)
        programs[function.__name__] = talk
        (length,) = {x.shape[0] for x in jax.tree.leaves(batches)}

        def seconds(times, turns=1):
            steps = turns * length
            return times * (0.002 + steps * 0.01 + len(talk) * 0.03)

        return seconds

    monkeypatch.setattr(measure, "_going_on", known)
    found = measure.round_seconds(*audited.measured(devices))
    assert found == pytest.approx((0.01, 0.032))
    assert programs["steps"] == ()
    (entry,) = programs["one_round"]
    assert entry.axes == ("worker",) and not entry.looped and not entry.conditional


@pytest.mark.parametrize("rest, more", [(0.5, 0.3), (0.1, 0.0)])
def test_what_the_link_does_not_explain_is_overhead(monkeypatch, rest, more):
    devices = targets.mesh(None, {"worker": 4})
    made = audited.measured(devices)
    size = 4 * 256 * 512
    link = cost.Link(0.0, 1.5 * size / 0.2)  # with which its model takes 0.2 s
    monkeypatch.setattr(measure, "round_seconds", lambda *given: (0.01, rest))
    monkeypatch.setattr(
        measure,
        "all_reduce_seconds",
        lambda mesh, axis, size, repeats: cost.all_reduce_time(link, 4, size),
    )
    job, fitted, *_ = measure.measure(*made, devices)
    assert job.overhead == pytest.approx(more)
    assert cost.round_time(job, fitted, 16) == pytest.approx(0.16 + max(rest, 0.2))


def test_all_reduces_are_timed(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST", 1e-4)
    devices = targets.mesh(None, {"worker": 4})
    assert measure.all_reduce_seconds(devices, "worker", 4000) > 0


def test_what_is_known_better_than_measured(quick):
    args = ["--measure", "audited:measured", "--workers", "2", "--bits", "8"]
    found = as_json(*args, "--compute", "0.5", "--fragments", "2")["job"]
    assert (found["bits"], found["compute"], found["fragments"]) == (8, 0.5, 2)


def test_the_timed_all_reduce_is_one():
    """What is timed as an all-reduce of so many bytes compiles to that."""
    devices = targets.mesh(None, {"worker": 4})
    found = measure.all_reduce_entries(devices, "worker", 4000)
    assert [(entry.name, entry.bytes, entry.axes) for entry in found] == [
        ("all-reduce", 4000, ("worker",))
    ]
    assert found[0].looped


def test_one_place_is_no_link():
    devices = targets.mesh(None, {"worker": 1})
    with pytest.raises(ValueError, match="no two places along 'worker'"):
        measure.measure(None, None, None, devices)


def test_durations():
    seconds = (2.5, 0.25, 2.5e-6)
    assert [report.duration(x) for x in seconds] == ["2.5 s", "250 ms", "2.5 µs"]
