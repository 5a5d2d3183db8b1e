"""The code of the README and of CONTRIBUTING runs as it stands."""

import pathlib
import re
import textwrap

import numpy as np
import pytest
from cases import algorithm, batches, run
from click.testing import CliRunner

import localsgd_jax as lsgd
from localsgd_jax.cli import cli
from localsgd_jax.plan import measure

HERE = pathlib.Path(__file__).parent.parent


def blocks(name, language="python"):
    text = (HERE / name).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.M | re.S)
    return [textwrap.dedent(block) for _, block in found]


def test_the_loop_of_the_readme(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("README.md"):
        exec(block, names)
    driven, waiting = capsys.readouterr().out.splitlines()
    step, sent, loss, error = driven.split()
    assert (int(step), int(sent)) == (353, 21 * 140)
    assert float(loss) < 1 and float(error) < 1
    assert waiting.startswith("[8 8 8 8] ") and float(waiting.split()[-1]) < 1


def test_the_planned_job_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "SHORTEST", 1e-4)
    # Times as short as these are noise, from which no link can be told.
    monkeypatch.setattr(measure, "all_reduce_seconds", lambda *given: given[2] * 1e-9)
    (block,) = [x for x in blocks("README.md") if x.startswith("# planned.py")]
    pathlib.Path("planned.py").write_text(block)
    (line,) = [x for x in blocks("README.md", "console") if "planned:logistic" in x]
    command, shown = line.splitlines()
    args = command.removeprefix("$ localsgd ").removesuffix(" | tail -n 1").split()
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == shown


def test_the_skeleton_of_a_rule_obeys_its_docstring():
    names = {}
    exec(blocks("CONTRIBUTING.md")[0], names)
    nudge = names["nudge"]
    results = [
        run(lsgd.simulate(algorithm(rule), 8), batches(4), lsgd.every(2))[0]
        for rule in (nudge(1.0), lsgd.average())
    ]
    np.testing.assert_allclose(
        results[0].workers.params["out"], results[1].workers.params["out"], rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"nudge\(rate\): rate must be in"):
        nudge(2.0)


def test_every_public_name_is_in_the_readme():
    text = (HERE / "README.md").read_text()
    types = {
        "Adaptive",
        "Algorithm",
        "Cluster",
        "Context",
        "RuleState",
        "Schedule",
        "State",
    }
    types |= {"SyncRule", "Worker", "JobError", "NonFiniteLossError", "NoisyStepError"}
    for name in set(lsgd.__all__) - types:
        assert re.search(rf"\b{name}\b", text), name


def test_every_file_is_on_the_map():
    text = (HERE / "README.md").read_text()
    for path in (HERE / "localsgd_jax").iterdir():
        if path.name not in ("__init__.py", "__main__.py", "__pycache__"):
            assert f"`{path.name}`" in text or f"`{path.name}/`" in text, path.name
