# shellcheck shell=bash disable=SC2034,SC2154  # run.sh's settings
# Evaluation "mair-hub": the newest tables of mair-hub, as "seed", but of texts without quotes and brackets.
# Source: infer_dataset.py of github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm (374bc49).

eval_strip_quotes=${eval_strip_quotes:-1}

# shellcheck source=conf/evaluations/seed.sh
source "$root/conf/evaluations/seed.sh"
