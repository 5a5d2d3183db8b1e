"""Hosts in network namespaces, joined by links of a given rate (veth, tc).

    this process, in a network namespace of its own
      bridge ── link1 ══ eth0 in the namespace of host 1, 10.77.0.1
             └─ link2 ══ eth0 in the namespace of host 2, 10.77.0.2

The namespaces have no names. Only processes hold them, and these receive SIGKILL when
this process ends; the kernel then removes the bridge and the links. So nothing remains
even after a SIGKILL, and no other interface of the machine can be reached.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
# Environment variable with the namespace that `reexec_in_namespace` was called in.
PARENT_NAMESPACE = "LOCALSGD_SLOW_LINK_PARENT_NAMESPACE"
KILL_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


def missing_requirements() -> str | None:
    """Returns a missing requirement of network namespaces; None if there is none."""
    if not sys.platform.startswith("linux"):
        return f"Linux network namespaces are needed, this is {sys.platform}"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "creating network namespaces requires root"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return probe.stderr.strip() or None


def in_namespace() -> bool:
    """Returns whether `reexec_in_namespace` started this process."""
    current = _current_namespace()
    return os.environ.get(PARENT_NAMESPACE, current) != current


def reexec_in_namespace(command: Sequence[str]) -> None:
    """Replaces this process by a command in a new network namespace.

    Returns without effect if this process is in such a namespace.
    """
    if in_namespace():
        return
    os.environ[PARENT_NAMESPACE] = _current_namespace()
    os.execvp("unshare", ["unshare", "--net", "--mount", *command])


def host_address(host: int) -> str:
    """Returns the IP address of a host."""
    return f"10.77.0.{host + 1}"


class Network:
    """Context manager of hosts 0, …, n − 1 on one bridge.

    Attributes:
      coordinator: address of host 0.
      interface: network interface of every host.
      num_hosts: n.
    """

    coordinator, interface = host_address(0), "eth0"

    def __init__(self, num_hosts: int) -> None:
        """Checks that this process is in a network namespace of its own."""
        if not in_namespace():
            raise RuntimeError(
                "Network(num_hosts): must be created in a network namespace of its "
                "own; call reexec_in_namespace(command) first"
            )
        self.num_hosts = num_hosts
        self._host_processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Network":
        """Creates the bridge, the hosts and their links."""
        _run("ip link set lo up")
        _run("ip link add bridge type bridge")
        _run("ip link set bridge up")
        with tempfile.NamedTemporaryFile("w", suffix=".hosts") as hosts_file:
            hosts_file.write("127.0.0.1 localhost\n")
            hosts_file.writelines(
                f"{host_address(k)} host{k}\n" for k in range(self.num_hosts)
            )
            hosts_file.flush()
            for host in range(self.num_hosts):
                self._add_host(host, hosts_file.name)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the hosts and removes the bridge."""
        for process in self._host_processes:
            process.kill()
            process.wait()
        _run("ip link delete bridge")

    def throttle(self, mbit: float | None) -> None:
        """Limits the rate of each host in both directions.

        Args:
          mbit: 10⁶ bits per second; None for no limit.
        """
        for host in range(self.num_hosts):
            _set_rate_limit((), f"link{host}", mbit)
            _set_rate_limit(self._enter_host(host), "eth0", mbit)

    def start(self, host: int, command: Sequence[str], **popen) -> subprocess.Popen:
        """Starts a program on a host."""
        return subprocess.Popen(
            [*KILL_WITH_PARENT, *self._enter_host(host), *command], **popen
        )

    def _enter_host(self, host: int) -> tuple[str, ...]:
        """Returns the command prefix that runs a program on a host."""
        pid = str(self._host_processes[host].pid)
        # nsenter starts in the root directory of the mount namespace.
        workdir = f"--wd={os.getcwd()}"
        return ("nsenter", "--target", pid, "--net", "--uts", "--mount", workdir)

    def _add_host(self, host: int, hosts_file: str) -> None:
        """Creates a host with its own hostname, /etc/hosts and link."""
        script = (
            f"hostname host{host} && mount --bind {hosts_file} /etc/hosts"
            " && echo ready && exec sleep infinity"
        )
        process = subprocess.Popen(
            [*KILL_WITH_PARENT, "unshare", "--net", "--uts", "--mount"]
            + ["sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._host_processes.append(process)
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(
                f"Network(num_hosts): could not create the namespaces of host {host}"
            )
        link, on_host = f"link{host}", self._enter_host(host)
        _run(f"ip link add {link} type veth peer name eth0 netns {process.pid}")
        _run(f"ip link set {link} master bridge up")
        _run(f"ip addr add {host_address(host)}/24 dev eth0", on_host)
        _run("ip link set eth0 up", on_host)
        _run("ip link set lo up", on_host)


def _current_namespace() -> str:
    """Returns the identifier of the network namespace of this process."""
    return os.readlink("/proc/self/ns/net")


def _set_rate_limit(prefix: Sequence[str], device: str, mbit: float | None) -> None:
    """Replaces the token bucket of a device; None removes it."""
    # The deletion fails if there is no token bucket yet.
    subprocess.run(
        [*prefix, "tc", "qdisc", "delete", "dev", device, "root"], capture_output=True
    )
    if mbit is not None:
        # In KiB: 8 ms at the rate of the link, but at least one large packet.
        burst = max(32, round(mbit))
        _run(
            f"tc qdisc add dev {device} root tbf rate {mbit}mbit burst {burst}kb "
            "latency 100ms",
            prefix,
        )


def _run(command: str, prefix: Sequence[str] = ()) -> None:
    """Runs a command and raises a RuntimeError with its output if it fails."""
    done = subprocess.run([*prefix, *command.split()], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{command}: {reason or signal.strsignal(-done.returncode)}")
