"""A registry in a thread: the parts of the distribution specification that artifacts need, and ways to misbehave.

`spoil` is asked before every answer with the handler; it may answer itself (and return True), as a hostile or broken
registry would.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Double:
    """State of the registry: blobs and uploads by name, manifests by tag and digest, and all requests so far."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.spoil: Callable[[Any], bool] = lambda handler: False
        self.host = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    def handle_one(self) -> None:
        double = self.double
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        double.requests.append((self.command, self.path))
        double.headers.append(dict(self.headers))
        if double.spoil(self):
            return
        path = self.path
        if found := re.search(r"/manifests/([^/?]+)$", path):
            self.manifest(found[1])
        elif "/blobs/uploads/" in path:
            self.upload()
        elif found := re.search(r"/blobs/(sha256:[0-9a-f]{64})$", path):
            self.blob(found[1])
        else:
            self.answer(404)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = handle_one

    def manifest(self, name: str) -> None:
        if self.command == "PUT":
            digest = "sha256:" + hashlib.sha256(self.body).hexdigest()
            self.double.manifests[name] = self.double.manifests[digest] = self.body
            self.answer(201)
        elif name in self.double.manifests:
            self.answer(200, self.double.manifests[name])
        else:
            self.answer(404)

    def blob(self, digest: str) -> None:
        content = self.double.blobs.get(digest)
        if content is None:
            return self.answer(404)
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            return self.answer(206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        return self.answer(200, content)

    def upload(self) -> None:
        double = self.double
        if self.command == "POST":
            name = f"/v2/u/blobs/uploads/{len(double.uploads)}"
            double.uploads[name] = bytearray()
            return self.answer(202, Location=name)
        name, _, query = self.path.partition("?")
        content = double.uploads[name]
        if self.command == "GET":
            return self.answer(204, Location=name, Range=f"0-{max(0, len(content) - 1)}")
        content += self.body
        if self.command == "PATCH":
            return self.answer(202, Location=name, Range=f"0-{len(content) - 1}")
        digest = query.removeprefix("digest=").replace("%3A", ":")
        if "sha256:" + hashlib.sha256(content).hexdigest() != digest:
            return self.answer(400, b"DIGEST_INVALID")
        double.blobs[digest] = bytes(content)
        return self.answer(201)


@contextmanager
def serve() -> Iterator[Double]:
    """A registry on loopback for the block; `double.host` is its host and port."""
    double = Double()
    handler = type("Bound", (Handler,), {"double": double})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    double.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
