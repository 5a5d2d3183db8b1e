"""Retries of atomic calls, with a scripted coordination service."""

import threading
import types

import pytest

from localsgd_jax.fault_tolerance import membership
from localsgd_jax.fault_tolerance.membership import Membership, MembershipError


class ScriptedClient:
    """Coordination service of two processes with given results of the barriers."""

    def __init__(self, live_nodes):
        self.live_nodes, self.failures = iter(live_nodes), {}

    def get_live_nodes(self, processes):
        assert processes == [0, 1]
        return next(self.live_nodes)

    def key_value_set(self, key, value):
        self.failures[key] = value

    def key_value_dir_get(self, prefix):
        return [item for item in self.failures.items() if item[0].startswith(prefix)]


@pytest.fixture
def make_membership(monkeypatch):
    def make(*live_nodes, **options):
        client = ScriptedClient(live_nodes)
        monkeypatch.setattr(membership, "coordination_client", lambda: client)
        devices = [types.SimpleNamespace(process_index=i) for i in (0, 1)]
        return Membership(devices, **options)

    return make


def processes_of(devices):
    return [device.process_index for device in devices]


BOTH, RESTARTED, ONE = {0: 7, 1: 8}, {0: 7, 1: 9}, {0: 7}


@pytest.mark.parametrize(
    "barriers, calls",
    [
        ([BOTH, BOTH], [[0, 1]]),
        ([BOTH, ONE, ONE, ONE], [[0, 1], [0]]),
        ([BOTH, RESTARTED, RESTARTED, RESTARTED], [[0, 1], [0, 1]]),
    ],
    ids=["no failure", "failed process", "new incarnation"],
)
def test_call_is_repeated_if_membership_changes(make_membership, barriers, calls):
    members, seen = make_membership(*barriers), []

    def call(devices):
        seen.append(processes_of(devices))
        return len(seen)

    assert members.run_atomically(call) == len(calls)
    assert seen == calls and members.live == sorted(barriers[-1])


def test_failed_attempts_are_bounded(make_membership):
    def call(devices):
        raise OSError("a cable")

    message = "3 attempts failed although no process has failed: process 0: OSError"
    with pytest.raises(MembershipError, match=message):
        make_membership(*[BOTH] * 6).run_atomically(call)


def test_process_marked_as_failed_raises(make_membership):
    with pytest.raises(MembershipError, match="this process was marked as failed"):
        make_membership({1: 8}).run_atomically(len)


def test_straggler_timeout_raises(make_membership):
    members, released = make_membership(straggler_timeout=0.05), threading.Event()
    members._client.get_live_nodes = lambda processes: released.wait(10)
    with pytest.raises(MembershipError, match=r"did not arrive within 0.05 s"):
        members.run_atomically(len)
    released.set()
