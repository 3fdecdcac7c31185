"""TensorBoard and Weights & Biases as further views of a training, beside MLflow: what metrics.jsonl says, shown elsewhere.

Neither is ever asked to remember: the file is the truth. TensorBoard's files, and W&B's where it is offline, are written anew
from it whenever a training starts or goes on, so that they have each point once.
"""

import importlib.util
import shutil
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rwkv_core.config import TrackingConfig
from rwkv_core.errors import InputError
from tasks import mirror
from tasks.record import RunRecord

_SECONDS = 2.0  # between two looks at the file
_LEAVE_SECONDS = 30.0
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check(tracking: TrackingConfig) -> None:
    """Refuse, before anything is trained, what is not installed.

    Raises:
        InputError: a package is missing.
    """
    for name in tracking.also:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise InputError(
                f"tracking.also = {name}", "it is not installed", f"pip install 'rwkv-flow[{name}]', or leave it out"
            )


class Also:
    """The loggers of `tracking.also`, fed from a run folder's metrics.jsonl by a thread until all of it is told.

    A logger that fails says so once on stderr, and the training goes on without it.

    Args:
        folder: the run's.
        tracking: which, and their names.
    """

    def __init__(self, folder: Path, tracking: TrackingConfig) -> None:
        self._folder, self._tracking = folder, tracking
        self._leaving = threading.Event()

    def __enter__(self) -> Self:
        self._threads = [
            threading.Thread(target=self._feed, name=name, args=(name,), daemon=True) for name in self._tracking.also
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join(_LEAVE_SECONDS)
            if thread.is_alive():
                _warn(thread.name, "is not done after 30 s, and is left")

    def _feed(self, name: str) -> None:
        try:
            record = RunRecord.read(self._folder)
            logger: _Logger = _KINDS[name](self._folder, record, self._tracking)
            try:
                last = False
                while not last:
                    last = self._leaving.wait(_SECONDS)
                    logger.tell()
            finally:
                logger.close()
        except Exception as error:  # whatever it raises, it is a view
            _warn(name, f"failed: {type(error).__name__}: {error}")


class _Logger(Protocol):
    def __init__(self, folder: Path, record: RunRecord, tracking: TrackingConfig) -> None: ...
    def tell(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in <run folder>/tensorboard: `tensorboard --logdir .rwkvflow/runs` shows all runs."""

    def __init__(self, folder: Path, record: RunRecord, tracking: TrackingConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path, self._offset = folder / mirror.LIVE, 0
        events = folder / "tensorboard"
        shutil.rmtree(events, ignore_errors=True)
        self._writer: Any = SummaryWriter(str(events))

    def tell(self) -> None:
        """Write what is new in the file."""
        for end, points in mirror.live_points(self._path, self._offset):
            for point in points:
                self._writer.add_scalar(point.name, point.value, point.step, walltime=point.time / 1000)
            self._offset = end
        self._writer.flush()

    def close(self) -> None:
        """Write what is in memory."""
        self._writer.close()


class Wandb:
    """A run in the project that is named as MLflow's experiment, with the record's id however often it is continued.

    The service knows which steps it has. WANDB_MODE=offline keeps the run in <run folder>/wandb, which is written anew when the
    training goes on, for a kill takes what W&B had in memory; `wandb sync` sends it. W&B measures the machine itself, so
    system/ is left to it.
    """

    def __init__(self, folder: Path, record: RunRecord, tracking: TrackingConfig) -> None:
        import wandb

        self._path, self._offset = folder / mirror.LIVE, 0
        self._run: Any = wandb.init(
            project=tracking.experiment,
            id=record.id,
            name=mirror.name(record),
            config={"params": record.params, "base": record.base, "data": record.data},
            dir=str(folder),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._first = 0 if self._run.offline else int(self._run.step)
        if self._run.offline:
            for left in folder.glob(f"wandb/offline-run-*-{record.id}"):
                if left.resolve() not in Path(self._run.dir).resolve().parents:
                    shutil.rmtree(left)

    def tell(self) -> None:
        """Log what is new in the file."""
        for end, points in mirror.live_points(self._path, self._offset):
            values = {point.name: point.value for point in points if not point.name.startswith("system/")}
            if values and points[0].step >= self._first:
                self._run.log(values, step=points[0].step)
            self._offset = end

    def close(self) -> None:
        """End the run there; its last step is sent with that."""
        self._run.finish()


_KINDS: dict[str, type[_Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def _warn(name: str, trouble: str) -> None:
    print(f"{name} {trouble}; the run is whole without it", file=sys.stderr, flush=True)
