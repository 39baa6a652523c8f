"""Good clients of trainer.serve beside those that attack it; measures answers, latencies and memory.

    python -m tests.support.soak 600

starts a server with a tiny model and 1,024 file descriptors, and runs for so many seconds. tests/commands/test_serve.py runs
the same for half a minute.
"""

import base64
import collections
import contextlib
import dataclasses
import functools
import gzip
import http.client
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import requests

from tests.support import slow_images, tiny_model
from tests.support.server import Server

DECODE_TIMEOUT_SECS = 1
SERVER_FLAGS = ("--port={port}", f"--decode_timeout_secs={DECODE_TIMEOUT_SECS}")
NUM_SILENT_CONNECTIONS = 1100
NUM_SLOW_BODIES = 20


@dataclasses.dataclass
class SoakResult:
    """What the clients saw."""

    good_secs: list[float] = dataclasses.field(default_factory=list)  # of each good request
    health_secs: list[float] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(
        default_factory=list
    )  # good requests and health checks without a right answer
    memory_mib: list[float] = dataclasses.field(default_factory=list)  # of the server and its processes, every second
    attacks: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    log_bytes: int = 0
    cpu_wait: float = (
        0.0  # part of the time that the server's event loop could run but had no CPU: other work on the machine
    )

    def memory_growth_mib(self) -> float:
        """Median of the last fifth minus that of the second fifth; the first one fills caches."""
        fifth = len(self.memory_mib) // 5
        return float(np.median(self.memory_mib[-fifth:]) - np.median(self.memory_mib[fifth : 2 * fifth]))

    def summary(self) -> str:
        """The figures, for a person."""
        lines = []
        for name, seconds in [("good requests", self.good_secs), ("health checks", self.health_secs)]:
            median, p99 = np.percentile(seconds, [50, 99])
            lines.append(f"{len(seconds)} {name}: median {median:.3f} s, p99 {p99:.3f} s, worst {max(seconds):.3f} s")
        lines.append(f"the event loop waited for a CPU {self.cpu_wait:.0%} of the time")
        lines.append(f"{len(self.failures)} failures {self.failures[:5]}")
        memory = self.memory_mib
        lines.append(
            f"memory: {memory[0]:.0f} MiB at first, peak {max(memory):.0f}, {self.memory_growth_mib():+.0f} in the end"
        )
        lines.append(f"log: {self.log_bytes} bytes; attacks: {dict(sorted(self.attacks.items()))}")
        return "\n".join(lines)


def run(server: Server, secs: float) -> SoakResult:
    """Runs all clients against a server that is ready. The attackers have a process of their own."""
    result = SoakResult()
    stop = time.monotonic() + secs
    waited_secs = _cpu_wait_secs(server)
    context = multiprocessing.get_context("spawn")
    statuses = context.Queue()
    attackers = context.Process(target=_attack, args=(server.port, secs, statuses))
    attackers.start()
    checks = [_measure_memory, _check_health, *[_send_good_requests] * 3]
    threads = [threading.Thread(target=check, args=(server, stop, result)) for check in checks]
    for thread in threads:
        thread.start()
    result.attacks.update(statuses.get())
    for thread in threads:
        thread.join()
    attackers.join()
    result.cpu_wait = (_cpu_wait_secs(server) - waited_secs) / secs
    result.log_bytes = len(server.log().encode())
    return result


