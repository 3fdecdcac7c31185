"""A training as Prefect's UI shows it: how far it is, and the curve of its loss.

What the training prints and writes is read; it does not know of this, and nothing here can slow it or stop it.
"""

import base64
import contextvars
import re
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from rwkv_core import charts
from tasks import mirror
from tasks.record import main_root
from tasks.tracking import RUNS

PROGRESS, CURVE = "training-progress", "loss-curve"
"""Keys of the artifacts; each is made once and then changed in place."""

_EVERY = 3.0  # seconds between two looks
_PICTURE_EVERY = 60.0
_LEAVE = 10.0
_RUN = re.compile(r"; run ([0-9a-f]{16})$")
_STEP = re.compile(r"^step \d+/(\d+) ")


class Progress:
    """Follows the training of a task run from a thread, until it is left.

    Args:
        root: the checkout.
        flow_run: whose artifacts these are.
        task_run: ditto.
    """

    def __init__(self, root: Path, flow_run: UUID, task_run: UUID) -> None:
        self._runs = main_root(root) / RUNS
        self._of = {"flow_run_id": flow_run, "task_run_id": task_run}
        self._metrics: Path | None = None
        self._offset, self._steps, self._drawn = 0, 0, 0.0
        self._began: tuple[float, int] | None = None  # when, and at which step
        self._curves: dict[str, list[tuple[float, float]]] = {"train/loss": [], "valid/loss": []}
        self._speed = 0.0
        self._artifacts = dict[str, UUID]()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        follow = contextvars.copy_context().run
        self._thread = threading.Thread(target=follow, args=(self._follow,), name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(_LEAVE)

    def read(self, line: str) -> None:
        """Learn from a line of the training's output which run it is, and how many steps it has."""
        if (run := _RUN.search(line)) is not None:
            self._metrics, self._offset = self._runs / run[1] / mirror.LIVE, 0
            for curve in self._curves.values():
                curve.clear()
        if (step := _STEP.match(line)) is not None:
            self._steps = int(step[1])

    def _follow(self) -> None:
        over = False
        while not over:
            over = self._over.wait(_EVERY)
            with suppress(Exception):  # it is a view: a server that is away, a picture that can't be drawn
                if self._look():
                    with get_client(sync_client=True) as client:
                        self._show(client, draw=over or time.monotonic() - self._drawn > _PICTURE_EVERY)

    def _look(self) -> bool:
        """Whether anything is new."""
        if self._metrics is None or not self._metrics.exists():
            return False
        before = self._offset
        for end, points in mirror.live_points(self._metrics, before):
            self._offset = end
            for point in points:
                if point.name in self._curves:
                    self._curves[point.name].append((point.step, point.value))
                elif point.name == "train/tokens_per_second":
                    self._speed = point.value
        return self._offset > before or self._over.is_set()

    def _show(self, client: SyncPrefectClient, *, draw: bool) -> None:
        learned, held_out = self._curves.values()
        if not learned or not self._steps:
            return
        step, loss = learned[-1]
        now = time.monotonic()
        self._began = self._began or (now, int(step))
        since, first = self._began
        left = timedelta(seconds=round((now - since) / (step - first) * (self._steps - step))) if step > first else None
        words = [f"step {step:g} of {self._steps}", f"loss {loss:.4f}"]
        words += [f"held out {held_out[-1][1]:.4f}"] if held_out else []
        words += [f"{self._speed:.0f} tokens/s", f"{left} left" if left is not None else ""]
        self._put(client, PROGRESS, "progress", 100 * step / self._steps, ", ".join(filter(None, words)))
        if draw:
            self._put(client, CURVE, "markdown", _picture(learned, held_out), "Loss, nats a token.")
            self._drawn = now

    def _put(self, client: SyncPrefectClient, key: str, kind: str, data: float | str, words: str) -> None:
        if key in self._artifacts:
            client.update_artifact(self._artifacts[key], ArtifactUpdate(data=data, description=words))
            return
        made = client.create_artifact(ArtifactCreate(key=key, type=kind, data=data, description=words, **self._of))
        self._artifacts[key] = made.id


def _picture(learned: charts.Curve, held_out: charts.Curve) -> str:
    """The curve, in Markdown: no server has to keep a file. One of type image would show its whole address too."""
    picture = charts.alone(charts.loss_curve(learned, held_out))
    return f"![loss](data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()})"
