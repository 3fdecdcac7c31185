"""Who may use servers that listen beyond this machine: whoever has one name and password, for Prefect and MLflow alike.

The password is in a file that only its owner can read, or in the environment of `rwkvflow up`. Programs find it in their
environment, which other users of a machine can't see, and never in their arguments, which they can.
"""

import base64
import ipaddress
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import whole_file

USER = "admin"
VARIABLE = "RWKVFLOW_PASSWORD"
FILE = Path(".rwkvflow/password")

_USERS = Path(".rwkvflow/mlflow-users.db")
_SHORTEST = 12  # characters; mlflow.server.auth.sqlalchemy_store takes no shorter one


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other reaches.

    Raises:
        InputError: it is no address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise InputError(
            f"--host {host}",
            "must be an address of this machine",
            "give 127.0.0.1, 0.0.0.0, or one that `ip addr` shows",
        ) from None


def password(home: Path, *, make: bool = False) -> str | None:
    """The password of a main checkout; None if it has none.

    Args:
        home: the main checkout.
        make: make one, if there is none.

    Raises:
        InputError: it is too short.
        WorldError: others can read its file.
    """
    path = home / FILE
    given, where = os.environ.get(VARIABLE), VARIABLE
    if given is None and path.exists():
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise WorldError(str(path), "must be readable by its owner alone", f"chmod 600 {path}")
        given, where = path.read_text(encoding="utf-8").strip(), str(path)
    if given is None and make:
        given, where = secrets.token_urlsafe(24), str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.touch(0o600)
            temporary.chmod(0o600)
            temporary.write_text(f"{given}\n", encoding="utf-8")
    if given is not None and (len(given) < _SHORTEST or ":" in given):
        raise InputError(where, f"must have {_SHORTEST} characters or more, none of them a colon", "set a longer one")
    return given


def of_clients(word: str) -> dict[str, str]:
    """Variables by which Prefect's and MLflow's own clients say who they are."""
    return {
        "PREFECT_API_AUTH_STRING": f"{USER}:{word}",
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": word,
    }


def of_prefect(word: str) -> dict[str, str]:
    """Variables of a Prefect server that lets in nobody else."""
    return {"PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{word}", "PREFECT_API_AUTH_STRING": f"{USER}:{word}"}


def of_mlflow(home: Path, word: str) -> dict[str, str]:
    """Variables of an MLflow server with `--app-name basic-auth`, whose users are in a database of the checkout."""
    settings = home / ".rwkvflow/mlflow-auth.ini"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{home / _USERS}\n"
        f"admin_username = {USER}\n"
        "auth_cache_ttl_seconds = 60\n",  # else each request costs a slow hash
        encoding="utf-8",
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": word,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(24),  # of one process: there is one worker
    }


def header(environment: Mapping[str, str]) -> dict[str, str]:
    """The header of a request to Prefect, by the variables of its client."""
    given = environment.get("PREFECT_API_AUTH_STRING")
    return {"Authorization": f"Basic {base64.b64encode(given.encode()).decode()}"} if given else {}
