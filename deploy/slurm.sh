#!/bin/bash
# The pipeline as a Slurm job, from a checkout that all nodes see; training takes all nodes, the other stages the first.
#   sbatch deploy/slurm.sh                                             one run: rwkvflow run
#   sbatch deploy/slurm.sh rwkvflow run train                          what is behind the script's name instead
#   sbatch deploy/slurm.sh prefect worker start --pool slurm --limit 1  a worker: runs that are started in Prefect
# params.yaml: train.parallel has nodes: 2, devices: null, and a strategy of several processes. docs/past-one-machine.md.
#SBATCH --job-name=rwkv-flow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
[ $# -gt 0 ] || set -- rwkvflow run
export RWKVFLOW_LAUNCH="srun --kill-on-bad-exit python"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch

"$@" &
program=$!
again=
trap 'again=yes; kill -TERM $program' TERM # five minutes before the end
trap 'kill -TERM $program' INT                  # scancel --signal=INT --batch: for good
while kill -0 $program 2>/dev/null; do # a signal ends `wait` early; the program still saves
    wait $program
    code=$?
done
# The next time, it continues where it was. If another job takes the place, the training's processes alone have been told; and
# a job that scancel ends has had TERM too, but is no longer running.
job=$(scontrol show job "$SLURM_JOB_ID")
[[ $code = 0 || $job != *PreemptTime=[0-9]* ]] || again=yes
[[ -z $again || $job != *JobState=RUNNING* ]] || scontrol requeue "$SLURM_JOB_ID"
exit $code
