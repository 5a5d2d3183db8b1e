"""Code blocks of the README and of the documentation run as they stand."""

import pathlib
import re
import textwrap

import numpy as np
import pytest
from click.testing import CliRunner
from harness.cases import algorithm, batches, run_manually
from harness.paths import ROOT
from harness.selection import keep

import localsgd_jax as lsgd
from localsgd_jax.cli.main import cli
from localsgd_jax.planning import measurement

# Pages whose blocks a test of their own checks.
OWN_TESTS = {
    "README.md",
    "docs/getting_started.md",
    "docs/development/adding_a_rule.md",
    "docs/guides/planning.md",
}
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("docs/**/*.md"))
    if "_build" not in path.parts
]


def blocks(page, language="python"):
    text = (ROOT / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.M | re.S)
    return [textwrap.dedent(block) for _, block in found]


def run_page(page):
    """Runs the Python blocks of a page one after another; returns their names."""
    names = {}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def block_of_file(page, name):
    """Returns the block that begins with the name of its file as a comment."""
    (block,) = [x for x in blocks(page) if x.startswith(f"# {name}")]
    return block


PLAIN = [page for page in PAGES if page not in OWN_TESTS and blocks(page)]


@pytest.fixture(autouse=True)
def workdir(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_readme_blocks_run(capsys):
    names = run_page("README.md")
    step, sent, loss = capsys.readouterr().out.split()
    assert (int(step), int(sent)) == (320, 20 * 140)
    assert float(loss) < 1
    assert names["params"]["w"].shape == (20,)


def test_getting_started_blocks_run(capsys):
    run_page("docs/getting_started.md")
    step, sent, loss, error = capsys.readouterr().out.split()
    assert (int(step), int(sent)) == (353, 21 * 140)
    assert float(loss) < 1 and float(error) < 1


@pytest.mark.parametrize("page", keep(PLAIN, ["docs/guides/data.md"]))
def test_page_blocks_run(page):
    run_page(page)


@pytest.mark.full
def test_asynchronous_page_prints_staleness_and_loss(capsys):
    run_page("docs/guides/asynchronous.md")
    printed = capsys.readouterr().out
    assert printed.startswith("[8 8 8 8] ") and float(printed.split()[-1]) < 1


@pytest.mark.full
def test_planning_page_shows_what_the_planner_prints(monkeypatch):
    monkeypatch.setattr(measurement, "MIN_SECONDS", 1e-4)
    # Times as short as these are noise, from which no link can be told.
    monkeypatch.setattr(
        measurement, "all_reduce_seconds", lambda *given: given[2] * 1e-9
    )
    page = "docs/guides/planning.md"
    run_page(page)
    pathlib.Path("planned.py").write_text(block_of_file(page, "planned.py"))
    shown = [x for x in blocks(page, "console") if "planned:logistic" in x]
    (last,) = shown[0].splitlines()[1:]
    assert invoke(shown[0]).splitlines()[-1] == last
    (table,) = [x for x in blocks(page, "console") if "--step-seconds" in x]
    assert invoke(table) == table.partition("\n")[2]


@pytest.mark.full
def test_analysis_page_shows_what_the_audit_prints():
    page = "docs/guides/communication_analysis.md"
    pathlib.Path("audited.py").write_text(block_of_file(page, "audited.py"))
    (shown,) = [x for x in blocks(page, "console") if "step_with_collective" in x]
    assert invoke(shown, exit_code=1) == shown.partition("\n")[2]


def invoke(block, exit_code=0):
    """Runs the first command of a console block; returns its output."""
    command = block.splitlines()[0].removesuffix(" | tail -n 1")
    done = CliRunner().invoke(cli, command.removeprefix("$ localsgd ").split())
    assert done.exit_code == exit_code, done.output
    return done.output


def test_skeleton_of_a_rule_matches_its_docstring():
    nudge = run_page("docs/development/adding_a_rule.md")["nudge"]
    results = [
        run_manually(lsgd.simulate(algorithm(rule), 8), batches(4), lsgd.every(2))[0]
        for rule in (nudge(1.0), lsgd.average())
    ]
    np.testing.assert_allclose(
        results[0].workers.params["out"], results[1].workers.params["out"], rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"nudge\(rate\): rate must be in"):
        nudge(2.0)
