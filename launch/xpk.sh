#!/usr/bin/env bash
# Trains on a GKE cluster that XPK made, on one slice or several, and starts again after failures:
#
#   CLUSTER=tpus ZONE=us-east5-b NAME=gcvit-b TYPE=v6e-64 STORAGE=share IMAGE=… launch/xpk.sh \
#     --config=configs/gcvit_b.py --workdir=/mnt/share/gcvit_b --config.dataset.path=/mnt/share/imagenet
#
# IMAGE is launch/Dockerfile, built and pushed; STORAGE is what `xpk storage` made or attached.
# Without XPK: launch/jobset.yaml, which is what this comes to. docs/pods.md tells the whole story.
# Flags: https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md
set -euo pipefail
: "${CLUSTER:?}" "${ZONE:?}" "${NAME:?}" "${TYPE:?}" "${STORAGE:?}" "${IMAGE:?}"

# XPK starts again after the statuses 42 and 127-255: 143 and 130, saved when asked to stop, and 137,
# killed. Added are 124, stalled, and 1, how processes end whose neighbour is gone. 0 and 2 end it.
# `exec`, because XPK sends SIGTERM to a shell, which would keep it to itself.
xpk workload create \
  --cluster="$CLUSTER" --zone="$ZONE" --workload="$NAME" \
  --tpu-type="$TYPE" --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts="${MAX_RESTARTS:-50}" --restart-on-exit-codes=1,124 \
  --termination-grace-period-seconds=120 \
  --command="exec python -m hybrid_flax.main $(printf '%q ' "$@")"
