"""`localsgd plan`: from numbers, from a measurement, and with the theory's cap."""

import json

import pytest
from click.testing import CliRunner

from localsgd_jax import cost, theory
from localsgd_jax.audit import targets
from localsgd_jax.cli import cli
from localsgd_jax.plan import measure, report

LINK = cost.Link(latency=0.001, bandwidth=1e8)
JOB = ["--compute", "0.2", "--parameters", "124000000"]


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
    assert "* drift asks for no longer period" in done.output
    found = as_json(*JOB, *constants, "--steps", "1000000")
    slowest = max(
        cost.period_for_share(cost.Job(8, 0.2, 124_000_000), link, 0.1)
        for link in cost.LINKS.values()
    )
    assert found["longest"] == theory.longest_period(
        theory.Constants(0.01, 1, 1, 1),
        theory.Run(workers=8, period=1, steps=1_000_000),
        theory.shift(0.01, 1, slowest),
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
        ([*JOB, "--steps", "10"], "--constants and --steps go together"),
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
        lambda mesh, axis, size: cost.all_reduce_time(LINK, mesh.size, size),
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
