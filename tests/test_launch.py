"""`localsgd launch` with real processes, signals and exit codes; no JAX in them."""

import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from localsgd_jax.launch import job, output

PYTHON = [sys.executable, "-I", "-S", "-c"]
ME = "import os, sys, time, signal; me = int(os.environ['LOCALSGD_PROCESS'])\n"
SLEEP = "time.sleep(60)\n"


def launch(program, processes=2, **changes):
    """Runs a program under the launcher in this process; returns the exit code."""
    command = [*PYTHON, ME + program]
    settings = job.Settings(command, processes, processes, 1, False, 0, 5.0)
    return job.launch(settings._replace(**changes))


def start(program, *options):
    """Starts the command in a process of its own, for signals."""
    command = [sys.executable, "-m", "localsgd_jax", "launch", "-n", "2", *options]
    return subprocess.Popen(
        [*command, "--", *PYTHON, ME + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def heeds_signals():
    """Also where the tests run in the background or under nohup."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, heard[number]) for number in heard}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def first_lines(started, count):
    return sorted(started.stdout.readline() for _ in range(count))


def gone(pids, seconds=10):
    """Waits until none of the processes is there any more."""
    deadline = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if pathlib.Path(f"/proc/{pid}").exists()]
        time.sleep(0.02)
    return not left


def test_each_line_says_whose_it_is(capfd):
    program = "print('out'); print('err', me, file=sys.stderr); sys.stdout.write('end')"
    assert launch(program) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] end", "[0] out", "[1] end", "[1] out"]
    assert sorted(err.splitlines()) == ["[0] err 0", "[1] err 1"]


def test_a_progress_bar_moves(capfd):
    program = (
        r"sys.stdout.write('\r1/3\r2/3\r3/3\n'); sys.stdout.buffer.write(b'\xff\n')"
    )
    assert launch(program, processes=1) == 0
    out = capfd.readouterr().out
    assert out.count("[0] ") == 5 and "[0] 3/3" in out


def test_every_process_knows_its_place(capfd, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    program = (
        "names = ['LOCALSGD_PROCESSES', 'LOCALSGD_PROCESS', 'LOCALSGD_RESTARTS',"
        "'JAX_NUM_CPU_DEVICES', 'JAX_LOCAL_DEVICE_IDS']\n"
        "print(*[os.environ[name] for name in names], "
        "int(os.environ['NPROC']) >= 2 * 8, os.environ['LOCALSGD_COORDINATOR'][:10])"
    )
    assert launch(program, devices=8) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "[0] 2 0 0 8 0,1,2,3,4,5,6,7 True 127.0.0.1:",
        "[1] 2 1 0 8 8,9,10,11,12,13,14,15 True 127.0.0.1:",
    ]


@pytest.mark.parametrize(
    "end, code",
    [
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("os.abort()", 134),
    ],
)
def test_one_that_fails_ends_all(capfd, end, code):
    assert launch(f"if me == 1: {end}\n{SLEEP}print('slept')", processes=3) == code
    out, err = capfd.readouterr()
    assert f"process 1 ended with {code}; ending the others" in err
    assert err.count("ended with") == 1 and not out


def test_the_others_may_say_what_went_wrong_there(capfd):
    program = "time.sleep(me / 2)\nprint('broken', me)\nsys.exit(me + 3)"
    assert launch(program) == 3
    assert "[1] broken 1" in capfd.readouterr().out


def test_who_does_not_listen_is_killed():
    program = (
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif me: sys.exit(4)\n{SLEEP}"
    )
    assert launch(program, grace=0.2) == 4


def test_elastic_jobs_outlive_a_process(capfd):
    program = "if me == 1: sys.exit(5)\ntime.sleep(0.3 * (me + 1))\nprint('done')"
    assert launch(program, processes=3, elastic=True) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] done", "[2] done"]
    assert "process 1 ended with 5" in err and "ending the others" not in err


def test_elastic_jobs_end_with_process_0(capfd):
    program = f"if me == 0: sys.exit(6)\n{SLEEP}print('slept')"
    assert launch(program, elastic=True) == 6
    assert not capfd.readouterr().out


def test_elastic_jobs_end_although_a_process_is_stuck(capfd):
    program = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"if me == 1: os.kill(os.getpid(), signal.SIGSTOP)\nif me: {SLEEP}"
    )
    assert launch(program, processes=3, elastic=True, grace=0.3) == 0
    said = "process 0 ended with 0 0.3 s ago; ending the others"
    assert said in capfd.readouterr().err


def test_a_job_that_failed_starts_again(capfd):
    program = (
        "turn = int(os.environ['LOCALSGD_RESTARTS'])\n"
        "print(turn, os.environ['LOCALSGD_COORDINATOR'], flush=True)\n"
        "if turn < 2 and me == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"if turn < 2: {SLEEP}"
    )
    assert launch(program, elastic=True, restarts=3) == 0
    out, err = capfd.readouterr()
    lines = [line[4:] for line in sorted(out.splitlines())]
    assert len(lines) == 6 and len(set(lines)) == 3, "each time another port"
    assert "restart 2 of 3 after exit code 137" in err and "restart 3" not in err


def with_broken(lot):
    """A program that says where it is, and fails at once with a lot of devices."""
    return (
        "lot, turn = (os.environ[x] for x in ('JAX_LOCAL_DEVICE_IDS', "
        "'LOCALSGD_RESTARTS'))\n"
        "print(turn, me, os.environ['LOCALSGD_PROCESSES'], lot, flush=True)\n"
        f"if lot == {lot!r}: sys.exit(3)\nif turn < '2': {SLEEP}"
    )


def starts(text):
    """For each start: how many processes there were, and the lots of devices."""
    found = {}
    for turn, _, count, lot in sorted(line[4:].split() for line in text.splitlines()):
        found.setdefault(int(turn), (int(count), []))[1].append(lot)
    return found


@pytest.mark.parametrize("broken", ["0,1", "2,3"])
def test_who_fails_twice_in_a_row_is_left_out(capfd, broken):
    lots = ["0,1", "2,3", "4,5"]
    changes = {"processes": 3, "least": 2, "devices": 2, "restarts": 2}
    assert launch(with_broken(broken), **changes) == 0
    out, err = capfd.readouterr()
    left = [lot for lot in lots if lot != broken]
    assert starts(out) == {0: (3, lots), 1: (3, lots), 2: (2, left)}
    number = lots.index(broken)
    assert f"process {number} failed first twice in a row and is left out" in err
    assert "[0] 2 0 2 " in out and "[1] 2 1 2 " in out, "renumbered"


@pytest.mark.parametrize("least, restarts", [(3, 3), (1, 1)])
def test_nobody_is_left_out_in_vain(capfd, least, restarts):
    """If too few would be left, or if there is no other start."""
    changes = {"processes": 3, "least": least, "restarts": restarts}
    program = f"if me == 1: sys.exit(3)\n{SLEEP}"
    assert launch(program, **changes) == 3
    assert "left out" not in capfd.readouterr().err


def test_who_fails_now_and_then_is_not_left_out(capfd):
    program = (
        "turn = int(os.environ['LOCALSGD_RESTARTS'])\n"
        f"if turn == 4: sys.exit(0)\nif me == turn % 2: sys.exit(3)\n{SLEEP}"
    )
    assert launch(program, processes=2, least=1, restarts=4) == 0
    assert "left out" not in capfd.readouterr().err


@pytest.mark.parametrize("count", ["0", "2:1", "0:2", "a", "2:", "-1"])
def test_impossible_numbers_of_processes(count):
    command = [sys.executable, "-m", "localsgd_jax", "launch", f"-n{count}", "--", "x"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"it must be N or MIN:MAX, at least 1, got {count!r}" in ended.stderr


def test_restarts_come_to_an_end():
    assert launch("sys.exit(9)", restarts=1) == 9


def test_a_program_that_is_not_there():
    started = subprocess.run(
        [sys.executable, "-m", "localsgd_jax", "launch", "-n", "2", "--", "no-such"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert started.returncode == 127
    assert started.stderr == (
        "localsgd launch: cannot start 'no-such': No such file or directory\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_signals_are_passed_on(number):
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


def test_what_nohup_ignores_stays_ignored():
    program = "print('ready', flush=True)\ntime.sleep(1)\nprint('done')"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        started = start(program)
    finally:
        signal.signal(signal.SIGHUP, before)
    with started:
        first_lines(started, 2)
        started.send_signal(signal.SIGHUP)
        out, err = started.communicate(timeout=30)
    assert sorted(out.splitlines()) == ["[0] done", "[1] done"]
    assert (started.returncode, err) == (0, "")


def test_the_second_signal_kills():
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


def test_no_orphans_when_the_launcher_is_killed():
    """Nor grandchildren, and although they do not listen to signals."""
    program = (
        "import subprocess\n"
        "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"print(os.getpid(), child.pid, flush=True)\n{SLEEP}"
    )
    with start(program) as started:
        lines = first_lines(started, 2)
        pids = [pid for line in lines for pid in line.split()[1:]]
        assert len(pids) == 4 and not gone(pids, 0)
        started.kill()
        started.wait(10)
        assert gone(pids)


LEFT = (
    "import subprocess\nos.setsid()\n"
    "child = subprocess.Popen(['sleep', '60'])\n"
    "print(os.getpid(), child.pid, flush=True)\n"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_who_has_left_the_group_is_ended_too(number):
    """SIGKILL goes to the launcher itself, and its guard ends those who are left."""
    deaf = "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
    with start(deaf + LEFT + SLEEP, "--grace", "0.5") as started:
        pids = [pid for line in first_lines(started, 2) for pid in line.split()[1:]]
        assert len(pids) == 4 and not gone(pids, 0)
        started.send_signal(number)
        started.wait(20)
        assert gone(pids)


def test_who_has_left_the_group_hears_signals():
    hear = "signal.signal(15, lambda *_: os._exit(7))\n"
    with start(hear + LEFT.replace("'60'", "'1'") + SLEEP) as started:
        first_lines(started, 2)
        started.terminate()
        started.communicate(timeout=20)
    assert started.returncode == 7


def test_no_orphans_when_a_program_leaves_some():
    program = "import subprocess\nprint(subprocess.Popen(['sleep', '60']).pid)"
    with start(program) as started:
        pids = [
            line.split()[1] for line in started.communicate(timeout=30)[0].splitlines()
        ]
    assert len(pids) == 2 and gone(pids) and started.returncode == 0


def test_nobody_who_reads():
    program = f"while True: print('x' * 1000, flush=True)\n{SLEEP}"
    with start(program) as started:
        started.stdout.read(2000)
        started.stdout.close()
        assert started.wait(30) == 128 + signal.SIGPIPE


def test_a_reader_that_is_slow_gets_everything():
    program = "print('x' * 300_000, flush=True)\nprint('end')"
    with start(program) as started:
        time.sleep(job.LAST_LINES + 2)
        assert started.poll() is None
        out = started.communicate(timeout=30)[0]
    assert started.returncode == 0
    assert sorted(map(len, out.splitlines())) == [7, 7, 300_004, 300_004]


def test_strangers_who_hold_pipes_cost_one_pause():
    """However many they are."""
    program = (
        "import subprocess\n"
        "subprocess.Popen(['sleep', '60'], start_new_session=True)\nprint('end')"
    )
    with start(program, "-n", "4") as started:
        out = first_lines(started, 4)
        begin = time.monotonic()
        # Its own pipes end with it, those of the strangers do not.
        assert started.wait(30) == 0
        assert time.monotonic() - begin < 2 * job.LAST_LINES
    assert out == [f"[{i}] end\n" for i in range(4)]


@pytest.mark.parametrize(
    "text",
    [b"a\nbb\r\nc\rd\r\r\n\ne", b"\r1/3\r2/3\r", b"\r", b"", b"\n", b"x\r\n\r"],
)
def test_lines_are_the_same_wherever_they_are_cut(text):
    whole = sum(output.whole_lines([text]), [])
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            cut = output.whole_lines([text[:i], text[i:j], text[j:]])
            assert sum(cut, []) == whole
    assert b"".join(whole).removesuffix(b"\n") == text.removesuffix(b"\n")


def test_no_byte_of_a_long_line_is_looked_at_often(monkeypatch):
    ends, looked = output._ENDS, []

    class Counted:
        def split(self, text):
            looked.append(len(text))
            return ends.split(text)

    monkeypatch.setattr(output, "_ENDS", Counted())
    (line,) = sum(output.whole_lines([b"x" * 1000] * 1000), [])
    assert len(line) == 1_000_001 and sum(looked) == 1_000_000


@pytest.mark.parametrize(
    "where, named",
    [
        (
            "> /dev/full",
            "localsgd launch: cannot write the output: [Errno 28] No space",
        ),
        (">&-", "Error: launch: the standard output is closed"),
        ("2>&- >&-", ""),
        ("> /dev/full 2> /dev/full", ""),
    ],
)
def test_output_that_nobody_takes_is_a_failure(where, named):
    command = [sys.executable, "-m", "localsgd_jax", "launch", "-n", "1", "--", "echo"]
    done = subprocess.run(
        f"exec {shlex.join([*command, 'lost'])} {where}",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(named) and done.stderr.count("\n") == bool(named)


def test_lost_output_is_a_failure_also_after_the_last_process():
    run = job.Run(job.Settings(["true"], 1, 1, 1, False, 0, 5.0), 0, [0])
    run.events.put((None, 1))
    run._hear_out([])
    assert run.code == 1


def test_options_after_the_program_are_the_programs_own():
    command = [sys.executable, "-m", "localsgd_jax", "launch", "-n", "2", *PYTHON]
    own = ["-n", "3", "--grace", "x", "--help"]
    done = subprocess.run(
        [*command, "import sys; print(sys.argv[1:])", *own],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == [f"[0] {own}", f"[1] {own}"]


@pytest.mark.parametrize("grace", ["nan", "inf", "-1", "1e300"])
def test_times_that_never_come_are_refused(grace):
    from click.testing import CliRunner

    from localsgd_jax.cli import cli

    done = CliRunner().invoke(cli, ["launch", "-n", "1", "--grace", grace, "true"])
    assert done.exit_code == 1
    named = "--grace must be from 0 to 1e+06 seconds, got"
    assert done.output.startswith(f"Error: {named}") and done.output.count("\n") == 1


def test_help_shows_an_example():
    from click.testing import CliRunner

    from localsgd_jax.cli import cli

    shown = CliRunner().invoke(cli, ["launch", "--help"]).output
    assert "localsgd launch -n 4 -- python train.py" in shown
    refused = CliRunner().invoke(cli, ["launch", "-n", "0", "--", "true"])
    assert refused.exit_code and "N or MIN:MAX" in refused.output