def _cpu_wait_secs(server: Server) -> float:
    """How long the main thread was in the queue of the scheduler (Documentation/scheduler/sched-stats.rst of Linux)."""
    pid = server.process.pid
    return int(pathlib.Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


def _measure_memory(server: Server, stop: float, result: SoakResult) -> None:
    main = psutil.Process(server.process.pid)
    while time.monotonic() < stop:
        num_bytes = 0
        for process in [main, *main.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a decoder that was killed
                num_bytes += process.memory_full_info().pss
        result.memory_mib.append(num_bytes / 2**20)
        time.sleep(1)


def _check_health(server: Server, stop: float, result: SoakResult) -> None:
    while time.monotonic() < stop:
        _timed(lambda: str(server.request("GET", "/health").status), "200", result.health_secs, result)
        time.sleep(0.1)


def _send_good_requests(server: Server, stop: float, result: SoakResult) -> None:
    """As JSON, as a file, as a form, over new connections and over one that is kept."""
    url = f"http://127.0.0.1:{server.port}/predict"
    session = requests.Session()
    for index in itertools.cycle(range(3)):
        if time.monotonic() >= stop:
            return
        image, label = tiny_model.make_image(index, height=480, width=640), tiny_model.CLASS_NAMES[index]
        text = base64.b64encode(image).decode()
        ways = [
            functools.partial(session.post, url, json={"instances": [{"b64": text}]}, timeout=60),
            functools.partial(session.post, url, data=image, headers={"Content-Type": "image/jpeg"}, timeout=60),
            functools.partial(requests.post, url, files={"image": image}, timeout=60),
        ]
        for send in ways:
            _timed(functools.partial(_label, send), label, result.good_secs, result)
            time.sleep(0.05)


def _label(send: Callable[[], requests.Response]) -> str:
    response = send()
    value = response.json()
    return value["predictions"][0]["label"] if response.status_code == 200 else f"{response.status_code}: {value}"


def _timed(send: Callable[[], str], expected: str, seconds: list[float], result: SoakResult) -> None:
    started = time.monotonic()
    try:
        answer = send()
    except Exception as error:  # whatever it is, the client had no answer
        answer = repr(error)
    seconds.append(time.monotonic() - started)
    if answer != expected:
        result.failures.append(f"{answer} after {seconds[-1]:.1f} s, not {expected}")


def _attack(port: int, secs: float, statuses: multiprocessing.Queue) -> None:
    """All attackers, each in a thread; `statuses` receives how often each got which status."""
    os.nice(10)  # attackers have computers of their own: they take no CPU time from the server
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    stop = time.monotonic() + secs
    counts: collections.Counter[str] = collections.Counter()
    nested_lists = b'{"instances":[' + b"[]," * (10 * 2**20) + b"[]]}"  # 31 MB
    gzip_bomb = gzip.compress(bytes(200 * 2**20), 1)
    origin = {"Origin": "https://attacker.example"}
    attacks = [
        ("slow image", slow_images.large_png(), {"Content-Type": "image/jpeg"}, 1.0),
        ("scan bomb", slow_images.many_scans(22000), {"Content-Type": "image/jpeg"}, 1.0),
        ("origin", b"{}", {"Content-Type": "text/plain", **origin}, 0.1),
        ("host", b"{}", {"Host": "attacker.example"}, 0.1),
        ("text/plain", b"{}", {"Content-Type": "text/plain"}, 0.1),
        ("gzip bomb", gzip_bomb, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, 1.0),
        *[("nested lists", nested_lists, {"Content-Type": "application/json"}, 5.0)] * 6,
    ]

    def repeat(name: str, body: bytes, headers: dict, pause_secs: float) -> None:
        while time.monotonic() < stop:
            counts[f"{name}: {_status(port, body, headers)}"] += 1
            time.sleep(pause_secs)

    threads = [threading.Thread(target=repeat, args=attack) for attack in attacks]
    threads.append(threading.Thread(target=_hold_connections, args=(port, stop, counts)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses.put(counts)


def _status(port: int, body: bytes, headers: dict) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/predict", body, headers)
        response = connection.getresponse()
        value = json.loads(response.read())
        return f"{response.status}{' error' if 'error' in str(value.get('predictions')) else ''}"
    except OSError as error:
        return type(error).__name__
    finally:
        connection.close()


def _hold_connections(port: int, stop: float, counts: collections.Counter) -> None:
    """Keeps connections open that send nothing, a header byte by byte, or a body byte by byte."""
    starts = [b"", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX: "]
    body = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: 9999\r\n\r\n"
    kinds = [body] * NUM_SLOW_BODIES + [random.choice(starts) for _ in range(NUM_SILENT_CONNECTIONS)]
    connections: list[socket.socket | None] = [None] * len(kinds)
    while time.monotonic() < stop:
        for index, start in enumerate(kinds):
            connection = connections[index]
            try:
                if connection is None:
                    connections[index] = connection = socket.create_connection(("127.0.0.1", port), timeout=10)
                    connection.sendall(start)
                    connection.setblocking(False)
                    counts["held connections: opened"] += 1
                elif start:
                    connection.send(b"x")
                with contextlib.suppress(BlockingIOError):
                    if not connection.recv(1000):
                        raise ConnectionResetError
            except OSError:  # the server has closed it
                counts["held connections: closed"] += 1
                if connection:
                    connection.close()
                connections[index] = None
        time.sleep(1)
    for connection in connections:
        if connection:
            connection.close()


def main(secs: float) -> int:
    """Returns 1 if a good client had no right answer."""
    with tempfile.TemporaryDirectory() as directory:
        model_dir = tiny_model.save(pathlib.Path(directory) / "saved_model")
        server = Server(f"--model_dir={model_dir}", *SERVER_FLAGS, max_descriptors=1024)
        try:
            server.wait_until_ready()
            result = run(server, secs)
        finally:
            server.kill()
    print(result.summary())
    return bool(result.failures)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
