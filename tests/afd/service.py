"""A paid video service on the loopback interface that speaks ark, openai and fal, with faults.

It keeps the books that the tests read: which submits were accepted, for which request, and what was
paid. Faults are scripted per point of the exchange and used up in order.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "sk-loopback-0123456789abcdef-SECRET"
WIRES = ("ark", "openai", "fal")
WORDS = {
    "ark": {"queued": "queued", "running": "running", "done": "succeeded", "failed": "failed"},
    "openai": {
        "queued": "queued",
        "running": "in_progress",
        "done": "completed",
        "failed": "failed",
    },
    "fal": {
        "queued": "IN_QUEUE",
        "running": "IN_PROGRESS",
        "done": "COMPLETED",
        "failed": "COMPLETED",
    },
}


@dataclass
class Job:
    """A task as the service sees it."""

    number: str
    wire: str
    asked: dict[str, Any]
    created: float = field(default_factory=time.time)
    polls: int = 0
    state: str = "queued"
    error: tuple[str, str] = ("", "")

    @property
    def prompt(self) -> str:
        return self.asked["content"][0]["text"] if self.wire == "ark" else self.asked["prompt"]

    @property
    def paid(self) -> bool:
        return self.state not in ("failed", "cancelled")


Fault = Callable[["Exchange"], bool]  # True: the exchange is over


class Service:
    """The server and its books. `polls`: looks until a task is done."""

    def __init__(self, video: bytes) -> None:
        self.video, self.polls, self.page = video, 1, 100
        self.jobs: dict[str, Job] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.lock = threading.RLock()
        self.released = threading.Event()
        self.busiest = self._at_once = 0
        service = self

        class Handler(Exchange):
            pass

        Handler.service = service
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.server.server_address[1]}"

    def base_url(self, wire: str) -> str:
        return f"{self.root}/{wire}"

    def script(self, point: str, *faults: Fault) -> None:
        """Faults of the next exchanges at submit, poll, list, media or cancel."""
        self.faults[point] += faults

    def paid(self) -> dict[str, int]:
        """Accepted submits that cost money, by prompt and seed."""
        counts: dict[str, int] = defaultdict(int)
        for job in self.jobs.values():
            counts[f"{job.prompt}|{job.asked.get('seed')}"] += job.paid
        return dict(counts)

    def seen(self, method: str, pattern: str) -> int:
        return sum(
            m == method and re.search(pattern, path) is not None for m, path, _ in self.requests
        )

    @contextmanager
    def running(self) -> Iterator[Service]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self.server.shutdown()
            self.server.server_close()
            thread.join()


class Exchange(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    service: Service

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_DELETE = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.wire, _, self.place = url.path[1:].partition("/")
        self.body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with self.service.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.service.requests.append((self.command, self.path, headers))
        point = self._point()
        if point != "media" and headers.get("authorization", "").split(" ")[-1] != KEY:
            said = headers.get("authorization", "none")
            self.say(401, {"error": {"code": "invalid_api_key", "message": f"not a key: {said}"}})
            return
        with self.service.lock:
            scripted = self.service.faults[point]
            fault = scripted.pop(0) if scripted else None
        if fault is None or not fault(self):
            getattr(self, f"on_{point}")()

    def _point(self) -> str:
        if self.wire == "media" or self.place.endswith("/content"):
            return "media"
        if self.place == "models/requests/by-endpoint":
            return "list"
        if self.command == "POST":
            return "submit"
        if self.command in ("DELETE", "PUT"):
            return "cancel"
        return "list" if self.place in ("contents/generations/tasks", "videos") else "poll"

    def say(self, status: int, body: Any, **headers: str) -> None:
        """Answer with JSON or bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    # What happens when nothing goes wrong.

    def accept(self) -> Job:
        """Take the order; from here on it costs money."""
        service = self.service
        if self.wire == "openai":
            head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
            parts = BytesParser().parsebytes(head + self.body).get_payload()
            asked = {
                p.get_param("name", header="content-disposition"): p.get_payload() for p in parts
            }
        else:
            asked = json.loads(self.body)
        with service.lock:
            job = Job(f"{self.wire}-{len(service.jobs) + 1}", self.wire, asked)
            service.jobs[job.number] = job
            under_way = sum(j.state in ("queued", "running") for j in service.jobs.values())
            service.busiest = max(service.busiest, under_way)
        return job

    def submitted(self, job: Job) -> dict[str, Any]:
        root = f"{self.service.base_url('fal')}/lab/toy/requests/{job.number}"
        return {
            "ark": {"id": job.number},
            "openai": {"id": job.number, "object": "video", "status": "queued"},
            "fal": {
                "request_id": job.number,
                "status": "IN_QUEUE",
                "status_url": f"{root}/status",
                "response_url": root,
                "cancel_url": f"{root}/cancel",
            },
        }[self.wire]

    def on_submit(self) -> None:
        self.say(200, self.submitted(self.accept()))

    def job(self) -> Job:
        return self.service.jobs[re.search(rf"{self.wire}-\d+", self.place)[0]]

    def on_poll(self) -> None:
        if not any(number in self.place for number in self.service.jobs):
            self.say(404, {"error": {"code": "not_found", "message": "no such task"}})
            return
        job = self.job()
        with self.service.lock:
            if job.state in ("queued", "running") and not self._is_result():
                job.polls += 1
                job.state = "done" if job.polls > self.service.polls else "running"
        if self._is_result():
            self.say(200, self.result(job))
        else:
            self.say(200, self.told(job))

    def _is_result(self) -> bool:
        return self.wire == "fal" and not self.place.endswith("/status")

    def media(self, job: Job) -> str:
        return f"{self.service.root}/media/{job.number}.mp4?sig={KEY[-6:]}{job.polls}"

    def told(self, job: Job, word: str | None = None) -> dict[str, Any]:
        """A task's status; a failed one with its error."""
        word = word or WORDS[self.wire].get(job.state, job.state)
        code, message = job.error
        error = {"code": code, "message": message} if code else None
        if self.wire == "ark":
            content = {"video_url": self.media(job)} if job.state == "done" else {}
            usage = {"total_tokens": 1000} if job.state == "done" else {}
            return {"id": job.number, "status": word, "content": content, "error": error} | {
                "usage": usage
            }
        if self.wire == "openai":
            return {"id": job.number, "object": "video", "status": word, "error": error}
        failed = {"error": message, "error_type": code} if code else {}
        return {"status": word, "request_id": job.number} | failed

    def result(self, job: Job) -> dict[str, Any]:
        return {"video": {"url": self.media(job), "content_type": "video/mp4"}}

    def on_media(self) -> None:
        self.say(200, self.service.video, content_type="video/mp4")

    def on_cancel(self) -> None:
        job = self.job()
        job.state = "cancelled"
        self.say(200, {})

    def on_list(self) -> None:
        jobs = [job for job in self.service.jobs.values() if job.wire == self.wire][::-1]
        if self.wire == "ark":
            page, size = int(self.query["page_num"]), int(self.query["page_size"])
            marks = ("seed", "execution_expires_after", "resolution")
            items = [
                self.told(job)
                | {"created_at": int(job.created)}
                | {name: job.asked[name] for name in marks if name in job.asked}
                for job in jobs
            ]
            self.say(200, {"total": len(items), "items": items[(page - 1) * size : page * size]})
        elif self.wire == "openai":
            items = [
                self.told(job) | {"created_at": int(job.created), "prompt": job.prompt}
                for job in jobs
            ]
            numbers = [item["id"] for item in items]
            start = numbers.index(self.query["after"]) + 1 if "after" in self.query else 0
            end = start + self.service.page
            more = {"has_more": end < len(items), "last_id": (numbers[:end] or [None])[-1]}
            self.say(200, {"object": "list", "data": items[start:end]} | more)
        else:
            items = [
                {
                    "request_id": job.number,
                    "json_input": job.asked,
                    "json_output": self.result(job),
                    "status_code": 200,
                    "sent_at": datetime.fromtimestamp(job.created, timezone.utc).isoformat(),
                }
                for job in jobs
                if self.query.get("request_id") in (None, job.number)
            ]
            start = int(self.query.get("cursor", 0))
            end = start + self.service.page
            more = {"has_more": end < len(items), "next_cursor": str(end)}
            self.say(200, {"items": items[start:end]} | more)


