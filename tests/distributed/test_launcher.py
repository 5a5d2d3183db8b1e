"""`localsgd launch` with real processes and signals; no JAX in the processes."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
from harness.selection import in_full, keep

from localsgd_jax.distributed.launcher import job, output, reaper

PYTHON = [sys.executable, "-I", "-S", "-c"]
PREAMBLE = (
    "import os, sys, time, signal; process = int(os.environ['LOCALSGD_PROCESS_ID'])\n"
)
SLEEP = "time.sleep(60)\n"
RESTART_COUNT = "restarts = int(os.environ['LOCALSGD_RESTART_COUNT'])\n"
IGNORE_SIGNALS = "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"


def launch(program, num_processes=2, **changes):
    """Runs a program under the launcher in this process; returns the exit code."""
    command = [*PYTHON, PREAMBLE + program]
    config = job.LaunchConfig(
        command, num_processes, num_processes, 1, False, 0, grace_period=5.0
    )
    return job.launch(config._replace(**changes))


def command_line(*arguments):
    return [sys.executable, "-m", "localsgd_jax", "launch", *arguments]


def start(program, *options):
    """Starts the command in a process of its own, for signals."""
    return subprocess.Popen(
        command_line("-n", "2", *options, "--", *PYTHON, PREAMBLE + program),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_command(*arguments):
    return subprocess.run(
        command_line(*arguments), capture_output=True, text=True, timeout=60
    )


@pytest.fixture(autouse=True)
def default_signal_handlers():
    """Restores signals that are ignored in the background or under nohup."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    previous = {n: signal.signal(n, handler) for n, handler in handlers.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def first_lines(started, count):
    return sorted(started.stdout.readline() for _ in range(count))


def process_ids(started, count):
    """Returns the process ids in the first two lines of output."""
    pids = [pid for line in first_lines(started, 2) for pid in line.split()[1:]]
    assert len(pids) == count and not wait_until_exited(pids, 0)
    return pids


def wait_until_exited(pids, seconds=10):
    """Waits for processes to exit; returns whether all of them have."""
    deadline = time.monotonic() + seconds
    running = list(pids)
    while running and time.monotonic() < deadline:
        running = [pid for pid in running if pathlib.Path(f"/proc/{pid}").exists()]
        time.sleep(0.02)
    return not running


def test_output_prefix(capfd):
    program = (
        "print('out'); print('err', process, file=sys.stderr); sys.stdout.write('end')"
    )
    assert launch(program) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] end", "[0] out", "[1] end", "[1] out"]
    assert sorted(err.splitlines()) == ["[0] err 0", "[1] err 1"]


def test_progress_bar_is_forwarded(capfd):
    program = (
        r"sys.stdout.write('\r1/3\r2/3\r3/3\n'); sys.stdout.buffer.write(b'\xff\n')"
    )
    assert launch(program, num_processes=1) == 0
    out = capfd.readouterr().out
    assert sorted(out.split("\n")) == ["", "\r[0] 1/3\r[0] 2/3\r[0] 3/3", "[0] �"]


def test_process_environment(capfd, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    program = (
        "names = ['LOCALSGD_NUM_PROCESSES', 'LOCALSGD_PROCESS_ID', "
        "'LOCALSGD_RESTART_COUNT', 'JAX_NUM_CPU_DEVICES', 'JAX_LOCAL_DEVICE_IDS']\n"
        "print(*[os.environ[name] for name in names], "
        "int(os.environ['NPROC']) >= 2 * 8, "
        "os.environ['LOCALSGD_COORDINATOR_ADDRESS'][:10], "
        "os.environ['LOCALSGD_JOB_ID'].endswith('-0'))"
    )
    assert launch(program, devices_per_process=8) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "[0] 2 0 0 8 0,1,2,3,4,5,6,7 True 127.0.0.1: True",
        "[1] 2 1 0 8 8,9,10,11,12,13,14,15 True 127.0.0.1: True",
    ]


@pytest.mark.parametrize(
    "end, code",
    [
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        in_full("os.kill(os.getpid(), signal.SIGTERM)", 143),
        in_full("os.abort()", 134),
    ],
)
def test_failure_terminates_job(capfd, end, code):
    program = f"if process == 1: {end}\n{SLEEP}print('slept')"
    assert launch(program, num_processes=3) == code
    out, err = capfd.readouterr()
    assert f"process 1 exited with {code}; terminating the others" in err
    assert err.count("exited with") == 1 and not out


