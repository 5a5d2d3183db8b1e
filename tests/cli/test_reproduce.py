"""The `localsgd reproduce` commands."""

import pytest
from click.testing import CliRunner
from harness.selection import in_full

from localsgd_jax.cli.reproduce import reproduce
from localsgd_jax.experiments.paper import (
    linear_speedup,
    period_scaling,
    speedup_model,
    stragglers,
    w8a,
)


def test_all_runs_every_experiment_with_its_defaults(tmp_path, monkeypatch):
    called = {}

    def recorder(name):
        def run(*arguments):
            called[name] = arguments
            return f"{name}: observed\n"

        return run

    for module in (speedup_model, w8a, period_scaling, linear_speedup, stragglers):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "run", recorder(name))
    result = CliRunner().invoke(reproduce, ["all", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert called == {
        "speedup_model": (tmp_path, 25.0, 1e-6),
        "w8a": (tmp_path, w8a.QUICK, "w8a", (1.0, 25.0)),
        "period_scaling": (tmp_path, period_scaling.QUICK),
        "linear_speedup": (tmp_path, linear_speedup.QUICK),
        "stragglers": (tmp_path, stragglers.QUICK, "w8a"),
    }
    CliRunner().invoke(reproduce, ["period-scaling"])
    directory, config = called["period_scaling"]
    assert (str(directory), config) == ("reproduce", period_scaling.FULL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["w8a", "--rho", "-1"], "--rho"),
        (["w8a", "--exponents", "3", "2"], "--exponents must be in order"),
        in_full(["w8a", "--seeds", "0"], "--seeds"),
        in_full(["w8a", "--data", "nowhere"], "no file 'nowhere'"),
        in_full(["speedup-theory", "--epsilon", "0"], "--epsilon"),
        in_full(["linear-speedup", "--out", __file__], "--out"),
    ],
)
def test_invalid_input_prints_one_line(arguments, words):
    result = CliRunner().invoke(reproduce, arguments)
    assert result.exit_code != 0
    (line,) = [line for line in result.output.splitlines() if "Error" in line]
    assert words in line