# Faults.


def answer(status: int, body: Any = b"", **headers: str) -> Fault:
    """Answer this instead, nothing else happens."""

    def fault(exchange: Exchange) -> bool:
        exchange.say(status, body, **headers)
        return True

    return fault


def lost(exchange: Exchange) -> bool:
    """Accept the order, then hang up without a word."""
    exchange.accept()
    exchange.close_connection = True
    return True


def hang_up(exchange: Exchange) -> bool:
    """Hang up without accepting anything."""
    exchange.close_connection = True
    return True


def accept_but_say(status: int, body: Any = b"") -> Fault:
    """Accept the order and answer something that does not say so."""

    def fault(exchange: Exchange) -> bool:
        exchange.accept()
        exchange.say(status, body)
        return True

    return fault


def fail(code: str, message: str = "no") -> Fault:
    """The task fails."""

    def fault(exchange: Exchange) -> bool:
        job = exchange.job()
        job.state, job.error = "failed", (code, message)
        return False

    return fault


def state(word: str) -> Fault:
    """The task tells this state."""

    def fault(exchange: Exchange) -> bool:
        exchange.say(200, exchange.told(exchange.job(), word))
        return True

    return fault


def silent(exchange: Exchange) -> bool:
    """The task succeeds without a video."""
    job = exchange.job()
    job.state, job.polls = "done", 9
    told = exchange.told(job)
    if exchange.wire == "ark":
        told["content"] = {}
    if exchange.wire == "openai":
        told["error"] = {"code": "moderation_blocked", "message": "filtered"}
    exchange.say(200, {"video": None} if exchange._is_result() else told)
    return True


def truncated(exchange: Exchange) -> bool:
    """Half of the file, as if it were all."""
    video = exchange.service.video
    exchange.say(200, video[: len(video) // 2])
    return True


def cut_off(exchange: Exchange) -> bool:
    """The connection breaks in the middle of the file."""
    exchange.send_response(200)
    exchange.send_header("content-length", str(len(exchange.service.video)))
    exchange.end_headers()
    exchange.wfile.write(exchange.service.video[:100])
    exchange.close_connection = True
    return True


def drip(exchange: Exchange) -> bool:
    """A byte at a time, for ever."""
    exchange.send_response(200)
    exchange.send_header("content-length", str(10**5))
    exchange.end_headers()
    try:
        while not exchange.service.released.wait(0.02):
            exchange.wfile.write(b"0")
            exchange.wfile.flush()
    except OSError:
        pass
    exchange.close_connection = True
    return True


def endless(exchange: Exchange) -> bool:
    """A file that does not say how long it is, and is too long."""
    exchange.send_response(200)
    exchange.send_header("connection", "close")
    exchange.end_headers()
    try:
        for _ in range(4096):
            exchange.wfile.write(b"0" * 65536)
    except OSError:
        pass
    exchange.close_connection = True
    return True
