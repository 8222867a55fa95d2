#!/bin/bash
# Batch runs on a SLURM cluster, one process to a GPU:
#
#   sbatch deploy/slurm.sh prompts.csv outputs/run
#   sbatch --nodes=4 --ntasks-per-node=8 deploy/slurm.sh prompts.csv outputs/run --steps 30
#
# Each process takes the next batch of images when it is free. What is finished stays: after a preemption, a
# lost machine or the end of the time limit the job is queued again and makes what is missing. The output
# folder has to be one that all machines see. Submit from the repository's folder, or set TOOLKIT to it;
# relative names are in the folder that sbatch was called from.
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
# SIGUSR1 comes to this script three minutes before the time limit: more than a batch of images takes
#SBATCH --signal=B:USR1@180
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch deploy/slurm.sh INPUT.csv|INPUT.json|FOLDER OUTDIR [batch_score.py's options]" >&2
    exit 2
fi
input=$1 outdir=$2
shift 2
toolkit=${TOOLKIT:-$PWD}
if [ ! -f "$toolkit/scripts/batch_score.py" ]; then
    echo "no scripts/batch_score.py in $toolkit: submit from the repository's folder, or set TOOLKIT" >&2
    exit 2
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
python=python
[ -x "$toolkit/.venv/bin/python" ] && python=$toolkit/.venv/bin/python

# scancel signals the tasks, which finish the images in hand; srun, sent SIGTERM, would have them killed.
expiring='' ended=''
expire() {
    if ((SECONDS < 60)); then # the limit is less than four minutes: queued again it would never get further
        echo "the time limit is too short for the job to be queued again: give it more than 4 minutes" >&2
        return 0 # without a number it would be that of the wait, and end the script
    fi
    expiring=1
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}
trap expire USR1
# SLURM sends SIGTERM to script and tasks alike, and cancels the job or queues it again by itself.
trap 'ended=1' TERM

# --resume starts a run where there is none. A process that ends, well or badly, does not end the others.
srun --gpus-per-task=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=0 \
    "$python" "$toolkit/scripts/batch_score.py" --input "$input" --outdir "$outdir" --resume "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a trap ends the wait, not the step
done
status=0
wait "$step" || status=$?

# SIGTERM to the tasks alone (130, or 143 while they load) is a preemption that leaves them time to end. SLURM
# does not queue a job again that ends within that time.
case $status in 130 | 143) interrupted=1 ;; *) interrupted=$expiring ;; esac
if [ -n "$interrupted" ] && [ -z "$ended" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
