"""HTTP for teachers: who may be contacted, who may see the key, how much may come back.

Every exchange ends in a Reply, a Saved file or a Failure. A Failure carries neither the exception
that caused it nor its frames: those of the HTTP client hold request headers.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import ipaddress
import json
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Generator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import httpcore
import httpx

from afd.teachers.base import TeacherError
from afd.teachers.config import FetchConfig
from afd.teachers.provider import Failure, Kind, Reply

REDIRECTS = 5
JSON_BYTES = 8 * 2**20
HIDDEN = "[key]"
_T = TypeVar("_T")
_exchanging: ContextVar[bool] = ContextVar("exchanging", default=False)


def _quiet(_: logging.LogRecord) -> bool:
    """The client's own log holds signed addresses and whatever headers come back."""
    return not _exchanging.get()


for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_quiet)


class Secret:
    """An API key that does not show itself: no value in repr, str, pickle or copies."""

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name, self._value = name, value

    @classmethod
    def from_environment(cls, name: str) -> Secret:
        """The key in an environment variable (docs/ENVIRONMENT.md names them); TeacherError if
        there is none or it could not be a header."""
        value = os.environ.get(name, "").strip()
        if not value:
            raise TeacherError(f"no API key: set the environment variable {name}")
        if len(value) < 8 or not value.isascii() or not value.isprintable():
            raise TeacherError(
                f"the environment variable {name} holds no API key "
                "(it is shorter than 8 characters or has some that no key has)"
            )
        return cls(name, value)

    def reveal(self) -> str:
        """The key itself, for the one header it belongs to."""
        return self._value

    def hide(self, text: str) -> str:
        """The text without the key, in case someone sent it back."""
        return text.replace(self._value, HIDDEN)

    def hide_bytes(self, data: bytes) -> bytes:
        return data.replace(self._value.encode(), HIDDEN.encode())

    def __repr__(self) -> str:
        return f"Secret({self.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not written anywhere")


@dataclass(frozen=True)
class Saved:
    """A downloaded file."""

    sha256: str
    bytes: int


class Http:
    """The one door to the network of one teacher. Use as an async context manager."""

    def __init__(
        self,
        base_url: str,
        trusted: Iterable[str],
        secret: Secret,
        scheme: str,
        config: FetchConfig,
    ) -> None:
        """`trusted`: roots whose origin (scheme, host, port) gets `scheme` and the secret as its
        Authorization header; no other origin ever does."""
        self.base_url = base_url
        self.hide = secret.hide
        self._hide_bytes = secret.hide_bytes
        self._config = config
        self._auth = _Auth(secret, scheme, {_origin(httpx.URL(root)) for root in trusted})
        self._client = httpx.AsyncClient(
            transport=_Transport(config.private_hosts),
            timeout=httpx.Timeout(config.request_s),
            headers={"User-Agent": "afd", "Accept-Encoding": "identity"},
            # Proxies of the environment would decide who is contacted.
            trust_env=False,
        )

    async def __aenter__(self) -> Http:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    def trusts(self, url: str) -> bool:
        """Whether a request to this address would carry the key."""
        try:
            return _origin(httpx.URL(url)) in self._auth.origins
        except httpx.InvalidURL:
            return False

    async def call(self, method: str, url: str, **content: Any) -> Reply:
        """One API exchange; a `url` with a leading / is below base_url. Redirects are not followed.

        `content`: json, params, files, headers as httpx takes them. Every HTTP status gives a
        Reply; Failure only where there was no whole answer.
        """
        return await self._bounded(self._call(method, url, content), self._config.request_s)

    async def save(self, url: str, path: Path, max_bytes: int) -> Saved:
        """Download to `path` (replaced), following checked redirects; synced to the disk.

        Failure.gone: the address is refused (401, 403, 404, 410), a fresh one may work.
        """
        return await self._bounded(self._save(url, path, max_bytes), self._config.download_s)

    async def _call(self, method: str, url: str, content: dict[str, Any]) -> Reply:
        target = self._checked(self.base_url + url if url.startswith("/") else url)
        request = self._client.build_request(method, target, **content)
        response = await self._client.send(
            request, stream=True, auth=self._auth, follow_redirects=False
        )
        try:
            body = b""
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > JSON_BYTES:
                    raise Failure(Kind.RETRYABLE, f"the answer exceeds {JSON_BYTES} bytes")
        finally:
            await response.aclose()
        # Hidden before anything looks at it: a server may repeat the header it got.
        body = self._hide_bytes(body)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        headers = {name.lower(): self.hide(text) for name, text in response.headers.items()}
        return Reply(response.status_code, headers, value, body[:2000].decode("utf-8", "replace"))

    async def _save(self, url: str, path: Path, max_bytes: int) -> Saved:
        target = self._checked(url)
        for _ in range(REDIRECTS + 1):
            request = self._client.build_request("GET", target)
            response = await self._client.send(
                request, stream=True, auth=self._auth, follow_redirects=False
            )
            try:
                if response.has_redirect_location:
                    target = self._checked(str(target.join(response.headers["location"])))
                    continue
                return await self._write(response, path, max_bytes)
            finally:
                await response.aclose()
        raise Failure(Kind.INVALID, f"{place(target)}: more than {REDIRECTS} redirects")

    async def _write(self, response: httpx.Response, path: Path, max_bytes: int) -> Saved:
        where, status = place(response.url), response.status_code
        if status != 200:
            gone = status in (401, 403, 404, 410)
            throttled = status == 429
            raise Failure(Kind.RETRYABLE, f"{where}: HTTP {status}", gone=gone, throttled=throttled)
        too_large = Failure(Kind.INVALID, f"{where}: the file exceeds {max_bytes} bytes")
        if int(response.headers.get("content-length", 0)) > max_bytes:
            raise too_large
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if size == 0:
            raise Failure(Kind.RETRYABLE, f"{where}: HTTP 200 with an empty body")
        return Saved(digest.hexdigest(), size)

    def _checked(self, url: str) -> httpx.URL:
        """The address, if its scheme may be used and it names a host."""
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL:
            raise Failure(Kind.INVALID, "an address that is no URL", certain=True) from None
        if target.scheme not in self._config.schemes or not target.host:
            allowed = ", ".join(self._config.schemes)
            raise Failure(
                Kind.INVALID,
                f"{self.hide(place(target))}: the scheme {target.scheme!r} is not allowed "
                f"(teacher.fetch.schemes: {allowed})",
                certain=True,
            )
        return target.copy_with(userinfo=b"")

    async def _bounded(self, exchange: Awaitable[_T], seconds: float) -> _T:
        """The exchange within a time; every error of the client as a Failure without its frames."""
        _exchanging.set(True)
        try:
            return await asyncio.wait_for(exchange, seconds)
        except Failure as error:
            failure = Failure(**vars(error))
        except asyncio.TimeoutError:
            failure = Failure(Kind.RETRYABLE, f"no whole answer within {seconds:g} s")
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError) as error:
            failure = self._failure(error)
        finally:
            _exchanging.set(False)
        # Outside the handlers, so that neither cause nor context hangs on to the client's frames.
        raise failure

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error.__cause__, _Forbidden):
            return Failure(Kind.INVALID, str(error.__cause__), certain=True)
        unsent = (
            httpx.ConnectError,
            httpx.ConnectTimeout,
            httpx.PoolTimeout,
            httpx.UnsupportedProtocol,
            httpx.LocalProtocolError,
        )
        said = self.hide(str(error))[:200]
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        return Failure(Kind.RETRYABLE, reason, certain=isinstance(error, unsent))


