"""The download code against a local server that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "pytorch_model.bin": b"not asked for"}
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/gated/") or path.startswith("/gated/"):
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if not path.startswith(("/api/models/org/model", "/org/model/")):
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(body)} for name, body in FILES.items()]
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in FILES.items()]
            if "/tree/" in path:
                return self._send(200, json.dumps(tree).encode())
            return self._send(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode())
        body = FILES[path.rsplit("/", 1)[1]]
        return self._send(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})

    def _send(self, code, body, headers=None):
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def find(tmp_path):
    """Return `find(name, endpoint)`: what find_checkpoint prints in a process of its own, or the error it raises."""
    code = "import sys; from user_llm.models.pretrained import find_checkpoint; print(find_checkpoint(sys.argv[1]))"

    def run(name, endpoint):
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, env=env)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    return run


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_models_name_is_downloaded_once_and_only_what_is_needed(find, hub, tmp_path):
    path = find("org/model", hub)
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    with open(os.path.join(path, "model.safetensors"), "rb") as file:
        assert file.read() == b"weights"
    # What was downloaded serves without a network.
    assert find("org/model", "http://127.0.0.1:9") == path


@pytest.mark.slow
def test_what_the_hub_refuses_is_said_in_a_sentence(find, hub):
    assert find("gated/model", hub).startswith(
        "ValueError: gated/model is gated: accept its licence on the hub, and set HF_TOKEN"
    )
    assert find("org/nothing", hub).startswith("ValueError: There is no model org/nothing on the hub, and no such directory")
    assert find("org/model", "http://127.0.0.1:9").startswith("ValueError: Cannot download org/model (")
