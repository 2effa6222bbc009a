#!/usr/bin/env bash
# What tpu_vm.sh runs on each host of a slice: install [NFS] | start ARGUMENTS | status | stop
set -euo pipefail
cd ~/hybrid_flax

case $1 in
  install)
    if [[ ${2:-} ]] && ! mountpoint -q /mnt/share; then
      sudo apt-get install -y -q nfs-common
      sudo mkdir -p /mnt/share
      sudo mount -t nfs "$2" /mnt/share
    fi
    if [[ ! -x .venv/bin/python ]]; then # the image's own Python is too old
      pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python=3.12 .venv
    fi
    .venv/bin/python -m pip install --quiet -r requirements.txt "jax[tpu]"
    ;;
  start) # in a session of its own: it outlives this connection
    rm -f ~/status ~/pid
    setsid bash -c '
      trap "" HUP
      .venv/bin/python -m hybrid_flax.main "$@" >>~/train.log 2>&1 &
      echo $! >~/pid
      wait $!
      echo $? >~/status' bash "${@:2}" </dev/null >/dev/null 2>&1 &
    until [[ -f ~/pid ]]; do sleep 0.1; done
    ;;
  status)
    if [[ -f ~/status ]]; then
      echo "status=$(cat ~/status)"
    elif [[ -f ~/pid ]] && kill -0 "$(cat ~/pid)" 2>/dev/null; then
      echo status=running
    else
      echo status=gone # never started, or the host was restarted
    fi
    ;;
  stop)
    kill "$(cat ~/pid)" 2>/dev/null && sleep 60
    kill -9 "$(cat ~/pid)" 2>/dev/null || true
    ;;
esac
