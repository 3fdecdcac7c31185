"""An automation that tells of failed runs: a real server, a real flow run, a real listener."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from miniature import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address, and what is sent there."""
    heard: list[str] = []

    class Hear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hear)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", heard
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_failed_run_is_told_of_once(prefect_server: str, repository: Path, listener: tuple[str, list[str]]):
    from flows.pipeline import pipeline

    url, heard = listener
    for address in ("http://127.0.0.1:9/old", url):  # the second takes the place of the first
        subprocess.run([sys.executable, str(ROOT / "deploy/alert.py"), address], check=True, timeout=120)
    assert pipeline(targets=["prepare"], return_state=True).is_completed()
    Path("behaviour").write_text("fail")
    state = pipeline(targets=["train"], return_state=True)
    assert state.is_failed()
    wait_until(lambda: heard, 120)
    text = json.loads(heard[0])["text"]
    assert text.startswith("pipeline ")
    assert text.endswith(": Failed. stage train failed: data/x.jsonl: has no rows; add some")
    assert len(heard) == 1