def test_peers_may_log_before_termination(capfd):
    program = "time.sleep(process / 2)\nprint('broken', process)\nsys.exit(process + 3)"
    assert launch(program) == 3
    assert "[1] broken 1" in capfd.readouterr().out


def test_sigkill_after_grace_period():
    program = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"if process: sys.exit(4)\n{SLEEP}"
    )
    assert launch(program, grace_period=0.2) == 4


def test_elastic_job_survives_process_failure(capfd):
    program = (
        "if process == 1: sys.exit(5)\ntime.sleep(0.3 * (process + 1))\nprint('done')"
    )
    assert launch(program, num_processes=3, elastic=True) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] done", "[2] done"]
    assert "process 1 exited with 5" in err and "terminating the others" not in err


def test_elastic_job_fails_with_process_0(capfd):
    program = f"if process == 0: sys.exit(6)\n{SLEEP}print('slept')"
    assert launch(program, elastic=True) == 6
    assert not capfd.readouterr().out


def test_elastic_job_ends_although_a_process_hangs(capfd):
    program = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if process == 1: os.kill(os.getpid(), signal.SIGSTOP)\n"
        f"if process: {SLEEP}"
    )
    assert launch(program, num_processes=3, elastic=True, grace_period=0.3) == 0
    message = "process 0 exited with 0 0.3 s ago; terminating the others"
    assert message in capfd.readouterr().err


def test_failed_job_is_restarted(capfd):
    program = (
        f"{RESTART_COUNT}"
        "print(restarts, os.environ['LOCALSGD_COORDINATOR_ADDRESS'], flush=True)\n"
        "if restarts < 2 and process == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"if restarts < 2: {SLEEP}"
    )
    assert launch(program, elastic=True, max_restarts=3) == 0
    out, err = capfd.readouterr()
    lines = [line[4:] for line in sorted(out.splitlines())]
    assert len(lines) == 6 and len(set(lines)) == 3, "another port for each start"
    assert "restart 2 of 3 after exit code 137" in err and "restart 3" not in err


LISTEN = (
    "import socket\n"
    "port = int(os.environ['LOCALSGD_COORDINATOR_ADDRESS'].partition(':')[2])\n"
    "listener = socket.create_server(('127.0.0.1', port)) if not process else None\n"
)
STOP = "os.kill(os.getpid(), signal.SIGSTOP)\n"
IF_FIRST_START = f"{RESTART_COUNT}if restarts: print('again'); sys.exit()\n"


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            f"{LISTEN}if process: time.sleep(1); os.abort()\n{STOP}", id="aborted peer"
        ),
        in_full(f"if process: {SLEEP}{STOP}", id="stopped before it listens"),
        in_full(f"{LISTEN}if process: sys.exit()\n{STOP}", id="other exits"),
        in_full(f"{LISTEN}if process == 2: sys.exit(1)\n{STOP}", id="others stopped"),
        in_full(f"{LISTEN}time.sleep(1)\n{STOP}", id="all stopped"),
        in_full(
            f"{LISTEN}if process == 2: time.sleep(1); os.abort()\n{STOP}",
            id="several stopped",
        ),
    ],
)
def test_hanging_process_0_is_restarted(capfd, program):
    changes = {"elastic": True, "max_restarts": 1, "grace_period": 2.0}
    assert launch(IF_FIRST_START + program, num_processes=3, **changes) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"[{i}] again" for i in range(3)]
    assert "process 0 has not responded for 2 s; killing all processes" in err
    assert "restart 1 of 1 after exit code 134" in err


@pytest.mark.full
def test_repeatedly_stopped_slot_is_excluded(capfd):
    """The others fail before it, because it does not respond."""
    program = (
        f"{RESTART_COUNT}if restarts == 2: sys.exit()\n"
        f"if process == 1: {STOP}time.sleep(1)\nsys.exit(1)"
    )
    changes = {"min_processes": 2, "max_restarts": 2, "grace_period": 1.0}
    assert launch(program, num_processes=3, **changes) == 0
    assert "excluding slot 1: first to fail in two" in capfd.readouterr().err


@pytest.mark.parametrize(
    "serve",
    [
        in_full("time.sleep(5)", id="does not listen"),
        in_full(
            "end = time.monotonic() + 5\n"
            "listener.settimeout(1)\n"
            "while time.monotonic() < end:\n"
            "    try: listener.accept()[0].sendall(b'settings')\n"
            "    except TimeoutError: pass\n",
            id="answers",
        ),
    ],
)
def test_abort_of_a_process_does_not_end_a_process_0_that_works(capfd, serve):
    listen = LISTEN if "listener" in serve else ""
    program = f"{listen}if process: os.abort()\n{serve}\nprint('done')"
    assert launch(program, elastic=True, grace_period=1.0) == 0
    out, err = capfd.readouterr()
    assert out == "[0] done\n" and "has not responded" not in err


