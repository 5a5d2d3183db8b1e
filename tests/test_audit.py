"""`localsgd audit`: on the devices present, and for TPUs and GPUs that are not."""

import json
import os
import pathlib
import subprocess
import sys

import audited
import pytest
from click.testing import CliRunner

from localsgd_jax.audit import inspection, targets
from localsgd_jax.cli import cli

HERE = pathlib.Path(__file__).parent
TARGETS = {"tpu": "tpu:v5e:2x4", "gpu": "gpu:h100:8"}


def audit(*args):
    return CliRunner().invoke(cli, ["audit", *args])


def report(name, kind="step", **sizes):
    devices = targets.mesh(None, sizes or None)
    return inspection.inspect(getattr(audited, name), devices, "worker", kind)


@pytest.mark.parametrize(
    "name, kind", [("local", "step"), ("gated", "gated"), ("fused", "round")]
)
def test_what_may_talk_and_does_so(name, kind):
    done = audit(f"audited:{name}", "--as", kind)
    assert done.exit_code == 0, done.output
    assert "\nsilent: nothing talks along worker" in done.output
    assert done.output.startswith("compiled for 8 x cpu\n")


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("noisy", "step", "jnp.mean"),
        ("noisy", "gated", "jnp.mean"),
        ("counter", "gated", "cluster.sync_if"),
        ("gated", "step", "psum"),
        ("fused", "gated", "psum"),
        ("noisy_loop", "round", "cluster.sync(state)"),
    ],
)
def test_a_noisy_program_fails_and_names_its_line(name, kind, words):
    done = audit(f"audited:{name}", "--as", kind)
    assert done.exit_code == 1, done.output
    verdict = done.output.partition("NOISY: ")[2]
    file, line = verdict.split(" from ")[1].split(" ")[0].split(":")
    assert words in pathlib.Path(file).read_text().splitlines()[int(line) - 1]


def test_bytes_and_axes_of_a_mesh_of_two():
    done = audit("audited:sync", "--as", "round", "--mesh", "worker=4,model=2")
    assert "each device sends 786432 bytes along worker" in done.output
    found = report("sync", "round", worker=4, model=2)
    assert [(x.axes, x.bytes) for x in found.entries] == [(("worker",), 256 * 512 * 4)]


def test_the_report_as_json():
    done = audit("audited:gated", "--as", "gated", "--json")
    found = json.loads(done.output)
    assert (found["silent"], found["as"], found["axis"]) == (True, "gated", "worker")
    (entry,) = found["collectives"]
    assert entry["name"] == "all-reduce" and entry["path"][0]["count"] == 2
    assert entry["beside"] is None and not entry["noisy"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["audited"], "a name like module:function is needed, got 'audited'"),
        (["nowhere:step"], "there is no module 'nowhere'"),
        (["audited:nowhere"], "audited has no function 'nowhere'"),
        (["audited:nothing"], "must return (function, *arguments), got None"),
        (["audited:local", "--axis", "data"], "no two places along it"),
        (["audited:local", "--mesh", "worker=1"], "no two places along it"),
        (["audited:local", "--mesh", "worker"], "must look like worker=4,model=2"),
        (["audited:local", "--mesh", "worker=16"], "has 16 places for 8 devices"),
        (["audited:local", "--target", "v5e"], "must look like tpu:v5e:2x4"),
        (["audited:local", "--target", "gpu:h1:8"], "the GPUs known are h100, got"),
    ],
)
def test_what_is_refused(args, message):
    done = audit(*args)
    assert done.exit_code == 1
    assert done.output.startswith("Error: ") and message in done.output
    assert len(done.output.splitlines()) == 1


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(targets, "installed", lambda family: False)
    done = audit("audited:local", "--target", "tpu:v5e:2x4")
    assert 'pip install "localsgd-jax[audit-tpu]"' in done.output


def test_a_module_that_lacks_another_says_so(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_there")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        inspection.load("needs_more:step")


# Devices that are not here.


def compiled_for(family, name, *args):
    """Audits in a process of its own: the vendor's compiler must start first."""
    if not targets.installed(family):
        pytest.skip(f"the extra audit-{family} is not installed")
    command = [sys.executable, "-m", "localsgd_jax", "audit", f"audited:{name}"]
    done = subprocess.run(
        [*command, "--json", "--target", TARGETS[family], *args],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


families = pytest.mark.parametrize("family", TARGETS)


@families
@pytest.mark.parametrize(
    "name, kind",
    [
        ("local", "step"),
        ("gated", "gated"),
        ("fused", "round"),
        ("gated_when", "gated"),
        ("fused_when", "round"),
    ],
)
def test_the_librarys_programs_on_a_target(family, name, kind):
    status, found = compiled_for(family, name, "--as", kind)
    assert (status, found["silent"]) == (0, True)
    kinds = [entry["name"] for entry in found["collectives"]]
    assert kinds == ([] if name == "local" else ["all-reduce"])
    for entry in found["collectives"]:
        assert entry["axes"] == ["worker"] and entry["bytes"] == 256 * 512 * 4


@families
@pytest.mark.parametrize(
    "name, kinds, dtypes",
    [
        ("gated_diloco", {"all-reduce"}, {"f32"}),
        ("gated_quantized", {"all-to-all", "all-gather"}, {"u8"}),
        ("gated_gossip", {"collective-permute"}, {"f32"}),
    ],
)
def test_rules_on_a_target(family, name, kinds, dtypes):
    status, found = compiled_for(family, name, "--as", "gated")
    assert (status, found["silent"]) == (0, True)
    assert {entry["name"] for entry in found["collectives"]} == kinds
    assert {
        kind for entry in found["collectives"] for kind in entry["dtypes"]
    } == dtypes


@pytest.mark.parametrize(
    "family, name, hidden",
    [
        ("gpu", "overlap", "all-reduce"),
        ("gpu", "overlap_in_shards", "all-gather"),
        ("tpu", "overlap_in_shards", "all-gather"),
    ],
)
def test_a_round_is_exchanged_during_the_next(family, name, hidden):
    status, found = compiled_for(family, name, "--as", "round")
    assert status == 0
    beside = {
        work
        for entry in found["collectives"]
        if entry["name"] == hidden
        for work in entry["beside"] or ()
    }
    assert "while" in beside


@families
def test_a_noisy_step_on_a_target(family):
    status, found = compiled_for(family, "noisy")
    assert (status, found["silent"]) == (1, False)
    (entry,) = found["collectives"]
    assert entry["source"].startswith("audited.py:")


@families
def test_what_runs_beside_an_all_reduce(family):
    """GPUs compute during it; TPUs wait."""
    status, found = compiled_for(family, "overlapped", "--as", "round")
    (entry,) = found["collectives"]
    assert status == 0
    assert entry["beside"] == (["while"] if family == "gpu" else None)


@families
def test_arrays_for_devices_that_are_not_here(family):
    if not targets.installed(family):
        pytest.skip(f"the extra audit-{family} is not installed")
    done = audit("audited:arrays", "--target", TARGETS[family])
    assert "a target holds no arrays" in done.output
