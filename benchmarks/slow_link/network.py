"""Hosts of its own, joined by links of a given rate: Linux namespaces, veth, tc.

    this process, in a network namespace of its own
      bridge ── link1 ══ eth0 in the namespace of host 1, 10.77.0.1
             └─ link2 ══ eth0 in the namespace of host 2, 10.77.0.2

Nothing has a name outside: the namespaces are held by processes only, which die with
this one, and with the last of them the kernel removes bridge and links. So nothing is
left behind even if everything is killed, and no other interface can be reached.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
INSIDE = "LOCALSGD_SLOW_LINK"
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


def missing() -> str | None:
    """Says what this machine lacks for such hosts; None if nothing."""
    if not sys.platform.startswith("linux"):
        return f"Linux network namespaces are needed, this is {sys.platform}"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return tried.stderr.strip() or None


def inside() -> bool:
    """Returns whether this process is in another namespace than who called `enter`."""
    return os.environ.get(INSIDE, _namespace()) != _namespace()


def enter(command: Sequence[str]) -> None:
    """Starts this program again in a namespace of its own, unless it is in one."""
    if inside():
        return
    os.environ[INSIDE] = _namespace()
    os.execvp("unshare", ["unshare", "--net", "--mount", *command])


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


class Network:
    """Hosts 0, …, n − 1 on one bridge; use it in a `with` statement."""

    first, interface = address(0), "eth0"

    def __init__(self, hosts: int) -> None:
        if not inside():
            raise RuntimeError("Network(hosts): call enter(command) first")
        self.hosts = hosts
        self._held: list[subprocess.Popen] = []

    def __enter__(self) -> "Network":
        _do("ip link set lo up")
        _do("ip link add bridge type bridge")
        _do("ip link set bridge up")
        with tempfile.NamedTemporaryFile("w", suffix=".hosts") as names:
            names.write("127.0.0.1 localhost\n")
            names.writelines(f"{address(k)} host{k}\n" for k in range(self.hosts))
            names.flush()
            for host in range(self.hosts):
                self._add(host, names.name)
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._held:
            one.kill()
            one.wait()
        _do("ip link delete bridge")

    def throttle(self, mbit: float | None) -> None:
        """Limits what each host sends and receives, in 10⁶ bits a second."""
        for host in range(self.hosts):
            for prefix, device in (((), f"link{host}"), (self._within(host), "eth0")):
                _shape(prefix, device, mbit)

    def start(self, host: int, command: Sequence[str], **more) -> subprocess.Popen:
        """Starts a program on a host."""
        whole = [*DIE_WITH_PARENT, *self._within(host), *command]
        return subprocess.Popen(whole, **more)

    def _within(self, host: int) -> tuple[str, ...]:
        target = str(self._held[host].pid)
        place = f"--wd={os.getcwd()}"  # A mount namespace begins at its root.
        return ("nsenter", "--target", target, "--net", "--uts", "--mount", place)

    def _add(self, host: int, names: str) -> None:
        """Makes a host, and waits until it has its own names and its link."""
        script = (
            f"hostname host{host} && mount --bind {names} /etc/hosts"
            " && echo ready && exec sleep infinity"
        )
        held = subprocess.Popen(
            [*DIE_WITH_PARENT, "unshare", "--net", "--uts", "--mount"]
            + ["sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._held.append(held)
        if held.stdout.readline() != "ready\n":
            raise RuntimeError(f"Network(hosts): host {host} could not be made")
        link, within = f"link{host}", self._within(host)
        _do(f"ip link add {link} type veth peer name eth0 netns {held.pid}")
        _do(f"ip link set {link} master bridge up")
        _do(f"ip addr add {address(host)}/24 dev eth0", within)
        _do("ip link set eth0 up", within)
        _do("ip link set lo up", within)


def _namespace() -> str:
    return os.readlink("/proc/self/ns/net")


def _shape(prefix: Sequence[str], device: str, mbit: float | None) -> None:
    """Puts a token bucket on a device, or takes it away."""
    subprocess.run(
        [*prefix, "tc", "qdisc", "delete", "dev", device, "root"], capture_output=True
    )
    if mbit is not None:
        burst = max(32, round(mbit))  # KiB: 8 ms of the link, and a large packet.
        _do(
            f"tc qdisc add dev {device} root tbf rate {mbit}mbit burst {burst}kb "
            "latency 100ms",
            prefix,
        )


def _do(command: str, prefix: Sequence[str] = ()) -> None:
    done = subprocess.run([*prefix, *command.split()], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{command}: {reason or signal.strsignal(-done.returncode)}")
