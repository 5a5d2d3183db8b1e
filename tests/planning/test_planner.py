"""`localsgd plan`: from options, from a measurement, and with a theoretical bound."""

import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from programs import audit_targets

import localsgd_jax as lsgd
from localsgd_jax import theory
from localsgd_jax.analysis import collective_ops, compile_targets
from localsgd_jax.cli.main import cli
from localsgd_jax.planning import cost_model, measurement, period_bound, report

LINK = cost_model.Link(latency=0.001, bandwidth=1e8)
WORKLOAD = ["--step-seconds", "0.2", "--parameters", "124000000"]


@pytest.fixture(autouse=True, scope="module")
def eight_devices():
    """Initialises JAX before a command can set a smaller number of devices."""
    jax.devices()


def plan(*args):
    return CliRunner().invoke(cli, ["plan", *args])


def as_json(*args):
    done = plan(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_one_line_per_link():
    lines = plan(*WORKLOAD).output.splitlines()
    assert lines[0] == (
        "8 workers, 200 ms per local step, 496 MB per round; "
        "H for at most 10% exposed communication"
    )
    assert [line.split()[0] for line in lines[2:]] == [*cost_model.LINKS]
    # 2 · 7 · 100 µs and 2 · 7/8 · 496 MB at 125 MB/s.
    assert lines[5].split()[:4] == ["1-gbit", "6.95", "s", "313"]


def test_custom_link():
    result = as_json(
        *WORKLOAD, "--latency", "0.01", "--bandwidth", "1e7", "--workers", "4"
    )
    workload = cost_model.Workload(workers=4, step_seconds=0.2, parameters=124_000_000)
    link = cost_model.Link(0.01, 1e7)
    assert cost_model.Workload(**result["workload"]) == workload
    row = result["links"][0]
    assert row["link"] == "yours"
    assert row["period"] == cost_model.period_for_communication_fraction(
        workload, link, 0.1
    )
    assert (
        row["seconds_per_step"]["64"] == cost_model.round_time(workload, link, 64) / 64
    )


def test_fragments_and_overlap():
    done = plan(*WORKLOAD, "--fragments", "4", "--overlap-steps", "5", "--bits", "4")
    assert "62 MB per round, 4 fragments, overlap 5 steps" in done.output
    assert "H=1 " not in done.output and "step at H=16" in done.output


def test_theory_limits_the_period():
    constants = ["--constants", "0.01", "1", "1", "1"]
    done = plan(*WORKLOAD, *constants, "--steps", "1000000")
    assert "constants given: mu = 0.01, L = 1, sigma2 = 1, G2 = 1: theor" in done.output
    assert "* limited by the theoretical bound" in done.output
    result = as_json(*WORKLOAD, *constants, "--steps", "1000000")
    assert result["max_period"] == theory.longest_period(
        theory.Constants(0.01, 1, 1, 1),
        theory.RunParameters(workers=8, period=1, steps=1_000_000),
        theory.shift(0.01, 1, period=1),
    )
    for row in result["links"]:
        assert row["period"] <= result["max_period"]


def test_figure(tmp_path):
    path = tmp_path / "plan.png"
    assert plan(*WORKLOAD, "--figure", str(path)).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--step-seconds and --parameters are needed, or --measure"),
        (
            [*WORKLOAD, "--latency", "1"],
            "--latency and --bandwidth must be given together",
        ),
        ([*WORKLOAD, "--steps", "10"], "--steps needs --constants or --measure"),
        ([*WORKLOAD, "--constants", "1", "1", "1", "1"], "--mu need --steps"),
        (
            [*WORKLOAD, "--mu", "1", "--steps", "9"],
            "--mu needs --measure and excludes --constants",
        ),
        (
            ["--measure", "programs.audit_targets:local"],
            "must return (cluster, state, batch)",
        ),
        (
            [*WORKLOAD, "--constants", "2", "1", "1", "1", "--steps", "9"],
            "mu must be at",
        ),
    ],
)
def test_invalid_options_raise(args, message):
    done = plan(*args)
    assert done.exit_code == 1 and message in done.output
    assert len(done.output.splitlines()) == 1


@pytest.fixture
def quick(monkeypatch):
    """Short timing intervals, and all-reduce times of a known link."""
    monkeypatch.setattr(measurement, "MIN_SECONDS", 1e-4)
    monkeypatch.setattr(
        measurement,
        "all_reduce_seconds",
        lambda mesh, axis, size, repeats: cost_model.all_reduce_time(
            LINK, mesh.size, size
        ),
    )


def test_measured_workload(quick):
    result = as_json("--measure", "programs.audit_targets:measured", "--workers", "4")
    workload = result["workload"]
    assert (workload["workers"], workload["parameters"], workload["bits"]) == (
        4,
        256 * 512,
        32,
    )
    assert workload["step_seconds"] > 0
    link = result["links"][0]
    assert link["link"] == "measured"
    assert link["latency"] == pytest.approx(LINK.latency)
    assert link["bandwidth"] == pytest.approx(LINK.bandwidth)


