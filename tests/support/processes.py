"""Commands in processes of their own, as a user runs them, and free ports for servers."""

import os
import socket
import subprocess
import sys


def run_command(*arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Runs `python -m ...`; returns its output as text."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )


def free_ports(count: int) -> list[int]:
    """Loopback ports that are not in use at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
