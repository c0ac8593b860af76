"""A server on this machine that speaks the hub's protocol: downloads, and uploads of small files and of large ones (LFS)."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """What the server holds.

    Attributes:
      repos: the files of each model, by its name.
      gated: names of models that are refused.
      public: names of models that everybody may read.
      objects: large files by their SHA-256.
    """

    repos: dict[str, dict[str, bytes]]
    gated: tuple[str, ...] = ()
    public: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def commit(self, name: str) -> str:
        """Return the hash of a model's content."""
        files = sorted((path, hashlib.sha1(body).hexdigest()) for path, body in self.repos[name].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repos[name] = {".gitattributes": b""}
        if asked.get("visibility") == "public" or asked.get("private") is False:  # as later and earlier libraries say it
            self.public.add(name)
        return 200, {"url": f"{self.url}/{name}"}

    def validate(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """Refuse a model card as the hub does: the model that it is based on is one of the hub."""
        base = re.search(r"^base_model: (.*)$", asked["content"], re.MULTILINE)
        errors = [{"message": f'"base_model" {base[1]} is no name'}] if base and base[1].count("/") != 1 else []
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def change(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        """Commit."""
        files = self.repos[name]
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{self.commit(name)}", "commitOid": self.commit(name)}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            found = re.match("(?:/api/models)?/([^/]+/[^/]+)(.*)", path)
            name = found[1] if found else ""
            if name in hub.gated:
                return self._send(403, {}, {"X-Error-Code": "GatedRepo"})
            if name not in hub.repos:
                return self._send(401, {}, {"X-Error-Code": "RepoNotFound"})
            files, commit = hub.repos[name], hub.commit(name)
            if "/tree/" in path:
                oid = lambda body: hashlib.sha1(body).hexdigest()  # noqa: E731
                return self._send(200, [{"type": "file", "path": n, "size": len(b), "oid": oid(b)} for n, b in files.items()])
            if path.startswith("/api/"):
                siblings = [{"rfilename": n, "size": len(b)} for n, b in files.items()]
                return self._send(200, {"id": name, "sha": commit, "siblings": siblings, "private": name not in hub.public})
            body = files.get(path.rsplit("/", 1)[1])
            if body is None:
                return self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
            return self._send(200, body, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})

        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.split("?")[0]
            if path == "/api/validate-yaml":
                return self._send(*hub.validate(json.loads(content)))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(401, {"error": "Invalid username or password."})
            if path == "/api/repos/create":
                return self._send(*hub.create(json.loads(content)))
            if found := re.fullmatch("/api/models/(.+)/preupload/main", path):
                modes = {True: "lfs", False: "regular"}
                large = lambda name: name.endswith((".safetensors", ".parquet"))  # noqa: E731
                files = [
                    {"path": file["path"], "uploadMode": modes[large(file["path"])], "shouldIgnore": False}
                    for file in json.loads(content)["files"]
                ]
                return self._send(200, {"files": files})
            if path.endswith(".git/info/lfs/objects/batch"):
                objects = json.loads(content)["objects"]
                upload = lambda oid: {"upload": {"href": f"{hub.url}/lfs/{oid}"}}  # noqa: E731
                return self._send(200, {"objects": [one | {"actions": upload(one["oid"])} for one in objects]})
            if found := re.fullmatch("/api/models/(.+)/commit/main", path):
                return self._send(*hub.change(found[1], [json.loads(line) for line in content.splitlines()]))
            return self._send(404, {})

        def do_PUT(self):
            content, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.rsplit("/", 1)[1]
            assert hashlib.sha256(content).hexdigest() == oid
            hub.objects[oid] = content
            self._send(200, {})

        def _send(self, code: int, body: Any, headers: dict[str, str] | None = None):
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            wanted = {"Content-Length": str(len(content)), "Content-Type": "application/json"} | (headers or {})
            for name, value in wanted.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()


def ask(hub: Hub, cache: str, patch: pytest.MonkeyPatch) -> None:
    """Let this process ask a hub, as HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET let processes that start."""
    from huggingface_hub import constants, file_download

    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):
        patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
