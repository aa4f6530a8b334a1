"""A HuggingFace hub of one process: the endpoints that huggingface_hub calls to make, fill and read a repository, over real HTTP."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789" * 4


class Hub:
    """repositories: {name: {path: content}}; private: those that were made private; asked: requests, as method and path."""

    def __init__(self, token="hf_right"):
        self.token, self.repositories, self.private, self.objects = token, {}, set(), {}
        self.asked = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = json.dumps(body).encode() if not isinstance(body, bytes) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.asked.append(f"{self.command} {path}")
        if self.command in ("POST", "PUT") and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            if self.command == "POST":
                return self.answer({"error": "Invalid username or password."}, 401, X_Error_Message="Invalid token")
        for method, pattern, reply in ROUTES:
            if (match := re.fullmatch(pattern, path)) and self.command in method.split():
                return reply(self, body, *match.groups())
        return self.answer({"error": "not found"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self, body):
        said = json.loads(body)
        name = "/".join(filter(None, (said.get("organization"), said["name"])))
        if name in self.hub.repositories:
            return self.answer({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
        self.hub.repositories[name] = {}
        if said.get("visibility") == "private":
            self.hub.private.add(name)
        return self.answer({"url": f"{self.hub.address}/{name}"})

    def validate(self, body):
        return self.answer({"errors": [], "warnings": []})

    def modes(self, body, repository, _):
        """Large files go aside, as on the hub."""
        files = json.loads(body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
            for f in files
        ]  # fmt: skip
        return self.answer({"files": modes})

    def batch(self, body, repository):
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.address}/objects/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]  # fmt: skip
        return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "another content"}, 400)
        self.hub.objects[oid] = body
        return self.answer()

    def commit(self, body, repository, _):
        for line in body.splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                self.hub.repositories[repository][value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "lfsFile":
                self.hub.repositories[repository][value["path"]] = self.hub.objects[value["oid"]]
        return self.answer(
            {"commitUrl": f"{self.hub.address}/{repository}/commit/{SHA}", "commitOid": SHA, "success": True}
        )

    def info(self, body, repository, revision=None):
        if revision not in (None, "main", SHA):
            return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        if repository not in self.hub.repositories:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self.answer(
            {"id": repository, "sha": SHA, "siblings": [{"rfilename": f} for f in self.hub.repositories[repository]]}
        )

    def tree(self, body, repository, _):
        files = self.hub.repositories[repository].items()
        return self.answer(
            [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files]
        )

    def file(self, body, repository, _, path):
        content = self.hub.repositories.get(repository, {}).get(path)
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        return self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=SHA)


NAME = r"([\w.-]+(?:/[\w.-]+)?)"
ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{NAME}/preupload/([\w-]+)", _Handler.modes),
    ("POST", rf"/api/models/{NAME}/commit/([\w-]+)", _Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/(\w+)", _Handler.put),
    ("GET", rf"/api/models/{NAME}/tree/([\w-]+)", _Handler.tree),
    ("GET", rf"/api/models/{NAME}(?:/revision/([\w-]+))?", _Handler.info),
    ("GET HEAD", rf"/{NAME}/resolve/([\w-]+)/(.+)", _Handler.file),
]
