"""Against a small server that speaks as much of the hub's protocol as a download needs."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rwkv_core.data.hub import fetch
from rwkv_core.errors import InputError, WorldError

ROOT = Path(__file__).parents[3]
COMMIT = "5" * 40
FILES = {"README.md": b"# A set", "data/train.jsonl": b'{"text": "a"}\n' * 100, "data/test.jsonl": b'{"text": "b"}\n'}


class Hub(BaseHTTPRequestHandler):
    """Has one data set, some/set, of two revisions; some/gated is another's."""

    asked: list[str]
    broken: set[str]

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        info = {
            "id": "some/set",
            "sha": COMMIT,
            "siblings": [{"rfilename": n, "size": len(d)} for n, d in FILES.items()],
        }
        if path in (
            "/api/datasets/some/set",
            "/api/datasets/some/set/revision/main",
            f"/api/datasets/some/set/revision/{COMMIT}",
        ):
            self.answer(200, json.dumps(info).encode())
        elif path.startswith(f"/api/datasets/some/set/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in FILES.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(f"/datasets/some/set/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/")[1]
            if name in self.broken:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                etag = f'"{hashlib.sha1(FILES[name]).hexdigest()}"'
                self.answer(200, FILES[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/datasets/some/set/"):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/datasets/some/gated"):
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server; `run` fetches in a process of its own, for the library reads HF_ENDPOINT when it is imported."""
    kind = type("OneHub", (Hub,), {"asked": [], "broken": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(name, folder, revision=None, port=server.server_port):
        code = (
            "import sys, json; from pathlib import Path\n"
            "from rwkv_core.data.hub import fetch; from rwkv_core.errors import Problem\n"
            "try: print(fetch(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])))\n"
            "except Problem as problem: print(type(problem).__name__, problem)"
        )
        plain = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and "proxy" not in name.lower()
        }
        done = subprocess.run(
            [sys.executable, "-c", code, name, str(folder), json.dumps(revision)],
            cwd=ROOT,
            env=plain | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip().splitlines()[-1]

    kind.run = staticmethod(run)
    yield kind
    server.shutdown()
    server.server_close()


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_data_set_is_fetched_and_its_commit_recorded(revision, hub, tmp_path):
    assert hub.run("some/set", tmp_path / "set", revision) == COMMIT
    found = tree(tmp_path / "set")
    assert json.loads(found.pop(".hub.json")) == {"dataset": "some/set", "revision": revision, "commit": COMMIT}
    assert found == FILES
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["set"]


def test_a_broken_download_leaves_no_folder_and_is_gone_on_with(hub, tmp_path):
    hub.broken.add("data/test.jsonl")
    assert hub.run("some/set", tmp_path / "set").startswith("WorldError some/set from http://127.0.0.1:")
    assert not (tmp_path / "set").exists()
    hub.broken.clear()
    hub.asked.clear()
    assert hub.run("some/set", tmp_path / "set") == COMMIT
    assert {name: data for name, data in tree(tmp_path / "set").items() if name != ".hub.json"} == FILES


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("some/other", None, "InputError some/other: http://127.0.0.1:.* has no such data set that is public; correct it, or"),
        ("some/set", "old", "InputError some/set at old: has no such branch, tag or commit; correct the revision"),
        ("some/gated", None, "InputError some/gated: its owner must let you in; ask on its page, then set HF_TOKEN"),
        ("no name", None, "InputError no name: can't be a data set's name .*; write owner/name"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(name, revision, message, hub, tmp_path):
    assert re.match(message, hub.run(name, tmp_path / "set", revision))
    assert not (tmp_path / "set").exists()


def test_no_hub_can_be_reached(hub, tmp_path):
    said = hub.run("some/set", tmp_path / "set", port=9)
    assert said.startswith("WorldError some/set from http://127.0.0.1:9: can't be fetched (")
    assert said.endswith("see to the connection, or set HF_ENDPOINT to a mirror, and run again")


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    with pytest.raises(InputError, match="something is there already"):
        fetch("some/set", tmp_path)


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WorldError, match=r"is not installed; pip install 'rwkv-flow\[hub\]'"):
        fetch("some/set", tmp_path / "set")
