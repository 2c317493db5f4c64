#!/usr/bin/env bash
# All tests, from a fresh clone: makes the environments, then linters and pytest.
#
#   bash tests/run.sh [PYTEST_ARGUMENT...]          all tests, or those that the arguments select
#   bash tests/run.sh quick [PYTEST_ARGUMENT...]    linters and the tests that are not marked slow: about a minute
#   bash tests/run.sh faults [--only TEXT ...]      trials with real faults (tests/faults.py): about two hours
#
# FUZZ_EXAMPLES=100000 sets the number of random cases of each test that makes some (docs/reliability.md).
set -euo pipefail

cd "$(dirname "$0")/.."
if [[ ${1-} == quick ]]; then
  shift
  set -- -m "not slow" "$@"
fi
bash scripts/make_env.sh test requirements-cosyvoice.txt requirements-asr.txt tests/requirements.txt
bash scripts/make_env.sh trainer requirements-verl.txt
bin=$PWD/.venv/test/bin
export PATH=$bin:$PATH PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ ${1-} == faults ]]; then
  exec python -m tests.faults "${@:2}"
fi
# The report is looked at in a browser; where there is none, those tests are skipped and say so.
if ! { command -v chromium && command -v chromedriver; } >/dev/null && ((EUID == 0)) && command -v apt-get >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium chromium-driver; } \
    >/dev/null || echo "chromium and chromium-driver could not be installed" >&2
fi

mapfile -t shell_files < <(git ls-files '*.sh' .ci/run)
echo "== ruff, shellcheck, shfmt"
ruff check .
ruff format --check .
shellcheck "${shell_files[@]}"
shfmt -i 2 -d "${shell_files[@]}"
echo "== pytest"
# Two at once, a file's tests by one of them: many wait for a server or for Ray to start. Longest files first.
python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