@pytest.mark.full
def test_measured_constants_limit_the_period(quick):
    args = [
        "--measure",
        "programs.audit_targets:logistic",
        "--workers",
        "4",
        "--steps",
        "1000000",
    ]
    result = as_json(*args)
    *_, (features, labels) = audit_targets.logistic(
        compile_targets.target_mesh(None, {"worker": 4})
    )
    curvature = theory.logistic_curvature(features, audit_targets.PENALTY)
    measured = dict(result["constants"])
    assert measured.pop("measured")
    constants = theory.Constants(**measured)
    # The curvature and the gradients aᵢ/2 are largest at 0, where the run starts.
    assert constants.smoothness == pytest.approx(curvature[1], rel=1e-3)
    assert curvature[0] < constants.mu < constants.smoothness
    gradients = features * labels[:, None] / 2
    assert constants.second_moment == pytest.approx(
        np.mean(np.sum(gradients**2, 1)), rel=1e-3
    )
    noise = np.sum((gradients - gradients.mean(0)) ** 2, 1)
    assert constants.variance == pytest.approx(np.mean(noise), rel=1e-3)
    # Two workers on each of four devices, and the batch of the function.
    run = theory.RunParameters(workers=8, period=1, steps=1_000_000, batch=5)
    a = theory.shift(constants.mu, constants.smoothness, period=1)
    assert result["max_period"] == theory.longest_period(constants, run, a) > 1


@pytest.mark.parametrize("variance, steps", [(1.0, 10**6), (1.0, 10**9), (1e4, 50)])
def test_bound_is_the_largest_period_that_its_shift_allows(variance, steps):
    constants = theory.Constants(1.0, 1.0, variance, 1.0)
    run = theory.RunParameters(workers=4, period=1, steps=steps)

    def allowed(period):
        shift = theory.shift(1.0, 1.0, period)
        return theory.longest_period(constants, run, shift)

    longest = period_bound.theoretical_period_bound(constants, False, run).max_period
    assert longest == allowed(longest)
    # Longer periods, at small and large distances, exceed their own bound.
    longer = {longest + i for i in range(1, 50)} | {longest * 2**i for i in range(1, 9)}
    assert all(allowed(x) < x for x in longer if x <= steps)


@pytest.mark.full
def test_known_mu(quick):
    args = [
        "--measure",
        "programs.audit_targets:logistic_of_the_batch",
        "--steps",
        "1000000",
    ]
    done = plan(*args, "--workers", "2", "--mu", "0.05")
    assert "constants measured: mu = 0.05, L = " in done.output
    assert "theoretical bound H <= " in done.output
    known = as_json(*args, "--workers", "2", "--mu", "0.05", "--batch", "1")
    assert known["constants"]["mu"] == 0.05
    # The 20 examples of the batch instead of all 400.
    all_examples = as_json(
        "--measure", "programs.audit_targets:logistic", "--steps", "9", "--workers", "2"
    )
    assert known["constants"]["smoothness"] != pytest.approx(
        all_examples["constants"]["smoothness"], rel=1e-3
    )


def test_constants_are_extremes_over_the_trajectory():
    """Several points of a run are used, not only its initial parameters."""
    program = audit_targets.logistic(compile_targets.target_mesh(None, {"worker": 2}))
    points = [*period_bound.sample_trajectory(*program[:3])]
    assert len(points) == period_bound.TRAJECTORY_POINTS
    state = program[1]
    for _ in range(period_bound.STEPS_BETWEEN_POINTS):
        state, _ = program[0].step(state, program[2])
    np.testing.assert_allclose(points[1], lsgd.consensus(state), rtol=1e-5)
    least, most = theory.curvature(program[3], program[4], points)
    result = period_bound.measure_constants(*program)
    assert (result.mu, result.smoothness) == (least, most)
    assert least < theory.curvature(program[3], program[4], points[:1])[0]


def test_nonconvex_loss_gives_no_bound(quick):
    args = [
        "--measure",
        "programs.audit_targets:nonconvex",
        "--workers",
        "2",
        "--steps",
        "1000",
    ]
    (line,) = [x for x in plan(*args).output.splitlines() if "constants" in x]
    assert line.startswith("constants measured: mu = -6, L = 2, ")
    assert line.endswith(
        "not strongly convex there, so there is no bound (--mu sets a known mu)"
    )
    result = as_json(*args)
    assert result["max_period"] is None and not any(
        x["limited_by_theory"] for x in result["links"]
    )


