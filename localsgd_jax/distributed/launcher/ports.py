"""Selection of free TCP ports."""

import random
import socket

# Below the ephemeral range from which the kernel assigns ports to connections.
PORT_RANGE = range(20000, 32768)


def free_port() -> int:
    """Returns an unused TCP port of this machine.

    Returns:
      A random port of `PORT_RANGE`.
    """
    while True:
        port = random.SystemRandom().choice(PORT_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
