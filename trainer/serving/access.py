"""Refuses requests that a web page makes the browser of a user send: a foreign Host or Origin.

A server on the loopback address has no login and is reachable from every page that its user opens. A page can send
requests to it without reading the answers, and can read these too if its domain resolves to the loopback address (DNS
rebinding). The Host of such a request is a domain that somebody registered; its Origin is that of the page.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from absl import logging
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

# Nobody can register a public domain below these, so they resolve to what the local network says: RFC 6761 (localhost,
# test), RFC 6762 (local), RFC 8375 (home.arpa), ICANN's resolution 2024.07.29.06 (internal). Kubernetes names a service
# `name`, `name.namespace.svc` or `name.namespace.svc.cluster.local`; no top-level domain is called svc.
PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".test", ".svc")

ANY = "*"


class AccessControl:
    """ASGI middleware that answers 403 to a Host or an Origin that is not allowed, whatever the method and the path.

    Always allowed as Host: addresses, names without a dot, and names below PRIVATE_SUFFIXES; these cannot be the domain of
    an attacker. Starlette's TrustedHostMiddleware has no such rule, and a probe of Kubernetes sends the address of the pod.
    Always allowed as Origin: that of this server itself.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: Collection[str], allowed_origins: Collection[str]):
        self._app = app
        self._allowed_hosts = {host.lower() for host in allowed_hosts}
        self._allowed_origins = set(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes an allowed request on."""
        reason = self._rejection_reason(Headers(scope=scope)) if scope["type"] == "http" else ""
        if reason:
            logging.info("403: %s", reason)
            await JSONResponse({"error": reason}, 403)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _rejection_reason(self, headers: Headers) -> str:
        host = headers.get("host", "")
        if not self._is_allowed_host(host):
            return f"The Host {host!r} is not allowed: start the server with --allowed_hosts={_name_of(host) or ANY}."
        origin = headers.get("origin")
        if origin is None or self._allowed_origins & {origin, ANY} or _address(origin) == _address(f"//{host}"):
            return ""
        return f"The Origin {origin!r} is not allowed: start the server with --allowed_origins={origin}."

    def _is_allowed_host(self, host: str) -> bool:
        name = _name_of(host)
        if self._allowed_hosts & {name, ANY} or not host:  # HTTP/1.0 has no Host, and browsers do not speak it
            return True
        if not name:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return "." not in name or name.endswith(PRIVATE_SUFFIXES)
        return True


def _name_of(host: str) -> str:
    """The name or address in a Host header, in lower case, without the port; empty if there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _address(url: str) -> tuple[str, int | None] | None:
    """Host and port of a URL; the ports of http and https are the default and equal, since a proxy may add TLS."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "", None if parts.port in (80, 443) else parts.port)
    except ValueError:
        return None
