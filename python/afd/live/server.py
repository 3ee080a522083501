"""The page and the socket of `afd live`."""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import get_args

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from afd.errors import VideoError
from afd.live import protocol
from afd.live.config import LiveConfig
from afd.live.engine import Engine, Picture
from afd.live.recording import png_of
from afd.live.security import ALWAYS, Guard, headers
from afd.live.viewers import MAX_VIEWERS, Viewer, Viewers
from afd.rollout import SwitchMode
from afd.video import Limits, read_clip, to_uint8

PAGE = Path(__file__).with_name("page.html")
# Of a picture that a viewer sends.
LIMITS = Limits(pixels=2**24, frames=1000, seconds=60)
PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
# Closing codes of RFC 6455.
POLICY, TOO_BIG, TRY_LATER = 1008, 1009, 1013


class Live:
    """The handlers of one server."""

    def __init__(
        self, config: LiveConfig, prompts: list[str], engine: Engine, viewers: Viewers, guard: Guard
    ) -> None:
        """`prompts`: suggestions on the page."""
        self._config, self._engine, self._viewers, self._guard = config, engine, viewers, guard
        student = config.students()[0]
        self._hello = protocol.Hello(
            run=secrets.token_hex(8),
            fps=config.fps,
            height=config.height,
            width=config.width,
            picture=f"image/{config.picture}",
            history=config.history,
            prompts=prompts[:32],
            modes=list(get_args(SwitchMode)),
            window=student.window or 0,
            sink=student.sink,
        )
        self._decoding = asyncio.Lock()

    def app(self) -> Starlette:
        """The application; when it ends, so does the stream."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            try:
                yield
            finally:
                await asyncio.to_thread(self._engine.close)

        routes = [
            Route("/", guarded(self._guard, partial(page, PAGE))),
            Route("/recordings/{number:int}/{student:int}.mp4", guarded(self._guard, self._video)),
            WebSocketRoute("/socket", self._socket),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def _video(self, request: Request) -> Response:
        number, student = request.path_params["number"], request.path_params["student"]
        path = self._engine.recorded(number, student)
        if path is None or not path.is_file():
            return PlainTextResponse("no such recording", 404, ALWAYS)
        return FileResponse(path, headers=ALWAYS, media_type="video/mp4", filename=path.name)

    async def _socket(self, socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols", [])
        if self._guard.refusal(socket) or protocol.SUBPROTOCOL not in offered:
            await socket.close(POLICY)  # before it is accepted: HTTP 403
            return
        await socket.accept(protocol.SUBPROTOCOL)
        if len(self._viewers) >= MAX_VIEWERS:
            await socket.close(TRY_LATER, f"{MAX_VIEWERS} viewers already")
            return
        viewer = Viewer()
        await socket.send_text(self._hello.model_dump_json())
        self._viewers.publish(self._engine.state)
        self._viewers.join(viewer)
        for switched in self._engine.switched.copy():
            viewer.post(switched)
        if self._engine.last is not None:
            viewer.post(self._engine.last)
        self._engine.watch(True)
        try:
            async with anyio.create_task_group() as both:
                both.start_soon(self._write, socket, viewer, both.cancel_scope)
                await self._read(socket, viewer)
                both.cancel_scope.cancel()
        finally:
            self._viewers.leave(viewer)
            self._engine.watch(len(self._viewers) > 0)

    async def _write(self, socket: WebSocket, viewer: Viewer, both: anyio.CancelScope) -> None:
        with suppress(WebSocketDisconnect):
            while True:
                message = await viewer.next()
                if isinstance(message, str):
                    await socket.send_text(message)
                else:
                    await socket.send_bytes(message)
        both.cancel()

    async def _read(self, socket: WebSocket, viewer: Viewer) -> None:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text, data = message.get("text"), message.get("bytes")
            if (data is not None and len(data) > protocol.MAX_PICTURE_BYTES) or (
                text is not None and len(text) > protocol.MAX_TEXT_BYTES
            ):
                await socket.close(TOO_BIG, "message too long")
                return
            try:
                if text is not None:
                    await self._take(protocol.parse(text), viewer)
                elif data is not None:
                    await self._picture(data, viewer)
            except ValueError as error:
                viewer.post(protocol.Problem(text=str(error)[:500]))

    async def _take(self, message: protocol.Incoming, viewer: Viewer) -> None:
        match message:
            case protocol.Seen():
                viewer.seen(message.take, message.chunk)
            case protocol.Controls(on=True):
                if not self._viewers.take_controls(viewer):
                    raise ValueError("controls: another viewer is using them")
            case protocol.Controls():
                self._viewers.release_controls(viewer)
            case _:
                await self._steer(message, viewer)

    async def _picture(self, data: bytes, viewer: Viewer) -> None:
        if not data.startswith(PICTURES):
            raise ValueError("picture: needed: a PNG, JPEG or WebP file")
        async with self._decoding:
            png = await asyncio.to_thread(self._fitted, data)
        await self._steer(Picture(png), viewer)

    def _fitted(self, data: bytes) -> bytes:
        """A picture in the students' size, as PNG."""
        height, width = self._config.height, self._config.width
        try:
            clip = read_clip(io.BytesIO(data), frames=1, height=height, width=width, limits=LIMITS)
        except VideoError as error:
            raise ValueError(f"picture: {error}") from error
        return png_of(to_uint8(clip.video_FCHW[0]))

    async def _steer(self, command: protocol.Command | Picture, viewer: Viewer) -> None:
        if not self._viewers.holds(viewer):
            raise ValueError("controls: another viewer has them; ask for them first")
        # Meanwhile nothing is read from this socket.
        while not self._engine.command(command):
            await asyncio.sleep(0.005)


Handler = Callable[[Request], Awaitable[Response]]


def guarded(guard: Guard, handler: Handler) -> Handler:
    """A handler that answers 403 where the guard refuses."""

    async def handle(request: Request) -> Response:
        refusal = guard.refusal(request)
        if refusal is not None:
            return PlainTextResponse(refusal, 403, ALWAYS)
        return await handler(request)

    return handle


async def page(path: Path, request: Request) -> Response:
    """A page of this package, with a fresh nonce for its style and script."""
    nonce = secrets.token_urlsafe(16)
    text = path.read_text(encoding="utf-8").replace("NONCE", nonce)
    return HTMLResponse(text, headers=headers(nonce, request.headers["host"]))