def place(url: httpx.URL | str) -> str:
    """An address for people: without user, query and fragment, which may be signatures."""
    url = httpx.URL(url)
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{url.host}{port}{url.path}"


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    default = {"https": 443, "http": 80}.get(url.scheme)
    return url.scheme, url.host, url.port or default


class _Auth(httpx.Auth):
    """Adds the key where the origin is trusted."""

    def __init__(
        self, secret: Secret, scheme: str, origins: set[tuple[str, str, int | None]]
    ) -> None:
        self.origins = origins
        self._secret, self._scheme = secret, scheme

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if _origin(request.url) in self.origins:
            request.headers["Authorization"] = f"{self._scheme} {self._secret.reveal()}"
        yield request


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport over connections that look at the address they really go to."""

    def __init__(self, private_hosts: Iterable[str]) -> None:
        context = _certificates()
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=64,
            # A connection that idles longer may be closed as a submit is written to it.
            keepalive_expiry=2.0,
            network_backend=_Guard(private_hosts),
        )


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Reading them takes a tenth of a second."""
    return httpx.create_ssl_context(trust_env=False)


class _Forbidden(httpcore.ConnectError):
    """The address must not be contacted."""


class _Guard(httpcore.AsyncNetworkBackend):
    """Resolves names itself and connects to the address it has checked, so that no second look-up
    can give another one."""

    def __init__(self, private_hosts: Iterable[str]) -> None:
        self._private_hosts = {host.strip("[]").lower() for host in private_hosts}
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        name = host.strip("[]").lower()
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                name, port, type=socket.SOCK_STREAM
            )
        except OSError as error:
            raise httpcore.ConnectError(f"{name}: {error.strerror or error}") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if name not in self._private_hosts:
            private = [address for address in addresses if not is_public(address)]
            if private:
                raise _Forbidden(
                    f"{name} is the private address {private[0]}; "
                    "teacher.fetch.private_hosts names those that may be contacted"
                )
        last: Exception = httpcore.ConnectError(f"{name}: has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as refused:
                last = refused
        raise last

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise _Forbidden("a unix socket is no teacher")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where IPv6 wraps an IPv4 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner: list[ipaddress.IPv4Address | None] = [ip.ipv4_mapped, ip.sixtofour]
        inner += ip.teredo or []
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(one is not None and not is_public(str(one)) for one in inner):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast
