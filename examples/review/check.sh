#!/usr/bin/env bash
# Plans the job file, says what changed since a revision (if one is named), and holds it against limits.
# Status 0: it fits within them; 1: it does not; 2: the job file is wrong.
set -uo pipefail
cd "$(dirname "$0")"
planner=$(command -v planner || echo ../../scripts/planner)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

plan() { # a job that does not fit has its nearest plan, to show and to check
  "$planner" search --job "$1" --json > "$2"
  local status=$?
  [ $status -le 1 ] || { cat "$2" >&2; exit $status; }
}

plan job.yaml "$work/after.json"
if [ -n "${1:-}" ] && git show "$1:./job.yaml" > "$work/job.yaml"; then
  plan "$work/job.yaml" "$work/before.json"
  "$planner" diff "$work/before.json" "$work/after.json"
fi
"$planner" check "$work/after.json" --max-gpus 64 --min-headroom 0% --max-days 180