@pytest.mark.full
def test_process_0_receives_reports_of_failures():
    """Of exits, and of a process that has been stopped for the grace period."""
    server = (
        "if process == 1: sys.exit(3)\n"
        f"if process == 2: {STOP}"
        "reports = []\n"
        "while len(reports) < 2:\n"
        "    connection = listener.accept()[0]\n"
        "    reports.append(connection.recv(1000).decode().strip())\n"
        "    connection.close()\n"
        'expected = [\'"failed": 1, "reason": "exited with 3"\', '
        '\'"failed": 2, "reason": "has been stopped by a signal for 1 s"\']\n'
        "sys.exit(not all(x in y for x, y in zip(expected, reports)))\n"
    )
    changes = {"elastic": True, "grace_period": 1.0}
    assert launch(LISTEN + server, num_processes=3, **changes) == 0


@pytest.mark.full
def test_time_in_which_the_launcher_is_stopped_does_not_count():
    """It is stopped for longer than the grace period, and process 0 as long."""
    program = (
        f"{LISTEN}if process: time.sleep(2); os.abort()\n"
        "print(os.getpid(), flush=True)\nlistener.settimeout(1)\n"
        "end = time.monotonic() + 9\n"
        "while time.monotonic() < end:\n"
        "    try: listener.accept()[0].sendall(b'settings')\n"
        "    except TimeoutError: pass\n"
    )
    with start(program, "--elastic", "--grace-period", "4") as started:
        pid = int(first_lines(started, 1)[0].split()[1])
        for number in (signal.SIGSTOP, signal.SIGCONT):
            started.send_signal(number)
            os.kill(pid, number)
            time.sleep(5 if number == signal.SIGSTOP else 0)
        assert started.wait(30) == 0


def program_with_failing_slot(slot):
    """Returns a program that prints its slot and fails in a given one."""
    return (
        "slot, restarts = (os.environ[x] for x in ('JAX_LOCAL_DEVICE_IDS', "
        "'LOCALSGD_RESTART_COUNT'))\n"
        "print(restarts, process, os.environ['LOCALSGD_NUM_PROCESSES'], slot, "
        "flush=True)\n"
        f"if slot == {slot!r}: sys.exit(3)\nif restarts < '2': {SLEEP}"
    )


def starts(text):
    """Returns the number of processes and their slots by restart count."""
    found = {}
    lines = sorted(line[4:].split() for line in text.splitlines())
    for restarts, _, count, slot in lines:
        found.setdefault(int(restarts), (int(count), []))[1].append(slot)
    return found


@pytest.mark.full
@pytest.mark.parametrize("broken", ["0,1", in_full("2,3")])
def test_repeatedly_failing_slot_is_excluded(capfd, broken):
    slots = ["0,1", "2,3", "4,5"]
    changes = {"min_processes": 2, "devices_per_process": 2, "max_restarts": 2}
    assert launch(program_with_failing_slot(broken), 3, **changes) == 0
    out, err = capfd.readouterr()
    remaining = [slot for slot in slots if slot != broken]
    assert starts(out) == {0: (3, slots), 1: (3, slots), 2: (2, remaining)}
    index = slots.index(broken)
    assert f"excluding slot {index}: first to fail in two consecutive starts" in err
    assert "[0] 2 0 2 " in out and "[1] 2 1 2 " in out, "renumbered"


@pytest.mark.parametrize(
    "min_processes, restarts",
    [in_full(3, 3, id="minimum"), pytest.param(1, 1, id="last start")],
)
def test_no_exclusion_below_minimum_or_at_the_end(capfd, min_processes, restarts):
    changes = {"min_processes": min_processes, "max_restarts": restarts}
    program = f"if process == 1: sys.exit(3)\n{SLEEP}"
    assert launch(program, num_processes=3, **changes) == 3
    assert "excluding" not in capfd.readouterr().err


@pytest.mark.full
def test_alternately_failing_slots_are_not_excluded(capfd):
    program = (
        f"{RESTART_COUNT}"
        "if restarts == 4: sys.exit(0)\n"
        f"if process == restarts % 2: sys.exit(3)\n{SLEEP}"
    )
    assert launch(program, min_processes=1, max_restarts=4) == 0
    assert "excluding" not in capfd.readouterr().err


