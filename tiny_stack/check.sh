#!/usr/bin/env bash
# Measure the tiny stack on held-out sentences (a minute on 2 cores). Prints a table, then one line of JSON.
#
#   bash tiny_stack/check.sh
#
# Variables: assets_dir (folder of the tiny stack), python (interpreter of the speech environment; made if not set).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
assets_dir=$(realpath "${assets_dir:-$root/assets/tiny}")
cd "$root"
if [[ -z ${python:-} ]]; then
  bash scripts/make_env.sh speech requirements-cosyvoice.txt
  python=$root/.venv/speech/bin/python
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m tiny_stack.check --assets-dir "$assets_dir"
