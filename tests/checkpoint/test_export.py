"""Export of parameters to programs without this library."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from harness.checkpoint_run import save_with_eight_workers

import localsgd_jax as lsgd
from localsgd_jax.checkpoint import export_params


def test_exported_params_are_read_by_orbax(tmp_path):
    state = save_with_eight_workers(tmp_path / "run")
    export_params(tmp_path / "model", lsgd.consensus(state, ("params", "seen")))
    code = f"""
        import sys
        import orbax.checkpoint as ocp
        tree = ocp.StandardCheckpointer().restore({str(tmp_path / "model")!r})
        assert "localsgd_jax" not in sys.modules
        print(tree["params"]["w"].tolist(), int(tree["seen"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = lsgd.consensus(state)["w"].tolist()
    assert done.stdout.strip() == f"{expected} 5"


def test_missing_orbax_raises(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(
        ImportError, match=r"export_params\(\) needs orbax-checkpoint: pip"
    ):
        export_params(tmp_path / "model", {"w": np.ones(3)})
