"""A webhook that fails, hangs, refuses or leads elsewhere costs a known time, and shows no secret."""

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest

from anomalib_gen.monitoring.webhook import WebhookError, post, where


class Server(http.server.ThreadingHTTPServer):
    """Answers with the codes of a list, one after the other, then with its last one."""

    daemon_threads = True

    def __init__(self, codes, headers=()):
        self.codes, self.headers, self.got = list(codes), dict(headers), []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/services/s3cret?token=s3cret"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Content-Type"], json.loads(body)))
        code = self.server.codes.pop(0) if len(self.server.codes) > 1 else self.server.codes[0]
        if code == "hang":
            time.sleep(1.5)
            code = 200
        if code == "break off":
            self.connection.close()
            return
        with contextlib.suppress(OSError):
            self.send_response(code)
            for name, value in self.server.headers.items():
                self.send_header(name, value)
            self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve():
    started = []

    def start(*codes, **headers):
        server = Server(codes, headers)
        started.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_document_arrives_as_it_was(serve):
    server = serve(204)
    post(server.url, {"text": "drift in ‘größe’", "alert": True})
    assert server.got == [
        ("/services/s3cret?token=s3cret", "application/json", {"text": "drift in ‘größe’", "alert": True})
    ]


@pytest.mark.parametrize("codes", [(500, 200), (503, 429, 200), ("break off", 502, 200)], ids=str)
def test_what_may_pass_is_tried_again(serve, codes):
    server = serve(*codes)
    post(server.url, {}, backoff=0.01)
    assert len(server.got) == len(codes)


@pytest.mark.parametrize(
    ("code", "tries", "message"),
    [
        (500, 3, "code 500"),
        (404, 1, "code 404"),
        (401, 1, "code 401"),
        ("break off", 3, r"broke off \(3 tries\)"),
    ],
)
def test_what_does_not_pass_ends(serve, code, tries, message):
    server = serve(code)
    with pytest.raises(WebhookError, match=message) as caught:
        post(server.url, {}, retries=2, backoff=0.01)
    assert len(server.got) == tries
    assert "s3cret" not in str(caught.value)


def test_a_server_that_hangs(serve):
    server = serve("hang")
    start = time.monotonic()
    with pytest.raises(WebhookError, match="did not answer in time") as caught:
        post(server.url, {}, timeout=0.1, retries=1, backoff=0.01)
    assert time.monotonic() - start < 1.4
    assert len(server.got) == 2
    assert "s3cret" not in str(caught.value)


def test_a_server_that_asks_for_a_long_pause(serve):
    server = serve(503, 200, **{"Retry-After": "86400"})
    post(server.url, {}, backoff=0.01)
    assert len(server.got) == 2


def test_a_redirect_is_not_followed(serve):
    other = serve(200)
    server = serve(307, Location=other.url)
    with pytest.raises(WebhookError, match="code 307"):
        post(server.url, {}, backoff=0.01)
    assert other.got == []


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/s3cret"
        with pytest.raises(WebhookError, match=r"cannot be reached.*\(2 tries\)") as caught:
            post(url, {}, retries=1, backoff=0.01)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a b", ".example"])
def test_hosts_that_there_cannot_be(host):
    with pytest.raises(WebhookError, match="failed with") as caught:
        post(f"http://{host}/s3cret", {}, retries=0)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "ftp://a/b", "file:///etc/passwd", "no", "http://", "http://a:bc/"])
def test_other_addresses_are_refused(url):
    with pytest.raises(WebhookError, match="none of the form"):
        post(url, {})


def test_addresses_are_shown_without_secrets():
    assert where("https://user:s3cret@host.example:8443/s3cret?x=s3cret") == "https://host.example:8443"
