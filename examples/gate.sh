#!/usr/bin/env bash
# A pipeline's gate: status 0 fits with a tenth of each GPU free, 1 does not fit, 2 the input is wrong, 3 no answer in time.
set -uo pipefail

planner=$(command -v planner || echo "$(dirname "$0")/../scripts/planner")
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

"$planner" search --model llama-2-70b --gpus 8x8xH100 --headroom 10% --json > "$answer"
status=$?
case $status in
  0) python3 -c 'import json, sys; print("queue it as", json.load(open(sys.argv[1]))["plans"][0]["layout"])' "$answer" ;;
  1) echo "do not queue it: it does not fit" >&2 ;;
  3) echo "give it more time with --time-limit" >&2 ;;
  *) echo "mend the job first" >&2 ;;
esac
exit $status
