"""Listen on an address and serve an application until a signal ends it."""

from __future__ import annotations

import signal
import socket
import sys
import webbrowser

import uvicorn
from starlette.applications import Starlette

from afd.errors import ConfigError
from afd.live import protocol
from afd.live.security import Guard

PORT = 8742


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--host, --port: cannot listen on {host} port {port} ({reason}); needed: an address "
            "of this machine and a free port"
        ) from error


def serve(
    app: Starlette, listening: socket.socket, rules: Guard, public: str | None, show: bool
) -> None:
    """Print the URL and serve until SIGINT, SIGTERM or SIGHUP."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            # It would hold the token.
            access_log=False,
            server_header=False,
            ws_max_size=protocol.MAX_PICTURE_BYTES + 1024,
            # Pictures do not become smaller, and small messages need no bomb.
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=3,
            lifespan="on",
        )
    )
    url = address(listening, rules, public)
    print(f"afd live: {url}  (Ctrl-C ends it)", flush=True)
    if show:
        webbrowser.open(url)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has ended in order and passes the signal on
        print("afd live: stopped", file=sys.stderr)


def address(listening: socket.socket, rules: Guard, public: str | None) -> str:
    """The URL of the page."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    site = public or f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return f"{site.rstrip('/')}/" + (f"?token={rules.token}" if rules.token else "")
