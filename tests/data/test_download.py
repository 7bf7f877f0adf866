import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nanogpt import download
from nanogpt.download import fetch
from nanogpt.errors import DataError

CONTENT = b"To be, or not to be"
CUT_OFF = 1  # a "status": the connection ends before the promised length
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """An HTTP server on this machine that answers with the statuses of `script`, then with 200."""

    def __init__(self) -> None:
        self.script: list[int] = []
        self.requests = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests += 1
                status = server.script.pop(0) if server.script else 200
                self.send_response(200 if status == CUT_OFF else status)
                if status == CUT_OFF:
                    self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(CONTENT if status == 200 else b"<html>an error page</html>")

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/x.txt"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("NANOGPT_DOWNLOADS", raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_download_is_checked(server: Server) -> None:
    assert fetch("x.txt", server.url, SHA256) == CONTENT
    with pytest.raises(DataError, match=r"is not the file expected: 19 bytes with sha256 .*--input=FILE"):
        fetch("x.txt", server.url, "0" * 64)


def test_a_file_without_end_is_not_read_to_its_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LARGEST", 5)
    with pytest.raises(DataError, match="is not the file expected: 5 bytes"):
        fetch("x.txt", server.url, SHA256)


def test_a_server_that_stumbles_is_asked_again(server: Server) -> None:
    server.script = [500, CUT_OFF]
    assert fetch("x.txt", server.url, SHA256) == CONTENT
    assert server.requests == 3


@pytest.mark.parametrize(("script", "requests"), [([404], 1), ([500, 500, 500], 3), ([CUT_OFF] * 3, 3)])
def test_an_error_page_says_what_to_do_instead(server: Server, script: list[int], requests: int) -> None:
    server.script = list(script)
    with pytest.raises(DataError, match=r"could not be downloaded .*NANOGPT_DOWNLOADS"):
        fetch("x.txt", server.url, SHA256)
    assert server.requests == requests


def test_no_network_says_what_to_do_instead(server: Server) -> None:
    server.http.server_close()
    with pytest.raises(DataError, match=r"could not be downloaded .*--input=FILE"):
        fetch("x.txt", "http://127.0.0.1:1/x.txt", SHA256)


def test_the_mirror_comes_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_DOWNLOADS", str(tmp_path))
    assert fetch("x.txt", server.url, SHA256) == CONTENT  # not in the mirror: downloaded
    (tmp_path / "x.txt").write_bytes(CONTENT)
    assert fetch("x.txt", server.url, SHA256) == CONTENT
    assert server.requests == 1
    (tmp_path / "x.txt").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"x\.txt is not the file expected"):
        fetch("x.txt", server.url, SHA256)
