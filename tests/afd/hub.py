"""A Hugging Face hub on the loopback interface: one model, some revisions, sizes as one likes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

NAME = "someone/Wan"


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub:
    """`revisions`: commit by its names; `files`: content by path; `said`: sizes it reports."""

    def __init__(self, files: dict[str, bytes], revisions: dict[str, str]) -> None:
        self.files, self.revisions = files, revisions
        self.said: dict[str, int] = {}
        self.given: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = urlsplit(request.path).path
        for before, reply in (
            (f"/api/models/{NAME}/revision/", self._revision),
            (f"/api/models/{NAME}/tree/", self._tree),
            (f"/{NAME}/resolve/", self._file),
        ):
            if path.startswith(before):
                found = reply(path.removeprefix(before))
                break
        else:
            found = None
        content, headers = found or (b"{}", {})
        request.send_response(200 if found else 404)
        if found is None:
            headers = {"X-Error-Code": "RevisionNotFound"}
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)

    def _revision(self, name: str) -> tuple[bytes, dict[str, str]] | None:
        if name not in self.revisions:
            return None
        return json.dumps({"id": NAME, "sha": self.revisions[name], "siblings": []}).encode(), {}

    def _tree(self, commit: str) -> tuple[bytes, dict[str, str]]:
        entries = [
            {
                "type": "file",
                "path": path,
                "size": self.said.get(path, len(content)),
                "oid": _oid(content),
            }
            for path, content in self.files.items()
        ]
        return json.dumps(entries).encode(), {}

    def _file(self, place: str) -> tuple[bytes, dict[str, str]] | None:
        commit, _, path = place.partition("/")
        if path not in self.files:
            return None
        self.given.append(path)
        size = self.said.get(path, len(self.files[path]))
        headers = {"ETag": f'"{_oid(self.files[path])}"', "X-Repo-Commit": commit}
        return self.files[path], {**headers, "X-Linked-Size": str(size)}

    @contextmanager
    def running(self, monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
        """Serves until the block ends, as the hub that huggingface_hub asks."""
        from huggingface_hub import constants

        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.root)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", self.root)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()
