"""A fake of ModelScope and Hugging Face on the loopback interface: serves a folder's files through both hubs' APIs."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The server.

    Attributes:
        folder: folder of the repositories, as folder/owner/name/files.
        cut: how often the response of a file is cut off in the middle, by file name.
        corrupt: names of files that are served with changed bytes.
        gated: repositories to which access is denied.
        requests: the requested paths.
    """

    def __init__(self, folder: Path):
        self.folder, self.cut, self.corrupt, self.gated, self.requests = folder, {}, set(), set(), []
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        root = self.folder / repo
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self) -> None:
        self.hub.requests.append(self.path)
        url = urllib.parse.urlsplit(self.path)
        parts, query = url.path.strip("/").split("/"), dict(urllib.parse.parse_qsl(url.query))
        if parts[:2] == ["api", "v1"]:
            self.modelscope(parts[2:], query)
        else:
            self.huggingface(parts)

    def modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        repo = "/".join(parts[1:3])
        if not (self.hub.folder / repo).exists():
            return self.send_json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        if repo in self.hub.gated:
            return self.send_json({"Code": 403, "Message": "no access", "Success": False}, 403)
        files = self.hub.files(repo)
        if parts[3:] == ["repo", "files"]:
            listed = [
                {
                    "Name": Path(name).name, "Path": name, "Type": "blob", "Size": len(data), "Revision": COMMIT,
                    "Sha256": hashlib.sha256(data).hexdigest(), "IsLFS": True, "CommittedDate": 0,
                }
                for name, data in files.items()
            ]  # fmt: skip
            return self.send_json({"Code": 200, "Success": True, "Message": "", "Data": {"Files": listed}})
        if parts[3:] == ["repo"] and query.get("FilePath") in files:
            return self.send_file(query["FilePath"], files[query["FilePath"]])
        if parts[3:] == ["revisions"]:
            revisions = {"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}}
            return self.send_json({"Code": 200, "Success": True, "Data": revisions})
        return self.send_json({"Code": 200, "Success": True, "Data": {}})

    def huggingface(self, parts: list[str]) -> None:
        if parts[0] == "api":
            repo = "/".join(parts[2:4])
        else:
            parts = parts[1:] if parts[0] == "datasets" else parts
            repo = "/".join(parts[:2])
        if not (self.hub.folder / repo).exists():
            return self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if repo in self.hub.gated:
            return self.send_json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        files = self.hub.files(repo)
        if parts[0] == "api" and "tree" in parts:
            listed = [
                {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
                for name, data in files.items()
            ]
            return self.send_json(listed)
        if parts[0] == "api":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self.send_json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})
        name = urllib.parse.unquote("/".join(parts[4:]))
        if parts[2] == "resolve" and name in files:
            return self.send_file(name, files[name])
        return self.send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, name: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if name in self.hub.corrupt:
            data = bytes(len(data))
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = data[first:]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            if self.hub.cut.get(name, 0) > 0 and len(body) > 1:
                self.hub.cut[name] -= 1
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(body)
