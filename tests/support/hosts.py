"""Hosts on this machine: network namespaces with addresses of their own, whose names a file of hosts resolves.

Requires root and ip (iproute2).
"""

import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

_NAMESPACE_FILES = pathlib.Path("/etc/netns")  # `ip netns exec NAME` mounts the files below NAME over those in /etc


def reason_against() -> str:
    """Why this machine cannot have such hosts, '' if it can."""
    if not shutil.which("ip"):
        return "ip (iproute2) is not installed"
    name = f"try-{os.getpid()}"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if added.returncode:
        return f"network namespaces are not allowed here: {added.stderr.strip()}"
    _run("netns", "delete", name)
    return ""


class Hosts:
    """Two hosts on one network, called by `names`. A host that moves gets an address that no host had before."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._namespaces = [f"host-{os.getpid()}-{index}" for index in range(2)]
        self._addresses = ["", ""]
        self._num_addresses = 0

    def __enter__(self) -> "Hosts":
        for namespace in self._namespaces:
            _run("netns", "add", namespace)
            (_NAMESPACE_FILES / namespace).mkdir(parents=True)
        one, other = self._namespaces
        _run("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other)
        for index, namespace in enumerate(self._namespaces):
            for device in ("lo", "eth0"):
                _run("-n", namespace, "link", "set", device, "up")
            self.move(index)
        return self

    def __exit__(self, *error: object) -> None:
        for namespace in self._namespaces:
            _run("netns", "delete", namespace)
            shutil.rmtree(_NAMESPACE_FILES / namespace)

    def move(self, index: int) -> None:
        """Gives a host another address, and its name to that; the old address is gone."""
        self._num_addresses += 1
        self._addresses[index] = f"10.213.0.{self._num_addresses}"
        namespace = self._namespaces[index]
        _run("-n", namespace, "address", "flush", "dev", "eth0")
        _run("-n", namespace, "address", "add", f"{self._addresses[index]}/24", "dev", "eth0")
        known = "".join(
            f"{address} {name}\n" for address, name in zip(self._addresses, self.names, strict=True) if address
        )
        for one in self._namespaces:
            (_NAMESPACE_FILES / one / "hosts").write_text(f"127.0.0.1 localhost\n{known}")

    def command(self, index: int) -> list[str]:
        """What to write before a command, so that it runs on that host."""
        return ["ip", "netns", "exec", self._namespaces[index]]


def _run(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
