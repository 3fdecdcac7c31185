"""What the programs that are started here find in their environment, and where the servers are."""

import os
import sys
from pathlib import Path

from tasks.record import main_root

PREFECT_API = "http://127.0.0.1:4200/api"
MLFLOW = "http://127.0.0.1:5000"

RETRAIN_CRON = "RWKVFLOW_RETRAIN_CRON"
"""Environment variable by which `rwkvflow up` tells when to retrain; a schedule made in the UI stays where it is not set."""

LOGS = Path(".rwkvflow/logs")
"""What stages and servers print, one file each, under the folder they work in."""


def defaults(root: Path) -> dict[str, str]:
    """Settings for Prefect, MLflow and DVC: nothing is reported to anyone, and nothing is written outside `root`."""
    return {
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # a server of its own costs each process 10 s and more
        "PREFECT_HOME": str(main_root(root) / ".rwkvflow/prefect"),
        "PREFECT_CLI_PROMPT": "false",
        "PYTHONUNBUFFERED": "1",  # a line reaches the log when it is printed
        "PATH": _path(),
    }


def set_defaults(root: Path) -> None:
    """Put `defaults` into this process's environment. What a person has set stays, PATH is only added to."""
    for name, value in defaults(root).items():
        if name == "PATH":
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)


def _path() -> str:
    """PATH with this interpreter's folder in front: dvc.yaml says `python`, and means this one."""
    here, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return path if path.split(os.pathsep)[0] == here else f"{here}{os.pathsep}{path}"
