"""Training on several machines as deploy/ starts it, with two processes of this machine for two machines."""

import subprocess
import sys

import pytest
from miniature import free_port
from project import ROOT, make
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow

DDP = {"strategy": "ddp", "devices": None, "nodes": 2, "bucket_mb": 25}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose data is prepared; its programs are those of its own checkout."""
    project = make(tmp_path_factory.mktemp("machines") / "project")
    project.dvc("repro", "prepare")
    project.set(train__parallel=DDP)
    programs = project.root / ".venv/bin"
    programs.mkdir(parents=True)
    for name, module in (("rwkvflow", "flows.cli"), ("torchrun", "torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    project.environment["PATH"] = f"{programs}:{project.environment['PATH']}"
    return project


def test_the_pods_of_the_job_train_together_and_dvc_knows(project):
    _, job = YAML(typ="safe").load_all(ROOT / "deploy/kubernetes-train.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completions"] == int(variables["MACHINES"]) == DDP["nodes"]
    variables |= {"CARDS": "1", "FIRST": "127.0.0.1", "PORT": str(free_port())}
    pods = [
        subprocess.Popen(
            [*container["command"], *container["args"]],
            cwd=project.root,
            env=project.environment | variables | {"JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    said = [pod.communicate()[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], "\n".join(said)
    assert "Running stage 'train'" in said[0]
    steps = (project.root / "outputs/train/history.csv").read_text().count("\n") - 1
    assert steps == 6  # 45 rows in 12 batches of one process, in half as many of two
    assert "up to date" in project.dvc("status", "train").stdout


def test_a_launcher_that_is_not_there_is_explained(project):
    failed = project.stage("train", check=False, RWKVFLOW_LAUNCH="no-such-launcher --nodes 2")
    assert failed.returncode == 1
    assert "RWKVFLOW_LAUNCH = no-such-launcher: can't be started" in failed.stdout


def test_the_slurm_script_saves_is_put_back_and_passes_the_code_on(project, tmp_path):
    """Slurm's own programs are stood in for; bash and the signals are real."""
    (project.root / ".venv/bin/scontrol").write_text('#!/bin/sh\necho "$@" > "$CALLED"\n')
    (project.root / ".venv/bin/scontrol").chmod(0o755)
    called = tmp_path / "called"
    variables = {"SLURM_SUBMIT_DIR": str(project.root), "SLURM_JOB_ID": "7", "CALLED": str(called)}
    script = ["bash", str(ROOT / "deploy/slurm.sh")]
    ended = project.run(*script, "sh", "-c", 'echo "$RWKVFLOW_LAUNCH"; exit 3', check=False, **variables)
    assert (ended.returncode, ended.stdout) == (3, "srun python\n")
    assert not called.exists()
    saves = "import signal, sys, time\nsignal.signal(15, lambda *_: (time.sleep(1), print('saved'), sys.exit(130)))\n"
    saves += "print('begun', flush=True)\ntime.sleep(600)"
    job = subprocess.Popen(
        [*script, sys.executable, "-c", saves],
        env=project.environment | variables, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert job.stdout.readline() == "begun\n"
    job.terminate()
    assert job.communicate()[0] == "saved\n"
    assert job.returncode == 130
    assert called.read_text() == "requeue 7\n"