def test_number_of_restarts_is_limited():
    assert launch("sys.exit(9)", max_restarts=1) == 9


@pytest.mark.parametrize("count", keep(["0", "2:1", "0:2", "a", "2:", "-1"], ["2:1"]))
def test_invalid_process_counts_raise(count):
    done = run_command(f"-n{count}", "--", "x")
    assert done.returncode == 2
    assert f"must be N or MIN:MAX, at least 1, got {count!r}" in done.stderr


def test_missing_program():
    done = run_command("-n", "2", "--", "no-such")
    assert done.returncode == 127
    assert done.stderr == (
        "localsgd launch: cannot start 'no-such': No such file or directory\n"
    )


@pytest.mark.parametrize(
    "number", keep([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]), ids=str
)
def test_signals_are_forwarded(number):
    program = (
        # A handler that printed could interrupt the print of the main program.
        "def end(n, frame): os.write(1, b'saved %d\\n' % n); sys.exit(0)\n"
        f"for n in (2, 15): signal.signal(n, end)\nos.write(1, b'ready\\n')\n{SLEEP}"
    )
    with start(program) as started:
        assert first_lines(started, 2) == ["[0] ready\n", "[1] ready\n"]
        started.send_signal(number)
        out, err = started.communicate(timeout=30)
    assert sorted(out.splitlines()) == [f"[{i}] saved {int(number)}" for i in (0, 1)]
    assert (started.returncode, err) == (0, "")


@pytest.mark.full
def test_ignored_signals_stay_ignored():
    program = "print('ready', flush=True)\ntime.sleep(1)\nprint('done')"
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        started = start(program)
    finally:
        signal.signal(signal.SIGHUP, previous)
    with started:
        first_lines(started, 2)
        started.send_signal(signal.SIGHUP)
        out, err = started.communicate(timeout=30)
    assert sorted(out.splitlines()) == ["[0] done", "[1] done"]
    assert (started.returncode, err) == (0, "")


def test_second_signal_kills():
    program = (
        f"signal.signal(2, lambda *_: None)\nprint('ready', flush=True)\n{2 * SLEEP}"
    )
    with start(program, "--restarts", "5") as started:
        first_lines(started, 2)
        started.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert started.poll() is None
        started.send_signal(signal.SIGINT)
        started.communicate(timeout=30)
    assert started.returncode == 137


def test_no_orphans_after_the_launcher_is_killed():
    """Includes grandchildren and processes that ignore signals."""
    program = (
        f"import subprocess\n{IGNORE_SIGNALS}"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"print(os.getpid(), child.pid, flush=True)\n{SLEEP}"
    )
    with start(program) as started:
        pids = process_ids(started, 4)
        started.kill()
        started.wait(10)
        assert wait_until_exited(pids)


DETACH = (
    "import subprocess\nos.setsid()\n"
    "child = subprocess.Popen(['sleep', '60'])\n"
    "print(os.getpid(), child.pid, flush=True)\n"
)


@pytest.mark.full
@pytest.mark.parametrize(
    "number", keep([signal.SIGTERM, signal.SIGKILL], [signal.SIGKILL]), ids=str
)
def test_detached_processes_are_terminated(number):
    """SIGKILL ends the launcher itself; then the reaper kills the processes."""
    with start(IGNORE_SIGNALS + DETACH + SLEEP, "--grace-period", "0.5") as started:
        pids = process_ids(started, 4)
        started.send_signal(number)
        started.wait(20)
        assert wait_until_exited(pids)


@pytest.mark.full
def test_detached_processes_receive_signals():
    handler = "signal.signal(15, lambda *_: os._exit(7))\n"
    with start(handler + DETACH.replace("'60'", "'1'") + SLEEP) as started:
        first_lines(started, 2)
        started.terminate()
        started.communicate(timeout=20)
    assert started.returncode == 7


@pytest.mark.full
def test_no_orphans_of_finished_processes():
    program = "import subprocess\nprint(subprocess.Popen(['sleep', '60']).pid)"
    with start(program) as started:
        out = started.communicate(timeout=30)[0]
        pids = [line.split()[1] for line in out.splitlines()]
    assert len(pids) == 2 and wait_until_exited(pids) and started.returncode == 0


def test_reaper_runs_without_the_package():
    """An installed wheel needs no source tree, and starting it does not import JAX."""
    with job.start_reaper() as started:
        command = pathlib.Path(f"/proc/{started.pid}/cmdline").read_bytes().split(b"\0")
        assert command[1:4] == [b"-I", b"-S", reaper.__file__.encode()]
        maps = pathlib.Path(f"/proc/{started.pid}/maps").read_text()
        assert "jaxlib" not in maps and "numpy" not in maps
        started.stdin.close()
        assert started.wait(10) == -signal.SIGKILL


