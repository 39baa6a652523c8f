"""Requests that a web page can make a browser send are refused, those of clients are not."""

import asyncio
import json

import pytest

from trainer.serving.access import AccessControl


def status(headers: dict[str, str], *, allowed_hosts: tuple = (), allowed_origins: tuple = ()) -> int:
    """The status of a request with these headers; 200 if it reaches the application."""
    sent = []

    async def application(scope, receive, send) -> None:
        sent.append({"status": 200})

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    control = AccessControl(application, allowed_hosts=allowed_hosts, allowed_origins=allowed_origins)
    asyncio.run(control(scope, None, send))
    if sent[0]["status"] == 403:
        assert "start the server with --allowed_" in json.loads(sent[1]["body"])["error"]
    return sent[0]["status"]


@pytest.mark.parametrize("host", [
    "127.0.0.1:8080", "localhost:8080", "localhost", "LOCALHOST.", "[::1]:8080", "10.4.0.17:8080", "a.localhost",
    "classifier", "classifier.default.svc", "classifier.default.svc.cluster.local:80", "host.docker.internal",
])  # fmt: skip
def test_addresses_and_local_names_are_allowed(host):
    assert status({"host": host}) == 200


@pytest.mark.parametrize("host", [
    "attacker.example.com:8080", "attacker.com", "127.0.0.1.attacker.com", "127.0.0.1.nip.io", "localhost.attacker.com",
    "evil.localhost.com", "1.2.3", "[::1", ":8080", "local.", "127.0.0.1@attacker.com", "attacker.com#.local", "svc.com",
])  # fmt: skip
def test_public_domains_are_refused_unless_they_are_allowed(host):
    expected = 200 if host == "local." else 403  # a name without a dot, as the resolver reads it
    assert status({"host": host}) == expected
    assert status({"host": host}, allowed_hosts=("*",)) == 200


def test_an_allowed_host_is_compared_without_case_and_port():
    assert status({"host": "Example.COM:443"}, allowed_hosts=("example.com",)) == 200
    assert status({"host": "www.example.com"}, allowed_hosts=("example.com",)) == 403


@pytest.mark.parametrize(("host", "origin", "expected"), [
    ("localhost:8080", "http://localhost:8080", 200),
    ("localhost:8080", "http://localhost:3000", 403),
    ("localhost:8080", "http://127.0.0.1:8080", 403),
    ("localhost:8080", "https://attacker.com", 403),
    ("localhost:8080", "null", 403),
    ("localhost:8080", "", 403),
    ("localhost:8080", "http://[", 403),
    ("classifier", "https://classifier", 200),  # a proxy adds TLS
    ("localhost:8080", "https://allowed.example.com", 200),
])  # fmt: skip
def test_only_the_pages_of_this_server_and_allowed_origins_may_use_it(host, origin, expected):
    assert status({"host": host, "origin": origin}, allowed_origins=("https://allowed.example.com",)) == expected
    assert status({"host": host, "origin": origin}, allowed_origins=("*",)) == 200


def test_a_request_without_a_host_is_not_from_a_browser():
    assert status({}) == 200
