"""A loopback web server for shards that can misbehave: refuse, fail a few times, redirect, ignore ranges, break off."""

import http.server
import re
import threading
from contextlib import contextmanager
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder with range requests. server.failures: {path: times to answer 503}."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, name = self.server, self.path.lstrip("/")
        server.requests.append((self.command, self.path, dict(self.headers)))
        if server.redirects.get(name):
            self.send_response(302)
            self.send_header("Location", server.redirects[name])
            self.end_headers()
            return
        if server.failures.get(name, 0) > 0:
            server.failures[name] -= 1
            self.send_error(503)
            return
        path = Path(server.folder) / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(found[1]) : int(found[2]) + 1] if found else content
        ranged = found and server.ranges
        self.send_response(206 if ranged else 200)
        part = part if ranged else content
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            if server.cuts.get(name, 0) > 0:
                server.cuts[name] -= 1
                part = part[: len(part) // 2]
            self.wfile.write(part)


@contextmanager
def serve(folder):
    """(server, "http://127.0.0.1:port", "127.0.0.1:port")."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.ranges = folder, True
    server.failures, server.cuts, server.redirects, server.requests = {}, {}, {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield server, f"http://{host}", host
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
