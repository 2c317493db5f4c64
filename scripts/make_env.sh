#!/usr/bin/env bash
# Make one of the recipe's virtual environments, or rebuild it if it is out of date. Does nothing if it is up to date.
#
#   bash scripts/make_env.sh NAME REQUIREMENTS...
#
#   NAME          folder under .venv, such as speech
#   REQUIREMENTS  lock files by requirements/lock.sh, with version and hashes of every package. Lines marked
#                 "# no-hash" (torch) are installed last, together with their missing dependencies
#
# Variables: base_python (Python 3.11 or 3.12 for the environments), venv_root (folder of the environments).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
base_python=${base_python:-python3}
venv_root=${venv_root:-$root/.venv}
min_free_gib=10
imported=(
  transformers.models.qwen2.modeling_qwen2 torch.distributed.run pandas
  funasr librosa onnxruntime resemblyzer scipy.stats swift_f0 pytriton.triton pytriton.client
  verl.trainer.main_ppo verl.trainer.ppo.v1 verl.workers.engine_workers torch.utils.tensorboard
  verl.workers.rollout.vllm_rollout.vllm_async_server # needs vLLM, which only GPU machines have
)

die() {
  echo "make_env.sh: $*" >&2
  exit 1
}

check_machine() {
  "$base_python" -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 13))' ||
    die "needs Python 3.11.5 or later, or 3.12, but '$base_python' is $("$base_python" --version 2>&1): set base_python=/path/to/python3.11"
  "$base_python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "'$base_python' cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)"
  local free_gib
  free_gib=$(df -BG --output=avail "$venv_root" | tail -n 1 | tr -dc '0-9')
  ((free_gib >= min_free_gib)) || die "$venv_root has $free_gib GiB free, $min_free_gib are needed: set venv_root"
}

# mend_torchaudio PYTHON: remove torchaudio's compiled libraries if torchaudio cannot be imported. They do not load with
# every build of torch, such as the CPU build. funasr needs only torchaudio's Python code, which works without them.
# An environment without torchaudio is not changed.
mend_torchaudio() {
  "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torchaudio") is not None)' && return
  "$1" -c 'import torchaudio' 2>/dev/null && return
  local lib
  lib=$("$1" -c 'import importlib.util as u; print(u.find_spec("torchaudio").submodule_search_locations[0])')/lib
  rm -f "$lib"/*.so
  "$1" -c 'import torchaudio' || die "torchaudio does not import beside this torch"
}

install() {
  local dir=$1
  shift
  PIP_ROOT_USER_ACTION=ignore "$dir/bin/python" -m pip install -qq --disable-pip-version-check --no-compile "$@" &
  wait $!
}

# compile_imported PYTHON: import what the stages import, so that Python compiles it. pip would compile all modules, which
# takes three times as long. Modules of the other environment are skipped, and so is what cannot be imported here.
compile_imported() {
  env -u PYTHONDONTWRITEBYTECODE "$1" -c '
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        pass' "${imported[@]}" >/dev/null 2>&1 &
  wait $! || true
}

main() {
  (($# >= 2)) || {
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
  }
  local name=$1 dir=$venv_root/$1 key
  shift
  mkdir -p "$venv_root"
  key=$({ "$base_python" --version && cat "$@" "$0"; } | sha256sum | cut -d ' ' -f 1)
  [[ -f $dir/.done && $(cat "$dir/.done") == "$key" ]] && return
  check_machine
  echo "environment $name: installing into $dir (2 GiB, about 2 minutes; on a GPU machine with CUDA libraries 7 GiB)" >&2
  rm -rf "$dir"
  "$base_python" -m venv "$dir"
  trap 'kill $! 2>/dev/null; exit 143' INT TERM # otherwise bash would exit while pip goes on running
  sed '/# no-hash/d' "$@" >"$dir/requirements.txt"
  install "$dir" --require-hashes --no-deps -r "$dir/requirements.txt"
  sed -n '/# no-hash/p' "$@" >"$dir/no-hash.txt"
  [[ ! -s $dir/no-hash.txt ]] || install "$dir" --no-warn-conflicts -r "$dir/no-hash.txt"
  mend_torchaudio "$dir/bin/python"
  compile_imported "$dir/bin/python"
  echo "$key" >"$dir/.done"
}

main "$@"
