"""`localsgd audit`: on local devices, and for TPU and GPU compile targets."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from click.testing import CliRunner
from harness.paths import PROGRAMS, PYTHONPATH
from harness.selection import in_full
from programs import audit_targets

from localsgd_jax.analysis import compile_targets, entry_point, program_audit
from localsgd_jax.cli.main import cli

TARGETS = {"tpu": "tpu:v5e:2x4", "gpu": "gpu:h100:8"}


def audit(*args):
    return CliRunner().invoke(cli, ["audit", *args])


def audit_report(name, kind="step", **sizes):
    mesh = compile_targets.target_mesh(None, sizes or None)
    build = getattr(audit_targets, name)
    return program_audit.audit_program(build, mesh, "worker", kind)


@pytest.mark.parametrize(
    "name, kind", [("local", "step"), ("gated", "gated"), ("fused", "round")]
)
def test_allowed_collectives_pass(name, kind):
    done = audit(f"programs.audit_targets:{name}", "--kind", kind)
    assert done.exit_code == 0, done.output
    assert "\nOK: all collectives along 'worker' are allowed in a " in done.output
    assert done.output.startswith("compiled for 8 x cpu\n")


@pytest.mark.parametrize(
    "name, kind, code",
    [
        ("step_with_collective", "step", "jnp.mean"),
        ("step_with_collective", "gated", "jnp.mean"),
        ("counter", "gated", "cluster.sync_if"),
        ("gated", "step", "psum"),
        ("fused", "gated", "psum"),
        ("loop_with_collective", "round", "cluster.sync(state)"),
    ],
)
def test_forbidden_collective_is_reported_with_source(name, kind, code):
    done = audit(f"programs.audit_targets:{name}", "--kind", kind)
    assert done.exit_code == 1, done.output
    result = done.output.partition("FAILED: ")[2]
    assert "collectives along 'worker' are not allowed in a " in result
    file, line = result.split(" from ")[1].split(" ")[0].split(":")
    assert code in pathlib.Path(file).read_text().splitlines()[int(line) - 1]


def test_bytes_and_axes_of_a_mesh_of_two_axes():
    done = audit(
        "programs.audit_targets:sync", "--kind", "round", "--mesh", "worker=4,model=2"
    )
    assert "each device sends 786432 bytes along 'worker'" in done.output
    result = audit_report("sync", "round", worker=4, model=2)
    assert [(x.axes, x.bytes) for x in result.collectives] == [
        (("worker",), 256 * 512 * 4)
    ]


def test_json_report():
    done = audit("programs.audit_targets:gated", "--kind", "gated", "--json")
    result = json.loads(done.output)
    assert (result["ok"], result["kind"], result["axis"]) == (True, "gated", "worker")
    (op,) = result["collectives"]
    assert op["name"] == "all-reduce" and op["control_flow"][0]["count"] == 2
    assert op["overlapped_ops"] is None and not op["violation"]


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["programs.audit_targets"],
            "a name like module:function is needed, got 'programs.audit_targets'",
        ),
        (["nowhere:step"], "there is no module 'nowhere'"),
        (
            ["programs.audit_targets:nowhere"],
            "programs.audit_targets has no function 'nowhere'",
        ),
        (
            ["programs.audit_targets:nothing"],
            "must return (function, *arguments), got None",
        ),
        (
            ["programs.audit_targets:local", "--axis", "data"],
            "an axis of size at least 2 is needed, got the mesh",
        ),
        (
            ["programs.audit_targets:local", "--mesh", "worker=1"],
            "an axis of size at least 2 is needed, got the mesh",
        ),
        (
            ["programs.audit_targets:local", "--mesh", "worker"],
            "must look like worker=4,model=2",
        ),
        (
            ["programs.audit_targets:local", "--mesh", "worker=16"],
            "has 16 positions for 8 devices",
        ),
        (
            ["programs.audit_targets:local", "--target", "v5e"],
            "must look like tpu:v5e:2x4",
        ),
        (
            ["programs.audit_targets:local", "--target", "gpu:h1:8"],
            "the kind must be one of h100, got",
        ),
    ],
)
def test_invalid_options_raise(args, message):
    done = audit(*args)
    assert done.exit_code == 1
    assert done.output.startswith("Error: ") and message in done.output
    assert len(done.output.splitlines()) == 1


def test_missing_compiler_names_its_extra(monkeypatch):
    monkeypatch.setattr(compile_targets, "is_compiler_installed", lambda family: False)
    done = audit("programs.audit_targets:local", "--target", "tpu:v5e:2x4")
    assert 'pip install "localsgd-jax[audit-tpu]"' in done.output


def test_import_error_of_a_user_module_is_raised(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_there")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        entry_point.import_function("needs_more:step")


# Compile targets.


def skip_without_compiler(family):
    if not compile_targets.is_compiler_installed(family):
        pytest.skip(compile_targets.install_command(family))


def audit_for_target(family, name, *args):
    """Audits in a child process, since the compiler must load before JAX starts."""
    skip_without_compiler(family)
    command = [
        sys.executable,
        "-m",
        "localsgd_jax",
        "audit",
        f"programs.audit_targets:{name}",
    ]
    done = subprocess.run(
        [*command, "--json", "--target", TARGETS[family], *args],
        cwd=PROGRAMS,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


# They need an extra, and the default selection skips nothing for lack of a package.
families = pytest.mark.parametrize("family", [in_full(family) for family in TARGETS])


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
def test_library_programs_on_a_target(family, name, kind):
    status, result = audit_for_target(family, name, "--kind", kind)
    assert (status, result["ok"]) == (0, True)
    kinds = [op["name"] for op in result["collectives"]]
    assert kinds == ([] if name == "local" else ["all-reduce"])
    for op in result["collectives"]:
        assert op["axes"] == ["worker"] and op["bytes"] == 256 * 512 * 4


@families
@pytest.mark.parametrize(
    "name, kinds, dtypes",
    [
        ("gated_diloco", {"all-reduce"}, {"f32"}),
        ("gated_quantized", {"all-to-all", "all-gather"}, {"u8", "f32"}),
        ("gated_gossip", {"collective-permute"}, {"f32"}),
    ],
)
def test_rules_on_a_target(family, name, kinds, dtypes):
    status, result = audit_for_target(family, name, "--kind", "gated")
    assert (status, result["ok"]) == (0, True)
    assert {op["name"] for op in result["collectives"]} == kinds
    assert {kind for op in result["collectives"] for kind in op["dtypes"]} == dtypes


@pytest.mark.parametrize(
    "family, name, hidden",
    [
        in_full("gpu", "overlap", "all-reduce"),
        in_full("gpu", "overlap_in_shards", "all-gather"),
        in_full("tpu", "overlap_in_shards", "all-gather"),
    ],
)
def test_sync_overlaps_with_the_next_round(family, name, hidden):
    status, result = audit_for_target(family, name, "--kind", "round")
    assert status == 0
    overlapped = {
        opcode
        for op in result["collectives"]
        if op["name"] == hidden
        for opcode in op["overlapped_ops"] or ()
    }
    assert "while" in overlapped


@families
def test_forbidden_collective_on_a_target(family):
    status, result = audit_for_target(family, "step_with_collective")
    assert (status, result["ok"]) == (1, False)
    (op,) = result["collectives"]
    assert op["source"].startswith("audit_targets.py:")


@families
def test_all_reduce_overlaps_with_local_steps(family):
    """GPUs compute during the all-reduce; on TPUs it is synchronous."""
    status, result = audit_for_target(family, "overlapped", "--kind", "round")
    (op,) = result["collectives"]
    assert status == 0
    assert op["overlapped_ops"] == (["while"] if family == "gpu" else None)


@families
def test_arrays_on_a_compile_target_raise(family):
    skip_without_compiler(family)
    done = audit("programs.audit_targets:arrays", "--target", TARGETS[family])
    assert "compile targets cannot hold arrays" in done.output


@pytest.mark.parametrize("program", [None, (), (1, 2), "ab", {0: abs}])
def test_programs_without_a_function_raise(program):
    mesh = compile_targets.target_mesh(None, {"worker": 2})
    with pytest.raises(TypeError, match=r"must return \(function, \*arguments\), got"):
        program_audit.audit_program(lambda mesh: program, mesh, "worker", "step")
