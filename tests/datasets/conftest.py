"""Shared fixtures: data folders cut off from the real ones, small ADBench files, and a local file server."""

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from anomalib_gen.datasets import _adbench, _fetch
from anomalib_gen.datasets._manifest import DatasetEntry


@dataclass
class FileServer:
    """What the server holds, how it misbehaves, and the Range headers it received (None where absent)."""

    url: str = ""
    files: dict = field(default_factory=dict)
    knows_ranges: bool = True
    truncate_after: list = field(
        default_factory=list
    )  # bytes after which each of the next answers breaks off
    statuses: list = field(default_factory=list)  # error statuses of the next answers
    requests: list = field(default_factory=list)


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.headers.get("Range"))
            body = server.files.get(self.path.lstrip("/"))
            if body is None or server.statuses:
                self.send_error(404 if body is None else server.statuses.pop(0))
                return
            start, status = 0, 200
            if server.knows_ranges and self.headers.get("Range"):
                start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
            if status == 206 and start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            limit = server.truncate_after.pop(0) if server.truncate_after else None
            self.wfile.write(body[start:][:limit])

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_fetch, "_WAIT_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = FileServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, and no mirror but a dead one: nothing leaves this machine."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(_adbench, "_cache_folder", lambda: folder)
    monkeypatch.delenv("ANOMALIB_GEN_DATA", raising=False)
    monkeypatch.setenv("ANOMALIB_GEN_MIRROR", "http://127.0.0.1:9")
    return folder


@pytest.fixture
def write_npz(tmp_path):
    def write(path=None, **arrays):
        path = tmp_path / "table.npz" if path is None else path
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def toy(tmp_path, monkeypatch, cache):
    """A manifest of two tables, one with a checksum and one without; returns the bytes of the former."""
    source = tmp_path / "source.npz"
    X = np.random.default_rng(0).normal(size=(5000, 3))
    np.savez(source, X=X, y=(np.arange(5000) % 10 == 0).astype(int))
    body = source.read_bytes()
    common = {"licence": "none", "n_samples": 5000, "n_features": 3, "n_anomalies": 500}
    entries = [
        DatasetEntry(
            name="Toy", file="1_Toy.npz", url="http://127.0.0.1:9/1_Toy.npz", n_duplicates=0, bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(), **common,
        ),
        DatasetEntry(
            name="unverified", file="2_unverified.npz", url="http://127.0.0.1:9/2_unverified.npz", **common
        ),
    ]  # fmt: skip
    monkeypatch.setattr(_adbench, "read_manifest", lambda _: {entry.name: entry for entry in entries})
    return body
