"""Training on several machines as deploy/ starts it, with two processes of this machine for two machines."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import servers
from miniature import free_port, wait_until
from project import ROOT, Project, make
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
    (project.root / ".venv/bin/scontrol").write_text('#!/bin/sh\necho "$@" >> "$CALLED"\necho JobState=RUNNING\n')
    (project.root / ".venv/bin/scontrol").chmod(0o755)
    called = tmp_path / "called"
    variables = {"SLURM_SUBMIT_DIR": str(project.root), "SLURM_JOB_ID": "7", "CALLED": str(called)}
    script = ["bash", str(ROOT / "deploy/slurm.sh")]
    ended = project.run(*script, "sh", "-c", 'echo "$RWKVFLOW_LAUNCH"; exit 3', check=False, **variables)
    assert (ended.returncode, ended.stdout) == (3, "srun --kill-on-bad-exit python\n")
    saves = "import signal, sys, time\nsignal.signal(15, lambda *_: (time.sleep(1), print('saved'), sys.exit(130)))\n"
    saves += "print('begun', flush=True)\ntime.sleep(600)"
    for asked in (signal.SIGINT, signal.SIGTERM):  # to end for good, and to make room
        assert "requeue" not in called.read_text()
        job = subprocess.Popen(
            [*script, sys.executable, "-c", saves],
            env=project.environment | variables, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert job.stdout.readline() == "begun\n"
        job.send_signal(asked)
        assert job.communicate()[0].startswith("saved\n")
        assert job.returncode == 130
    assert called.read_text().endswith("requeue 7\n")
    (project.root / ".venv/bin/scontrol").unlink()


slurm = pytest.mark.skipif(not shutil.which("slurmctld"), reason="Slurm is not installed: apt-get install slurm-wlm")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes, and a partition whose jobs take the place of the other's."""
    partitions = [
        "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120", "PartitionName=high Nodes=ALL PriorityTier=2",
        "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE",
    ]  # fmt: skip
    with servers.slurm(tmp_path_factory.mktemp("slurm"), 2, *partitions) as variables:
        yield variables


class Job:
    """A training on the cluster, as `sbatch deploy/slurm.sh` submits it; one process for each node's eight."""

    def __init__(self, project, root, cluster):
        self.project = Project(shutil.copytree(project.root, root, symlinks=True), project.environment | cluster)
        shutil.rmtree(root / ".rwkvflow/runs", ignore_errors=True)  # other tests' trainings, that `reaches` would see
        self.project.set(train__epochs=20)
        words = ["--parsable", "--ntasks-per-node=1", "deploy/slurm.sh", "rwkvflow", "run", "train"]
        self.id = self.project.run("sbatch", *words).stdout.strip()

    def about(self, name):
        """What Slurm knows of the job."""
        words = self.project.run("scontrol", "show", "job", self.id).stdout.split()
        return next(word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}="))

    def printed(self):
        return (self.project.root / f"slurm-{self.id}.out").read_text()

    def reaches(self, step):
        def reached():
            assert self.about("JobState") in ("PENDING", "RUNNING"), self.printed()
            return any(
                path.read_text().count("\n") >= step
                for path in self.project.root.glob(".rwkvflow/runs/*/metrics.jsonl")
            )

        wait_until(reached, 600)

    def is_put_back(self, restarts):
        """It waits in the queue again: let it not wait for the minutes that Slurm would have it wait."""
        wait_until(lambda: self.about("JobState") == "PENDING", 300)
        assert self.about("Restarts") == str(restarts), self.printed()
        assert self.printed().count("stopped and saved after step") == restarts, self.printed()
        time.sleep(2)  # what would start in the second in which the last run was ended is taken for that one, and fails
        self.project.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def ends(self):
        wait_until(lambda: self.about("JobState") not in ("PENDING", "RUNNING", "COMPLETING"), 600)
        return self.about("JobState")


@slurm
def test_a_job_that_was_stopped_twice_ends_with_the_bytes_of_one_that_was_not(project, cluster, tmp_path):
    job = Job(project, tmp_path / "stopped", cluster)
    job.reaches(10)
    job.project.run("scancel", "--signal=TERM", "--batch", job.id)  # what Slurm does when the time is nearly over
    job.is_put_back(1)
    job.reaches(40)
    job.project.run("sbatch", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    job.is_put_back(2)
    assert job.ends() == "COMPLETED", job.printed()
    assert job.printed().count("; 2 processes; ") == 3
    whole = Job(project, tmp_path / "whole", cluster)
    assert whole.ends() == "COMPLETED", whole.printed()
    for name in ("adapter.pth", "history.csv"):
        assert (job.project.root / "outputs/train" / name).read_bytes() == (
            whole.project.root / "outputs/train" / name
        ).read_bytes()
    assert "up to date" in job.project.dvc("status", "train").stdout


@slurm
def test_a_cancelled_job_is_not_put_back(project, cluster, tmp_path):
    job = Job(project, tmp_path / "cancelled", cluster)
    job.reaches(10)
    job.project.run("scancel", job.id)
    assert job.ends() == "CANCELLED", job.printed()
    assert job.about("Restarts") == "0"
    assert "stopping after this step" in job.printed()
    assert list(job.project.root.glob(".rwkvflow/runs/*/last.ckpt"))
