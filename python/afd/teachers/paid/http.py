"""Restricted HTTP client for teachers: limits hosts, use of the API key and response sizes.

Every exchange ends in a Reply, a Saved file or a Failure. A Failure carries neither the exception
that caused it nor its frames, because those of the HTTP client hold request headers.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Generator, Iterable
from contextvars import ContextVar
from http.cookiejar import CookieJar
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from afd.errors import TeacherError
from afd.teachers.paid.answers import Failure, Kind, Reply, plain, receive, shown
from afd.teachers.paid.config import FetchConfig
from afd.teachers.paid.contents import Saved, writing
from afd.teachers.paid.network import Forbidden, Transport, is_public
from afd.teachers.paid.secret import Secret

REDIRECTS = 5
JSON_BYTES = 8 * 2**20
_T = TypeVar("_T")
_log = logging.getLogger("afd")
_exchanging: ContextVar[bool] = ContextVar("exchanging", default=False)


def _quiet(_: logging.LogRecord) -> bool:
    """Suppress the HTTP client's log, which contains signed URLs and response headers."""
    return not _exchanging.get()


for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_quiet)


class _NoCookies(CookieJar):
    """A cookie jar that stores nothing, so that no cookie is ever sent."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        pass

    def set_cookie(self, cookie: Any) -> None:
        pass


class Http:
    """The HTTP client of one teacher, its only network access. Use as an async context manager."""

    def __init__(
        self,
        base_url: str,
        trusted: Iterable[str],
        secret: Secret,
        scheme: str,
        config: FetchConfig,
    ) -> None:
        """`trusted`: URLs whose origin (scheme, host, port) is sent `scheme` and the secret as the
        Authorization header; no other origin ever is."""
        self.base_url = base_url
        self._secret, self._config = secret, config
        self._auth = _Auth(secret, scheme, {_origin(httpx.URL(root)) for root in trusted})
        self._client = httpx.AsyncClient(
            transport=Transport(config.private_hosts),
            cookies=_NoCookies(),
            timeout=httpx.Timeout(config.request_s),
            headers={"User-Agent": "afd", "Accept-Encoding": "identity"},
            # Proxies from the environment would determine which host is contacted.
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
        """Whether a request to this URL would carry the key."""
        try:
            return _origin(httpx.URL(url)) in self._auth.origins
        except (httpx.InvalidURL, ValueError, TypeError):
            return False

    def plain(self, value: Any) -> Any:
        """Sanitise a value of ours like a response, for comparison."""
        return plain(value, self._secret)

    def words(self, text: str) -> str:
        """Prepare external text for display: without the key, on one line, truncated."""
        return shown(text, self._secret)

    async def call(self, method: str, url: str, **content: Any) -> Reply:
        """Make an API call; a `url` with a leading / is relative to base_url. Redirects are not
        followed.

        `content`: json, params, files, headers as in httpx. Every HTTP status gives a Reply; raises
        Failure only if there was no complete response.
        """
        successes: list[int] = []
        try:
            exchange = self._call(method, url, content, successes)
            return await self._bounded(exchange, self._config.request_s)
        except Failure as failure:
            # Truncated, too large or encoded, but it was a response nonetheless.
            failure.received = bool(successes)
            raise

    async def save(self, url: str, path: Path, max_bytes: int) -> Saved:
        """Download to `path` (overwritten), following checked redirects; flushed to disk.

        Failure.gone: the URL was refused (401, 403, 404, 410); a fresh one may work.
        """
        return await self._bounded(self._save(url, path, max_bytes), self._config.download_s)

    async def _call(
        self, method: str, url: str, content: dict[str, Any], successes: list[int]
    ) -> Reply:
        """`successes` receives the status of a success response once its headers have arrived."""
        target = self._checked(self.base_url + url if url.startswith("/") else url)
        request = self._client.build_request(method, target, **content)
        response = await self._client.send(
            request, stream=True, auth=self._auth, follow_redirects=False
        )
        if response.is_success:
            successes.append(response.status_code)
        body = bytearray()
        try:
            _refuse_encoded(response)
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > JSON_BYTES:
                    raise Failure(Kind.RETRYABLE, f"the answer exceeds {JSON_BYTES} bytes")
        finally:
            await response.aclose()
        # Large responses take a second, during which other exchanges continue.
        return await asyncio.to_thread(
            receive, response.status_code, response.headers, bytes(body), self._secret
        )

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
        raise Failure(Kind.INVALID, f"{self.words(place(target))}: more than {REDIRECTS} redirects")

    async def _write(self, response: httpx.Response, path: Path, max_bytes: int) -> Saved:
        where, status = self.words(place(response.url)), response.status_code
        if status != 200:
            gone = status in (401, 403, 404, 410)
            throttled = status == 429
            raise Failure(Kind.RETRYABLE, f"{where}: HTTP {status}", gone=gone, throttled=throttled)
        _refuse_encoded(response)
        too_large = Failure(Kind.INVALID, f"{where}: the file exceeds {max_bytes} bytes")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > max_bytes:
            raise too_large
        digest, size = hashlib.sha256(), 0
        with writing(path.parent), path.open("wb") as file:
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
        """Parse a URL. Raises Failure unless its scheme is allowed and it has a host."""
        try:
            target = httpx.URL(url)
            where = self.words(place(target))
        except (httpx.InvalidURL, ValueError, TypeError):
            raise Failure(Kind.INVALID, "an invalid URL", certain=True) from None
        if target.scheme not in self._config.schemes or not target.host:
            allowed = ", ".join(self._config.schemes)
            raise Failure(
                Kind.INVALID,
                f"{where}: the scheme {self.words(target.scheme)!r} is not allowed "
                f"(teacher.fetch.schemes: {allowed})",
                certain=True,
            )
        return target.copy_with(userinfo=b"")

    async def _bounded(self, exchange: Awaitable[_T], seconds: float) -> _T:
        """Run an exchange with a timeout, converting client errors to Failures without frames."""
        _exchanging.set(True)
        failure: Failure | TeacherError
        try:
            return await asyncio.wait_for(exchange, seconds)
        except Failure as error:
            failure = Failure(**vars(error))
        except TeacherError as error:
            failure = TeacherError(str(error))
        except asyncio.TimeoutError:
            failure = Failure(Kind.RETRYABLE, f"no complete answer within {seconds:g} s")
        except Exception as error:
            # An error of the client, or an unforeseen response.
            failure = self._failure(error)
            if not isinstance(error, httpx.HTTPError | httpx.StreamError | OSError | ValueError):
                _log.error("unexpected in an exchange: %s", failure.reason)
        finally:
            _exchanging.set(False)
        # Outside the handlers, so that neither cause nor context references the client's frames.
        raise failure

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error.__cause__, Forbidden):
            return Failure(Kind.INVALID, self.words(str(error.__cause__)), certain=True)
        unsent = (
            httpx.ConnectError,
            httpx.ConnectTimeout,
            httpx.PoolTimeout,
            httpx.UnsupportedProtocol,
            httpx.LocalProtocolError,
        )
        words = self.words(str(error))
        reason = f"{type(error).__name__}: {words}" if words else type(error).__name__
        return Failure(Kind.RETRYABLE, reason, certain=isinstance(error, unsent))


def _refuse_encoded(response: httpx.Response) -> None:
    """Refuse any content encoding but identity before decoding: none was requested, and a small
    compressed body may expand to a very large one."""
    named = ",".join(response.headers.get_list("content-encoding"))
    if {name.strip().lower() for name in named.split(",")} - {"", "identity"}:
        raise Failure(Kind.RETRYABLE, "an answer in an encoding that was not requested")


def place(url: httpx.URL | str) -> str:
    """A URL for display, without user, query and fragment, which may contain signatures."""
    url = httpx.URL(url)
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{url.host}{port}{url.path}"


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    default = {"https": 443, "http": 80}.get(url.scheme)
    return url.scheme, url.host, url.port or default


class _Auth(httpx.Auth):
    """Adds the API key to requests to trusted origins."""

    def __init__(
        self, secret: Secret, scheme: str, origins: set[tuple[str, str, int | None]]
    ) -> None:
        self.origins = origins
        self._secret, self._scheme = secret, scheme

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if _origin(request.url) in self.origins:
            request.headers["Authorization"] = f"{self._scheme} {self._secret.reveal()}"
        yield request


__all__ = ["Http", "Saved", "Secret", "is_public", "place"]
