#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs until it is finished, whatever happens to the slice:
#
#   NAME=gcvit-b ZONE=us-west4-a TYPE=v5litepod-64 NFS=10.0.0.2:/share launch/tpu_vm.sh \
#     --config=configs/gcvit_b.py --workdir=/mnt/share/gcvit_b --config.dataset.path=/mnt/share/imagenet
#
# It runs on your machine, in a checkout of this repository; what is committed there is what trains.
# It asks for the slice (a queued resource), installs on all hosts, starts the same command on all of
# them, and asks for the slice again when it was preempted. Stop it and start it as you like: it
# finds the slice and the training that is under way. docs/pods.md tells the whole story.
#
#   NAME, ZONE       of the slice            TYPE      v5litepod-64, v6e-64, v4-64, …
#   RUNTIME          software of the VMs     SPOT=0    not as Spot VMs, which are preempted
#   NFS              export to be mounted at /mnt/share; empty: the hosts see your disks already
#   MAX_ATTEMPTS     starts in a row without a new checkpoint before it gives up
#   POLL             seconds between two looks   KEEP=1  do not delete the slice when finished
#
# Written to https://docs.cloud.google.com/tpu/docs/queued-resources (states, create, delete) and
# https://docs.cloud.google.com/tpu/docs/jax-pods (ssh --worker=all).
set -uo pipefail

: "${NAME:?}" "${ZONE:?}" "${TYPE:?}"
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT:-1} NFS=${NFS:-} MAX_ATTEMPTS=${MAX_ATTEMPTS:-5} POLL=${POLL:-30} KEEP=${KEEP:-0}

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on() { # WORKER COMMAND: on one host, or on "all"
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}
say() { echo "$(date +%H:%M:%S) $*"; }

workdir=
for argument; do [[ $argument == --workdir=* ]] && workdir=${argument#*=}; done
[[ $workdir ]] || { echo "error: --workdir is missing"; exit 2; }
arguments=$(printf '%q ' "$@") # for a shell on the hosts, as is all that is quoted so below
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD || exit 2

have_slice() { # returns when the slice is there; fails when it cannot be had
  local state before=
  while true; do
    state=$(queue describe --format='value(state.state)' 2>/dev/null) || state=none
    [[ $state == "$before" ]] || say "slice $NAME: $state"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      none)
        queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" \
          $([[ $SPOT == 1 ]] && echo --spot) || return 1 ;;
      SUSPENDED) queue delete --quiet --force || return 1 ;; # preempted: it never comes back
      FAILED) queue describe; return 1 ;;
    esac
    sleep "$POLL"
  done
}

install() { # on all hosts; fails when one of them does not answer
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:hybrid_flax.tar.gz" --zone="$ZONE" --worker=all &&
    on all "mkdir -p hybrid_flax && tar -xzf hybrid_flax.tar.gz -C hybrid_flax &&
            bash hybrid_flax/launch/tpu_vm_host.sh install $(printf '%q' "$NFS")"
}

statuses() { # of all hosts, one a line: running, gone, or an exit status
  on all "bash hybrid_flax/launch/tpu_vm_host.sh status" 2>/dev/null | sed -n 's/^status=//p'
}

newest() { # step of the newest checkpoint
  on 0 "bash hybrid_flax/launch/newest.sh $(printf '%q' "$workdir")" | grep -E '^[0-9]+$'
}

watch_hosts() { # until no host is running, or one has stopped and the others do not follow it
  local now patience=20
  while true; do
    now=$(statuses) || true
    if [[ ! $now ]]; then
      [[ $(queue describe --format='value(state.state)' 2>/dev/null) == ACTIVE ]] || return 1
      ((patience--)) || return 1
    elif ! grep -q running <<<"$now"; then
      break
    elif grep -qv running <<<"$now" && ! ((patience--)); then
      say "some hosts have stopped, others have not: stopping them"
      on all "bash hybrid_flax/launch/tpu_vm_host.sh stop" || true
    fi
    sleep "$POLL"
  done
  ended=$now
}

logs() { # what each host printed, into logs/NAME/HOST.log
  mkdir -p "logs/$NAME"
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="cat train.log" --output-directory="logs/$NAME" || true
}

finish() { # STATUS: deletes the slice if the run is finished
  if [[ $1 == 0 && $KEEP == 0 ]]; then
    queue delete --quiet --force
  else
    say "the slice is still there, and paid for, until you delete it:" \
      "gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
  fi
  exit "$1"
}

attempt=0 known=unknown
while true; do
  have_slice || { say "error: no slice; nothing was started"; exit 1; }
  if ! grep -q running <<<"$(statuses)"; then
    if ! install; then
      ((++attempt < MAX_ATTEMPTS)) || { say "error: cannot install on the hosts"; finish 1; }
      sleep "$POLL"
      continue
    fi
    step=$(newest) || true
    [[ $step == "$known" ]] || attempt=0
    known=$step
    if ((attempt++ == MAX_ATTEMPTS)); then
      say "error: no new checkpoint in $MAX_ATTEMPTS starts; see logs/$NAME"
      finish 1
    fi
    say "starting, newest checkpoint: ${step:-none}"
    on all "bash hybrid_flax/launch/tpu_vm_host.sh start $arguments" || continue
  fi
  ended=
  watch_hosts || { say "the slice is gone or does not answer"; continue; }
  logs
  say "exit statuses:" $ended
  # Exit statuses of hybrid_flax.main: 0 finished, 2 something that you can mend. After anything
  # else it is started again: 143 saved on SIGTERM, 124 stalled, 1 stopped, or what a dead host does
  # to the others. Whatever fails every time makes no new checkpoint, and ends above.
  if ! grep -qvx 0 <<<"$ended"; then
    say "finished"
    finish 0
  elif grep -qx 2 <<<"$ended"; then
    grep -h '^error:' "logs/$NAME"/*.log | sort -u
    finish 2
  fi
done
