"""Who may open the page and the socket: Host, Origin and token of every request."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_BYTES = 24


@dataclass(frozen=True)
class Guard:
    """The rules of one server.

    Attributes:
        hosts: names under which it may be addressed, in lower case.
        literals: whether any IP address may, as where it listens on all of them. A page elsewhere
            whose name is made to resolve to this machine has a name, not an address.
        token: needed in the URL; None: none is, as on loopback.
    """

    hosts: frozenset[str]
    literals: bool = False
    token: str | None = None

    def refusal(self, request: HTTPConnection) -> str | None:
        """Why a request is refused, or None."""
        host = request.headers.getlist("host")
        name = _name(host[0]) if len(host) == 1 else None
        if name is None or not (name in self.hosts or (self.literals and _literal(name))):
            return "Host is not this server's; open it as it was printed, or start with --public"
        origins = request.headers.getlist("origin")
        # Programs send none; a browser always does for a socket.
        if origins and (len(origins) > 1 or not _same(origins[0], host[0])):
            return "Origin is another site"
        if self.token is not None:
            given = request.query_params.get("token", "")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return "token is missing or wrong; open the URL that afd live has printed"
        return None


def guard(host: str, public: str | None) -> Guard:
    """The rules of a server on `host`, reached also through the URL `public` (of a proxy)."""
    names = set(LOOPBACK)
    open_host = host.lower() not in LOOPBACK
    if open_host:
        names |= {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
    if public is not None:
        names.add((urlsplit(public).hostname or "").lower())
    # A proxy makes even a loopback server reachable from elsewhere.
    token = secrets.token_urlsafe(TOKEN_BYTES) if open_host or public is not None else None
    wildcard = host in ("0.0.0.0", "::")
    return Guard(frozenset(names - {""}), wildcard, token)


def headers(nonce: str, host: str) -> dict[str, str]:
    """The headers of a page with inline style and script of this nonce."""
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        f"img-src data: blob:; media-src data: blob:; "
        f"connect-src 'self' ws://{host} wss://{host}; frame-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Frame-Options": "DENY"} | ALWAYS


# Of every answer; the URL holds the token, so it is sent to nobody.
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def _name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is not one."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if parts.netloc != host or parts.username is not None or parts.path or parts.query:
        return None
    return parts.hostname


def _literal(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same(origin: str, host: str) -> bool:
    """Whether an Origin is the site that the Host header names."""
    scheme, separator, site = origin.lower().partition("://")
    if not separator or scheme not in ("http", "https"):
        return False
    port = ":443" if scheme == "https" else ":80"
    return site.removesuffix(port) == host.lower().removesuffix(port)
