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
export RWKVFLOW_LAUNCH="srun python"

"$@" &
program=$!
asked=
trap 'asked=yes; kill -TERM $program' TERM # five minutes before the end, and when another job takes the place
while kill -0 $program 2>/dev/null; do # a signal ends `wait` early; the program still saves
    wait $program
    code=$?
done
[ -z "$asked" ] || scontrol requeue "$SLURM_JOB_ID" # the next time, it continues where it was
exit $code
