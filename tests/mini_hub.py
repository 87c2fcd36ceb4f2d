# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub on 127.0.0.1: enough of its API to create, upload to and download repositories.

It asks for a token, refuses cards with wrong metadata, can answer that all files are regular, and can cut connections.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"
TOKEN = "hf_test"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "llama3", "gemma", "psf-2.0", "other"}


class MiniHub(ThreadingHTTPServer):
    """Repositories in memory: name -> list of (commit, {path: bytes}), newest last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()

    def reset(self) -> None:
        """Nothing in it, and nothing is cut."""
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.branches: dict[tuple[str, str], int] = {}
        self.large: dict[str, bytes] = {}
        # "lfs" for files above 20 kB, or "regular" for all
        self.mode = "lfs"
        # so many of the next requests of a kind end in the middle
        self.cut = {"lfs": 0, "commit": 0, "any": 0}
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str) -> dict[str, bytes]:
        """Files of a repository's newest commit."""
        return self.repositories[name][-1][1]

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        content = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
        digest = hashlib.sha1(f"{name}{len(self.repositories[name])}{content}".encode()).hexdigest()
        self.repositories[name].append((digest, files))
        return digest

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories[name]
        if revision == "main" or (name, revision) in self.branches:
            return commits[-1]
        return next((c for c in commits if c[0] == revision), None)


@functools.cache
def start() -> MiniHub:
    """This process's hub, which serves until the process ends."""
    hub = MiniHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub


def metadata_errors(content: str) -> list[str]:
    """What is wrong with the metadata of a card, by the rules of the Hub's documentation."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["there is no metadata"]
    data = yaml.safe_load(match[1])
    errors = []
    for name in ("tags", "datasets"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f"{name} must be a list of strings")
    errors += [
        f"datasets: '{d}' is no data set id"
        for d in data.get("datasets", [])
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", d)
    ]
    if data.get("license", "other") not in LICENSES:
        errors.append(f"license must be one of {sorted(LICENSES)}")
    if "base_model" in data and not re.fullmatch(r"[\w.-]+/[\w.-]+", data["base_model"]):
        errors.append("base_model must be a model id")
    if data.get("base_model_relation", "quantized") not in ("quantized", "finetune", "adapter", "merge"):
        errors.append("base_model_relation is unknown")
    if data.get("pipeline_tag", "text-generation") not in ("text-generation", "image-text-to-text"):
        errors.append("pipeline_tag is unknown")
    for model in data.get("model-index", []):
        for result in model.get("results", [{}]) if model.get("name") else [{}]:
            dataset, metrics = result.get("dataset", {}), result.get("metrics", [])
            named = result.get("task", {}).get("type") and dataset.get("type") and dataset.get("name")
            if (
                not named
                or not metrics
                or not all("type" in m and isinstance(m.get("value"), int | float) for m in metrics)
            ):
                errors.append(
                    "model-index: a result needs task.type, dataset.type, dataset.name and metrics of type and value"
                )
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MiniHub

    def log_message(self, *args) -> None:
        pass

    def _send(self, body: bytes = b"", code: int = 200, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, Content_Type="application/json")

    def _missing(self, what: str) -> None:
        self._send(b"{}", 404, X_Error_Code=what, X_Error_Message=what)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _cuts(self, path: str) -> bool:
        """Whether this request's connection is cut: half of its body is read, and no answer is given."""
        kind = "lfs" if path.startswith("/lfs/") else "commit" if "/commit/" in path else "any"
        kind = "any" if self.server.cut["any"] > 0 else kind
        if self.server.cut[kind] <= 0:
            return False
        self.server.cut[kind] -= 1
        self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def _handle(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.requests.append((self.command, path))
        if self._cuts(path):
            return None
        data = self._body()
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": USER, "orgs": []})
        if path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(data)["content"])
            if errors and self.headers.get("Accept") == "text/plain":
                return self._send("; ".join(errors).encode(), 400)
            found = [{"message": error} for error in errors]
            return self._json({"errors": found, "warnings": []}, 400 if errors else 200)
        if self.command != "GET" and self.command != "HEAD" and "/lfs/" not in path:
            given = self.headers.get("Authorization")
            if given != f"Bearer {TOKEN}":
                return self._send(b'{"error": "Invalid username or password."}', 401)
        if path == "/api/repos/create":
            name = f"{USER}/{json.loads(data)['name']}"
            answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
            if name in hub.repositories:
                return self._json(answer | {"error": "You already created this model repo"}, 409)
            hub.repositories[name] = []
            hub.commit(name, {".gitattributes": b""})
            return self._json(answer)
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            hub.large[match[1]] = data
            return self._json({})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                # what is there already has no action
                o if o["oid"] in hub.large else o | {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path)) and self.command == "POST":
            hub.branches[match[1], match[2]] = len(hub.repositories[match[1]])
            return self._json({})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+))?(?:/([^/]+))?(?:/.*)?", path):
            return self._model(match[1], match[2] or "revision", match[3] or "main", data)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        return self._missing("EntryNotFound")

    def _model(self, name: str, verb: str, revision: str, data: bytes) -> None:
        hub = self.server
        found = hub.at(name, revision) if name in hub.repositories else None
        if found is None:
            return self._missing("RepoNotFound" if name not in hub.repositories else "RevisionNotFound")
        commit, files = found
        if verb == "preupload":
            asked = json.loads(data)["files"]
            large = [{"path": f["path"], "uploadMode": self._mode(f["size"])} for f in asked]
            return self._json({"files": [f | {"shouldIgnore": False} for f in large]})
        if verb == "commit":
            new = dict(files)
            for line in data.decode().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    new[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    new[value["path"]] = hub.large[value["oid"]]
                elif operation["key"] == "deletedFile":
                    del new[value["path"]]
            commit = hub.commit(name, new)
            return self._json({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}"})
        if verb == "tree":
            return self._json([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
        if verb == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
            return self._json({"branches": [main], "tags": [], "converts": []})
        listing = [{"rfilename": path} for path in files]
        info = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": listing}
        return self._json(info | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def _mode(self, size: int) -> str:
        return "lfs" if size > 20_000 and self.server.mode == "lfs" else "regular"

    def _resolve(self, name: str, revision: str, file: str) -> None:
        hub = self.server
        found = hub.at(name, revision) if name in hub.repositories else None
        if found is None:
            return self._missing("RepoNotFound" if name not in hub.repositories else "RevisionNotFound")
        commit, files = found
        if file not in files:
            return self._missing("EntryNotFound")
        content = files[file]
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": tag, "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged and self.command == "GET":
            start, stop = int(ranged[1]), int(ranged[2] or len(content) - 1)
            part = content[start : stop + 1]
            headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            return self._send(part, 206, **headers)
        return self._send(content, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle
