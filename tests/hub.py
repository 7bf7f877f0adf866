"""A Hugging Face hub on this machine: what `huggingface_hub` asks for a data set's files, and failures on request."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

CUT_OFF = 1  # a "status": the connection ends before the promised length


class Hub:
    """Serves `files`, by path, at `url`: as any web server, and as the data set `repository`."""

    def __init__(self, files: dict[str, bytes], repository: str = "org/name") -> None:
        self.files, self.failures = files, list[int]()  # statuses to answer with before all goes well
        self.asked: list[str] = []  # paths of files that were downloaded
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path).removeprefix("/")
                tree, resolve = f"api/datasets/{repository}/tree/main", f"datasets/{repository}/resolve/main/"
                name = path.removeprefix(resolve)
                if path.startswith(tree):
                    listed = [name for name in hub.files if name.startswith(path.removeprefix(tree).strip("/"))]
                    more = {"type": "file", "oid": "0" * 40}
                    entries = [{"path": name, "size": len(hub.files[name]), **more} for name in listed]
                    self.answer(200, json.dumps(entries).encode())
                elif name in hub.files:
                    if self.command == "GET":
                        hub.asked.append(name)
                    self.answer(hub.failures.pop(0) if hub.failures else 200, hub.files[name])
                else:
                    self.answer(404, b"")

            do_HEAD = do_GET  # noqa: N815

            def answer(self, status: int, content: bytes) -> None:
                self.send_response(200 if status == CUT_OFF else status)
                self.send_header("Content-Length", str(len(content) + 1000 * (status == CUT_OFF)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "1" * 40)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
