"""Servers of `afd live` for the tests: in a thread or under Starlette's client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.testclient import TestClient, WebSocketTestSession

from afd.config.run import make_config
from afd.lab.student import ToyStudent
from afd.live import protocol
from afd.live.config import LAPTOP, LiveConfig
from afd.live.run import make_app
from afd.live.security import Guard, guard

LOCAL = Guard(frozenset({"testserver"}))


def configuration(out: Path, **changes: Any) -> LiveConfig:
    """The shipped student's, writing to a folder."""
    return make_config({**LAPTOP, "out": str(out), "threads": 1, **changes}, (), "x", LiveConfig)


def other_student(folder: Path) -> str:
    """A checkpoint whose videos differ from those of the shipped student."""
    folder.mkdir(parents=True, exist_ok=True)
    student = ToyStudent.load("base")
    student.net.head.head.weight.data *= 0.8
    path = folder / "other.safetensors"
    student.save(path)
    return str(path)


@contextmanager
def client(config: LiveConfig, rules: Guard = LOCAL) -> Iterator[TestClient]:
    with TestClient(make_app(config, rules)) as opened:
        yield opened


@contextmanager
def viewer(opened: TestClient, url: str = "/socket", **headers: str) -> Iterator[Viewer]:
    session = opened.websocket_connect(url, [protocol.SUBPROTOCOL], headers=headers)
    with session as socket:
        yield Viewer(socket)


class Viewer:
    """A client of the socket that sorts what it receives."""

    def __init__(self, socket: WebSocketTestSession) -> None:
        self.socket = socket
        self.state: dict[str, Any] = {}
        self.chunks: list[tuple[protocol.ChunkHeader, list[list[bytes]]]] = []
        self.events: list[dict[str, Any]] = []

    def send(self, kind: str, **more: Any) -> None:
        self.socket.send_json({"type": kind, **more})

    def receive(self, seen: bool = True) -> None:
        message = self.socket.receive()
        if message["type"] == "websocket.close":
            raise ConnectionError(message["code"])
        if message.get("bytes") is not None:
            header, pictures = protocol.unpack(message["bytes"])
            self.chunks.append((header, pictures))
            if seen:
                self.send("seen", take=header.take, chunk=header.chunk)
            return
        found = protocol.TypeAdapter(dict[str, Any]).validate_json(message["text"])
        if found["type"] == "state":
            self.state = found
        else:
            self.events.append(found)

    def until(self, condition: Any, limit: int = 2000) -> None:
        """Receive until a condition holds."""
        for _ in range(limit):
            if condition():
                return
            self.receive()
        raise AssertionError(f"not so after {limit} messages: {self.state}, {self.events[-3:]}")

    def shows(self, take: int) -> bool:
        """Whether the newest chunk is of this take."""
        return bool(self.chunks) and self.chunks[-1][0].take == take

    def event(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        self.until(lambda: any(event["type"] == kind for event in self.events))
        found = next(event for event in self.events if event["type"] == kind)
        self.events.remove(found)
        return found


@dataclass
class Running:
    """A server on a port of loopback."""

    port: int
    thread: threading.Thread
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def socket(self) -> str:
        return f"ws://127.0.0.1:{self.port}/socket"


@contextmanager
def running(config: LiveConfig) -> Iterator[Running]:
    """Serve a configuration in a thread."""
    with serving(make_app(config, guard("127.0.0.1", None))) as server:
        yield server


@contextmanager
def serving(app: Starlette) -> Iterator[Running]:
    """Serve an application in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="critical",
                timeout_graceful_shutdown=1,
                lifespan="on",
                ws_max_size=protocol.MAX_PICTURE_BYTES + 1024,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Running(listening.getsockname()[1], thread, server)
        finally:
            server.should_exit = True
            thread.join(10)
