# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub on 127.0.0.1: enough of its API to create, upload to and download repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER = "tester"


class MiniHub(ThreadingHTTPServer):
    """Repositories in memory: name -> list of (commit, {path: bytes}), newest last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str) -> dict[str, bytes]:
        """Files of a repository's newest commit."""
        return self.repositories[name][-1][1]

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{name}{len(self.repositories[name])}{sorted(files)}".encode()).hexdigest()
        self.repositories[name].append((digest, files))
        return digest

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories[name]
        return commits[-1] if revision == "main" else next((c for c in commits if c[0] == revision), None)


@contextmanager
def running():
    """A hub that serves until the block ends."""
    hub = MiniHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


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

    def _handle(self) -> None:
        path, data, hub = unquote(urlsplit(self.path).path), self._body(), self.server
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": USER, "orgs": []})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            name = f"{USER}/{json.loads(data)['name']}"
            if name not in hub.repositories:
                hub.repositories[name] = []
                hub.commit(name, {".gitattributes": b""})
            return self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            hub.large[match[1]] = data
            return self._json({})
        if path.endswith("/info/lfs/objects/batch"):
            upload = [
                o | {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in json.loads(data)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": upload})
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
            large = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > 20_000 else "regular"} for f in asked]
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
