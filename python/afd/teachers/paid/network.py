"""Network connections for teachers, restricted to checked, public IP addresses."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx


class Transport(httpx.AsyncHTTPTransport):
    """httpx transport whose connections verify the IP address that they connect to."""

    def __init__(self, private_hosts: Iterable[str]) -> None:
        context = certificates()
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=64,
            # The server may close a connection idle for longer just as a submit is written to it.
            keepalive_expiry=2.0,
            network_backend=_Guard(private_hosts),
        )


@functools.cache
def certificates() -> ssl.SSLContext:
    """The SSL context with root certificates, cached because loading takes a tenth of a second."""
    return httpx.create_ssl_context(trust_env=False)


class Forbidden(httpcore.ConnectError):
    """The address must not be contacted."""


class _Guard(httpcore.AsyncNetworkBackend):
    """Resolves names and connects to the address that was checked, so that a second DNS lookup
    cannot return another one (DNS rebinding)."""

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
                raise Forbidden(
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
        raise Forbidden("unix sockets are not allowed")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


def is_public(address: str) -> bool:
    """Whether an IP address is publicly routable, including IPv4 addresses embedded in IPv6."""
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
