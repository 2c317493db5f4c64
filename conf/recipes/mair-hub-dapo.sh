# shellcheck shell=bash disable=SC2034,SC2154  # read by run.sh and scripts/full_size.sh
# Recipe "mair-hub-dapo": DAPO on Emilia's Chinese texts.
# Source: github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm/run_dapo.sh at commit 374bc49.
# Published CER: test_zh 0.83%, zero_shot_zh 2.71% (step 700).
# What it cannot reproduce is in docs/differences.md.

# training: without the penalty on long rollouts
algorithm=${algorithm:-dapo} overlong_percent=${overlong_percent:-0}
total_steps=${total_steps:-700}
max_response_length=${max_response_length:-2048}
recipe_verl_args=(
  actor_rollout_ref.actor.optim.lr_warmup_steps=10
  actor_rollout_ref.actor.optim.weight_decay=0.1
  algorithm.filter_groups.max_inflight_gen_batches=3
)

# shellcheck source=conf/recipes/mair-hub.sh
source "$root/conf/recipes/mair-hub.sh"
