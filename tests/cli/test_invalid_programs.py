"""Invalid input of `localsgd plan`, `audit` and `reproduce`: one line, and no file."""

import pathlib

import pytest
from harness.command_line import error_of
from harness.selection import in_full

EXIT = "the program must not call sys.exit, got the exit code"


@pytest.fixture(autouse=True)
def programs(workdir, monkeypatch):
    """Writes modules that end the process when imported and when called."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    pathlib.Path("exits_early.py").write_text("import sys\nsys.exit(9)\n")
    pathlib.Path("exits_late.py").write_text("def step(mesh):\n    raise SystemExit\n")


@pytest.mark.parametrize(
    "line, message",
    [
        ("plan --measure x", "MODULE:FUNCTION: a name like module:function is needed"),
        in_full("plan --measure exits_early:step", f"{EXIT} 9"),
        in_full("plan --measure exits_late:step", f"{EXIT} None"),
        ("audit exits_early:step", f"{EXIT} 9"),
        ("audit exits_late:step", f"{EXIT} None"),
    ],
)
def test_programs_without_a_result_print_one_line(line, message):
    assert error_of(line).startswith(message)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--step-seconds inf", "step_seconds must be finite, got inf"),
        ("--step-seconds nan", "step_seconds must be positive, got nan"),
        ("--bits inf", "bits must be finite, got inf"),
        ("--latency nan --bandwidth 1", "latency must be at least 0, got nan"),
        ("--latency 1 --bandwidth inf", "bandwidth must be finite, got inf"),
        ("--max-communication-fraction nan", "must be in (0, 1), got nan"),
        ("--steps 9 --constants nan 1 1 1", "mu must be positive, got nan"),
        ("--steps 9 --constants 1 1 inf 1", "variance must be finite, got inf"),
    ],
)
def test_numbers_that_are_not_finite_print_one_line(options, message):
    line = f"plan --step-seconds 1 --parameters 9 {options}"
    assert message in error_of(line)


@pytest.mark.parametrize("command", ["w8a", "stragglers"])
@pytest.mark.parametrize("data", ["nowhere", ""])
def test_missing_data_write_no_directory(command, data):
    message = f"no file {data!r} and no registered dataset of that name"
    assert error_of(f"reproduce {command} --quick --data={data}").startswith(message)


def test_empty_name_of_data_prints_one_line():
    assert error_of("train --data=").startswith("no file '' and no registered dataset")
