#!/bin/bash
# Batch runs on a SLURM cluster, one process to a GPU:
#
#   sbatch deploy/slurm.sh prompts.csv outputs/run
#   sbatch --nodes=4 --ntasks-per-node=8 deploy/slurm.sh prompts.csv outputs/run --steps 30
#
# Each process takes the next batch of images when it is free. What is finished stays: after a preemption, a
# lost machine or the end of the time limit the job is queued again and makes what is missing. The output
# folder has to be one that all machines see. Submit from the repository's folder, or set TOOLKIT to it.
#SBATCH --job-name=images
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=4G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGUSR1 comes to this script three minutes before the time limit
#SBATCH --signal=B:USR1@180
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch $0 INPUT.csv|INPUT.json|FOLDER OUTDIR [options of scripts/batch_score.py]" >&2
    exit 2
fi
input=$1 outdir=$2
shift 2
cd "${TOOLKIT:-${SLURM_SUBMIT_DIR:-.}}"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python

# shellcheck disable=SC2329  # the trap calls it
again() {
    trap - USR1 TERM
    kill -TERM "$step" || true # the images in hand are finished, and saved
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1

# --resume starts a run where there is none
srun --gpus-per-task=1 --kill-on-bad-exit=0 \
    "$python" scripts/batch_score.py --input "$input" --outdir "$outdir" --resume "$@" &
step=$!
# On preemption SLURM sends SIGTERM and queues the job again by itself.
trap 'kill -TERM "$step"' TERM
status=0
wait "$step" || status=$?
# a trap ends the first wait, not the step
if kill -0 "$step" 2>/dev/null; then
    status=0
    wait "$step" || status=$?
fi
exit "$status"
