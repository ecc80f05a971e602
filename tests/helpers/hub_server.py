"""A small Hub on loopback that keeps repositories in memory: what pushing to it and loading from it asks over HTTP."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt", ".pth")


@dataclass
class Repo:
    """Files by path, and the titles of the commits that made them."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """Name of the last commit."""
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """
    Serves until the `with` block ends. `url` is for HF_ENDPOINT.

    `drops` holds patterns; the next request whose `METHOD path` one of them matches gets no answer, and it is removed.
    """

    daemon_threads = True

    def __init__(self, token="hf_goodtokengoodtoken"):
        super().__init__(("127.0.0.1", 0), _Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.token, self.repos, self.objects, self.verified = token, {}, {}, set()
        self.drops, self.dropped, self.seen, self.lock = [], [], [], threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that hang up are not worth a traceback."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, body=b"", code=200, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what):
        self.answer({"error": what}, 404, X_Error_Code=what)

    def content(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.content()
        with hub.lock:
            hub.seen.append(f"{self.command} {path}")
            for pattern in [one for one in hub.drops if re.search(one, hub.seen[-1])]:
                hub.drops.remove(pattern)
                hub.dropped.append(hub.seen[-1])
                self.close_connection = True
                return
            if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer({"error": "Invalid user token."}, 401, X_Error_Message="Invalid user token.")
                return
            for pattern, handle in ROUTES:
                if found := re.fullmatch(pattern, path):
                    handle(self, body, *found.groups())
                    return
        self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815 - names that the base class looks for

    # ---- What is asked, in the order in which a push asks it ----

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        code = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, Repo())
        self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name}, code)

    def validate(self, body):
        content = json.loads(body)["content"]
        wrong = [] if content.startswith("---\n") and "\n---\n" in content else [{"message": "no metadata"}]
        self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def preupload(self, body, name):
        if name not in self.server.repos:
            self.missing("RepoNotFound")
            return
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": modes})

    def batch(self, body):
        found = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/objects/{item['oid']}"},
                "verify": {"href": f"{self.server.url}/verify"},
            }
            known = item["oid"] in self.server.objects
            found.append({"oid": item["oid"], "size": item["size"]} | ({} if known else {"actions": actions}))
        self.answer({"transfer": "basic", "objects": found})

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer({"error": "not the content that was announced"}, 400)
            return
        self.server.objects[oid] = body
        self.answer()

    def verify(self, body):
        asked = json.loads(body)
        right = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
        self.server.verified.add(asked["oid"])
        self.answer({}, 200 if right else 404)

    def commit(self, body, name):
        repo = self.server.repos[name]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                repo.commits.append(value["summary"])
            elif operation["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del repo.files[value["path"]]
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def info(self, _body, name):
        repo = self.server.repos.get(name)
        if repo is None:
            self.missing("RepoNotFound")
            return
        files = [{"rfilename": path} for path in sorted(repo.files)]
        self.answer({"id": name, "modelId": name, "sha": repo.sha, "tags": [], "private": False, "siblings": files})

    def tree(self, _body, name):
        files = self.server.repos[name].files.items()
        self.answer([{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files])

    def resolve(self, _body, name, path):
        repo = self.server.repos.get(name)
        data = None if repo is None else repo.files.get(path)
        if data is None:
            self.missing("RepoNotFound" if repo is None else "EntryNotFound")
            return
        self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=repo.sha)


ROUTES = [
    (r"/api/repos/create", _Request.create),
    (r"/api/validate-yaml", _Request.validate),
    (r"/api/models/([^/]+/[^/]+)/preupload/.+", _Request.preupload),
    (r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", _Request.batch),
    (r"/objects/([0-9a-f]{64})", _Request.upload),
    (r"/verify", _Request.verify),
    (r"/api/models/([^/]+/[^/]+)/commit/.+", _Request.commit),
    (r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", _Request.info),
    (r"/api/models/([^/]+/[^/]+)/tree/.+", _Request.tree),
    (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", _Request.resolve),
]
