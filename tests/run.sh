#!/usr/bin/env bash
# All tests, from a fresh clone: makes the environments, then linters and pytest.
#
#   bash tests/run.sh [PYTEST_ARGUMENT...]
set -euo pipefail

cd "$(dirname "$0")/.."
bash scripts/make_env.sh test requirements-cosyvoice.txt requirements-asr.txt tests/requirements.txt
bash scripts/make_env.sh trainer requirements-verl.txt
bin=$PWD/.venv/test/bin
export PATH=$bin:$PATH PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

mapfile -t shell_files < <(git ls-files '*.sh' .ci/run)
echo "== ruff, shellcheck, shfmt"
ruff check .
ruff format --check .
shellcheck "${shell_files[@]}"
shfmt -i 2 -d "${shell_files[@]}"
echo "== pytest"
python -m pytest -q "$@"