def test_steps_without_a_loss_raise(quick):
    done = plan(
        "--measure",
        "programs.audit_targets:measured",
        "--workers",
        "2",
        "--steps",
        "10",
    )
    assert done.exit_code == 1 and "(cluster, state, batch, loss)" in done.output


def test_round_seconds_of_known_times(monkeypatch):
    """Local steps contain no collectives; the rest of a round does."""
    devices, programs = compile_targets.target_mesh(None, {"worker": 4}), {}

    def known_times(function, state, args, *first):
        ops = collective_ops(function, state, *args, *first, mesh=devices)
        programs[function.__name__] = ops
        (length,) = {x.shape[0] for x in jax.tree.leaves(args)}

        def seconds(calls, iterations=1):
            steps = iterations * length
            return calls * (0.002 + steps * 0.01 + len(ops) * 0.03)

        return seconds

    monkeypatch.setattr(measurement, "_timed_loop", known_times)
    result = measurement.round_seconds(*audit_targets.measured(devices))
    assert result == pytest.approx((0.01, 0.032))
    assert programs["local_steps"] == ()
    (op,) = programs["one_round"]
    assert op.axes == ("worker",) and not op.in_loop and not op.in_branch


@pytest.mark.parametrize("rest, overhead", [(0.5, 0.3), (0.1, 0.0)])
def test_overhead_is_the_rest_without_the_link(monkeypatch, rest, overhead):
    devices = compile_targets.target_mesh(None, {"worker": 4})
    program = audit_targets.measured(devices)
    size = 4 * 256 * 512
    link = cost_model.Link(
        0.0, 1.5 * size / 0.2
    )  # An all-reduce of the model takes 0.2 s.
    monkeypatch.setattr(measurement, "round_seconds", lambda *args: (0.01, rest))
    monkeypatch.setattr(
        measurement,
        "all_reduce_seconds",
        lambda mesh, axis, size, repeats: cost_model.all_reduce_time(link, 4, size),
    )
    workload, fitted, *_ = measurement.measure(*program, devices)
    assert workload.overhead_seconds == pytest.approx(overhead)
    assert cost_model.round_time(workload, fitted, 16) == pytest.approx(
        0.16 + max(rest, 0.2)
    )


def test_all_reduce_seconds(monkeypatch):
    monkeypatch.setattr(measurement, "MIN_SECONDS", 1e-4)
    devices = compile_targets.target_mesh(None, {"worker": 4})
    assert measurement.all_reduce_seconds(devices, "worker", 4000) > 0


def test_options_replace_measured_values(quick):
    args = [
        "--measure",
        "programs.audit_targets:measured",
        "--workers",
        "2",
        "--bits",
        "8",
    ]
    result = as_json(*args, "--step-seconds", "0.5", "--fragments", "2")["workload"]
    assert (result["bits"], result["step_seconds"], result["fragments"]) == (8, 0.5, 2)


def test_timed_program_contains_one_all_reduce():
    """The timed program compiles to one all-reduce of this many bytes in a loop."""
    devices = compile_targets.target_mesh(None, {"worker": 4})
    program, operand = measurement._all_reduces(devices, "worker", 4000)
    (op,) = collective_ops(program, operand, 1, mesh=devices)
    assert (op.name, op.bytes, op.axes) == ("all-reduce", 4000, ("worker",))
    assert op.in_loop


def test_single_position_raises():
    devices = compile_targets.target_mesh(None, {"worker": 1})
    with pytest.raises(
        ValueError, match="an axis 'worker' of size at least 2 is needed"
    ):
        measurement.measure(None, None, None, devices)


def test_format_seconds():
    seconds = (2.5, 0.25, 2.5e-6)
    assert [report.format_seconds(x) for x in seconds] == ["2.5 s", "250 ms", "2.5 µs"]


def test_link_is_measured_again_while_noise_hides_it(monkeypatch):
    repeats = []

    def hidden_at_first(mesh, axis, size, repeat):
        repeats.append(repeat)
        return 1e-3 if repeat < 4 else cost_model.all_reduce_time(LINK, 4, size)

    monkeypatch.setattr(measurement, "all_reduce_seconds", hidden_at_first)
    devices = jax.make_mesh((4,), ("worker",), devices=jax.devices()[:4])
    link, seconds = measurement._fit_measured_link(devices, "worker", (1000, 10**6), 1)
    assert link.bandwidth == pytest.approx(LINK.bandwidth)
    assert seconds[1] == cost_model.all_reduce_time(LINK, 4, 10**6)
    assert repeats == [1, 1, 4, 4]


def test_link_hidden_by_noise_raises(monkeypatch):
    monkeypatch.setattr(measurement, "all_reduce_seconds", lambda *given: 1 / given[2])
    devices = jax.make_mesh((4,), ("worker",), devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="the times must increase with the sizes"):
        measurement._fit_measured_link(devices, "worker", (1000, 10**6), 1)
