"""`rwkvflow serve` with several streams at once: tokens a second of all together, and the processor's time for each.

python -m benchmarks.serve [--threads N] [--rounds N] [--out FILE]

The server is a process of its own, asked over HTTP as clients ask it. What others do on the machine lengthens the time that
passes, hardly the processor's.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import httpx
import psutil

from benchmarks.inference import write_model
from benchmarks.machine import describe, parser, pin, tell

STREAMS = (1, 2, 4, 8)
TOKENS = 32  # of each answer
PORT = 8711


async def answers(streams: int, seed: int) -> None:
    """So many at once, each of a prompt of its own: nothing is known from before.

    The likeliest token is drawn: of random weights' flat distribution more would have to be sorted than of any trained model's.
    """

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "model", "prompt": f"{seed} {number}", "max_tokens": TOKENS, "stream": True, "temperature": 0}
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for _ in reply.aiter_raw():
                pass

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=None) as client:
        await asyncio.gather(*(one(client, number) for number in range(streams)))


def measure(folder: Path, threads: int, rounds: int) -> dict[int, tuple[float, float]]:
    """By the number of streams: seconds, and the server's seconds of the processor, for all of them."""
    write_model(folder / "model.pth")
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "serve",
        str(folder / "model.pth"),
        "--port",
        str(PORT),
        "--device",
        "cpu",
    ]
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        while server.poll() is None:
            with suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{PORT}/health")
                break
            time.sleep(0.2)
        used, took = psutil.Process(server.pid), dict[int, list[tuple[float, float]]]()
        for turn in range(rounds + 1):  # the first maps memory and starts threads
            for streams in STREAMS:
                begun, before = time.perf_counter(), sum(used.cpu_times()[:2])
                asyncio.run(answers(streams, turn))
                took.setdefault(streams, []).append((time.perf_counter() - begun, sum(used.cpu_times()[:2]) - before))
        return {n: (median(t for t, _ in x[1:]), median(t for _, t in x[1:])) for n, x in took.items()}
    finally:
        server.terminate()
        server.wait()


def table(took: dict[int, tuple[float, float]]) -> str:
    """Of all numbers of streams."""
    lines = [
        f"Streams of {TOKENS} tokens over HTTP, L12 C768 V65536, float32.",
        "",
        "| streams | tokens/s of all | the processor's milliseconds for a token |",
        "| ---: | ---: | ---: |",
    ]
    for streams, (seconds, processor) in took.items():
        tokens = streams * TOKENS
        lines.append(f"| {streams} | {tokens / seconds:.1f} | {processor / tokens * 1e3:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    pin(arguments.threads)
    with tempfile.TemporaryDirectory() as made:
        told = table(measure(Path(made), arguments.threads, arguments.rounds))
    tell(f"{describe()}\n\n{told}\n", arguments.out)
