"""A loopback web server for shards that can misbehave: refuse, fail a few times, redirect, ignore ranges, break off, be slow."""

import http.server
import re
import ssl
import threading
import time
from contextlib import contextmanager
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder with range requests. server.failures: {path: times to answer 503}."""

    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, name = self.server, self.path.lstrip("/")
        server.requests.append((self.command, self.path, dict(self.headers)))
        time.sleep(server.latency_s)
        if server.redirects.get(name):
            self.send_response(302)
            self.send_header("Location", server.redirects[name])
            self.send_header("Content-Length", "0")
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
                self.close_connection = True
            self.wfile.write(part)


@contextmanager
def serve(folder, address="127.0.0.1", port=0, certificate=None):
    """(server, "http://127.0.0.1:port", "127.0.0.1:port"); with a certificate (PEM, key included) https."""
    server = http.server.ThreadingHTTPServer((address, port), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.folder, server.ranges = folder, True
    server.failures, server.cuts, server.redirects, server.requests = {}, {}, {}, []
    server.connections, server.latency_s = 0, 0.0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host = f"{address}:{server.server_address[1]}"
    try:
        yield server, f"http{'s' if certificate else ''}://{host}", host
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