@pytest.mark.full
def test_broken_stdout():
    program = f"while True: print('x' * 1000, flush=True)\n{SLEEP}"
    with start(program) as started:
        started.stdout.read(2000)
        started.stdout.close()
        assert started.wait(30) == 128 + signal.SIGPIPE


@pytest.mark.full
def test_slow_reader_receives_all_output():
    program = "print('x' * 300_000, flush=True)\nprint('end')"
    with start(program) as started:
        time.sleep(job.DRAIN_TIMEOUT_SECONDS + 2)
        assert started.poll() is None
        out = started.communicate(timeout=30)[0]
    assert started.returncode == 0
    assert sorted(map(len, out.splitlines())) == [7, 7, 300_004, 300_004]


@pytest.mark.full
def test_detached_children_delay_exit_once():
    """The delay does not grow with their number."""
    program = (
        "import subprocess\n"
        "subprocess.Popen(['sleep', '60'], start_new_session=True)\nprint('end')"
    )
    with start(program, "-n", "4") as started:
        out = first_lines(started, 4)
        began = time.monotonic()
        # Pipes of the job end with it, pipes of detached processes do not.
        assert started.wait(30) == 0
        assert time.monotonic() - began < 2 * job.DRAIN_TIMEOUT_SECONDS
    assert out == [f"[{i}] end\n" for i in range(4)]


@pytest.mark.parametrize(
    "text",
    [b"a\nbb\r\nc\rd\r\r\n\ne", b"\r1/3\r2/3\r", b"\r", b"", b"\n", b"x\r\n\r"],
)
def test_lines_do_not_depend_on_chunks(text):
    expected = sum(output.split_lines([text]), [])
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            lines = output.split_lines([text[:i], text[i:j], text[j:]])
            assert sum(lines, []) == expected
    assert b"".join(expected).removesuffix(b"\n") == text.removesuffix(b"\n")


def test_long_lines_are_linear_time(monkeypatch):
    pattern, lengths = output._LINE_END, []

    class CountingPattern:
        def split(self, text):
            lengths.append(len(text))
            return pattern.split(text)

    monkeypatch.setattr(output, "_LINE_END", CountingPattern())
    (line,) = sum(output.split_lines([b"x" * 1000] * 1000), [])
    assert len(line) == 1_000_001 and sum(lengths) == 1_000_000


@pytest.mark.parametrize(
    "redirection, message",
    [
        (
            "> /dev/full",
            "localsgd launch: cannot write the output: [Errno 28] No space",
        ),
        in_full(">&-", "Error: launch: the standard output is closed"),
        in_full("2>&- >&-", ""),
        in_full("> /dev/full 2> /dev/full", ""),
    ],
)
def test_unwritable_output_is_a_failure(redirection, message):
    command = command_line("-n", "1", "--", "echo", "lost")
    done = subprocess.run(
        f"exec {shlex.join(command)} {redirection}",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == bool(message)


def test_lost_output_after_the_last_process_is_a_failure():
    config = job.LaunchConfig(["true"], 1, 1, 1, False, 0, 5.0)
    group = job.WorkerGroup(config, 0, [0])
    group._report_output_failure(1)
    group._drain_output([])
    assert group.code == 1


def test_options_after_the_program_belong_to_the_program():
    options = ["-n", "3", "--grace-period", "x", "--help"]
    program = "import sys; print(sys.argv[1:])"
    done = run_command("-n", "2", *PYTHON, program, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [f"[0] {options}", f"[1] {options}"]


@pytest.mark.parametrize("grace", ["nan", "inf", "-1", "1e300"])
def test_invalid_grace_period_raises(grace):
    from click.testing import CliRunner

    from localsgd_jax.cli.main import cli

    arguments = ["launch", "-n", "1", "--grace-period", grace, "true"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1
    message = "--grace-period must be from 0 to 1e+06 seconds, got"
    assert done.output.startswith(f"Error: {message}") and done.output.count("\n") == 1


def test_help_shows_an_example():
    from click.testing import CliRunner

    from localsgd_jax.cli.main import cli

    shown = CliRunner().invoke(cli, ["launch", "--help"]).output
    assert "localsgd launch -n 4 -- python train.py" in shown
    invalid = CliRunner().invoke(cli, ["launch", "-n", "0", "--", "true"])
    assert invalid.exit_code and "N or MIN:MAX" in invalid.output
