#!/usr/bin/env bash
# Trains on GPU nodes under SLURM until it is finished, through preemption and time limits:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/gcvit_b.py --workdir=/shared/gcvit_b
#
# Submit it from a checkout of this repository that has a .venv (`make .venv/installed`, then
# `.venv/bin/pip install "jax[cuda13]"`), on a file system that all nodes see. docs/pods.md tells
# the whole story. Options: https://slurm.schedmd.com/sbatch.html, https://slurm.schedmd.com/srun.html
#
#SBATCH --job-name=hybrid_flax
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
# One process for each GPU, and every process sees all GPUs of its node: JAX gives the process with
# SLURM_LOCALID=3 the fourth of them (jax/_src/clusters/slurm_cluster.py). With --gpus-per-task it
# would see one only, and look for the fourth of it.
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
# SIGTERM to the processes (not to this script) five minutes before the time limit: they save, end
# with status 143, and the job goes back into the queue below. --requeue lets SLURM do the same when
# it preempts the job or a node fails.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -uo pipefail

MAX_ATTEMPTS=${MAX_ATTEMPTS:-5} # starts in a row without a new checkpoint before it gives up
cd "${SLURM_SUBMIT_DIR:?"submit this file: sbatch launch/slurm.sh --config=… --workdir=…"}" || exit 2

workdir=
for argument; do [[ $argument == --workdir=* ]] && workdir=${argument#*=}; done
[[ $workdir ]] || { echo "error: --workdir is missing"; exit 2; }

# What the start before this one found: its newest checkpoint, and how many starts had found it.
record=slurm-$SLURM_JOB_ID.attempts
newest=$(bash launch/newest.sh "$workdir")
read -r known attempt <"$record" 2>/dev/null || known=unknown
[[ $known == "${newest:-none}" ]] || attempt=0
if ((attempt++ == MAX_ATTEMPTS)); then
  echo "error: no new checkpoint in $MAX_ATTEMPTS starts; newest: ${newest:-none}"
  exit 1
fi
echo "${newest:-none} $attempt" >"$record"
echo "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, newest checkpoint: ${newest:-none}"

# The processes agree on when to stop: none may be killed because another was quicker, for it may
# be saving. One that hangs all the same is killed ten minutes after the first has ended.
srun --kill-on-bad-exit=0 --wait=600 --label .venv/bin/python -m hybrid_flax.main "$@"
status=$?

# Exit statuses of hybrid_flax.main: 0 finished, 2 something that you can mend. After anything else
# the job starts again: 143 saved on SIGTERM, 124 stalled, 1 stopped, or what a dead node does to
# the others. Whatever fails every time makes no new checkpoint, and ends above.
case $status in
  0) rm -f "$record"; echo "finished" ;;
  2) echo "stopped: mend what the error above names, then submit again" ;;
  *) echo "status $status: back into the queue"; scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
