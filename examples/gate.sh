#!/usr/bin/env bash
# A pipeline's gate: the exit status says whether the job fits with a tenth of each GPU free.
set -euo pipefail

if planner search --model llama-2-70b --gpus 8x8xH100 --headroom 10% --json > plan.json; then
  python3 - <<'PY'
import json

plan = json.load(open("plan.json"))["plans"][0]
print("queue it:", {name: plan["layout"][name] for name in ("tensor_parallel", "pipeline_parallel")})
PY
else
  echo "do not queue it" >&2
  exit 1
fi
rm plan.json
