"""Training: the loss, the schedule, the steps and what happens between them."""

import contextlib
import importlib
import sys
from importlib.metadata import PackageNotFoundError

from lightning_utilities.core import imports


def _import_torchmetrics() -> None:
    """Import torchmetrics, as Lightning does, and of what it takes along only what training uses.

    For metrics that no training here computes it imports these packages, where they are installed, and they take longer than
    torch. It is told that they are not, as it may be on any machine; nobody else is.
    """
    away = {"scipy", "transformers", "matplotlib"} - set(sys.modules)
    names = vars(imports)
    version = names.get("_version")
    if version is None:  # another release of lightning_utilities
        return

    def installed(name: str) -> str:
        if name in away:
            raise PackageNotFoundError(name)
        return str(version(name))

    names["_version"] = installed
    # None says that it can't be imported
    sys.modules.update(dict.fromkeys(away))  # type: ignore[arg-type]
    try:
        with contextlib.suppress(ImportError):  # Lightning will say so, if it is the same for it
            importlib.import_module("torchmetrics")
    finally:
        names["_version"] = version
        for name in away:
            del sys.modules[name]


_import_torchmetrics()
