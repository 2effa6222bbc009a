#!/usr/bin/env bash
# Step of the newest checkpoint in a work directory, if there is one: newest.sh WORKDIR
cd "$(dirname "$0")/.." || exit # as the run, whose folder may be a relative one
case $1 in
  *://*) .venv/bin/python -m hybrid_flax.run.checkpoints "$1" ;;
  *) ls -- "$1/checkpoints" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -1 ;;
esac
