# shellcheck shell=bash disable=SC2034  # read by run.sh
# Algorithm "dapo": Decoupled Clip and Dynamic Sampling Policy Optimization.
# Source: arXiv 2503.14476, sections 3.1 to 3.4 and 4.1; clip_ratio_c: recipe/dapo/run_dapo_qwen2.5_32b.sh of veRL.
# Not set here, because it depends on data and model: 512 prompts per step, 16 rollouts per prompt, warm-up of 20 steps.

credit=${credit:-utterance}
norm_adv_by_std=${norm_adv_by_std:-True}

# clipping is wider upwards; each token of a batch has the same weight
clip_ratio_low=${clip_ratio_low:-0.2} clip_ratio_high=${clip_ratio_high:-0.28} clip_ratio_c=${clip_ratio_c:-10.0}
loss_agg_mode=${loss_agg_mode:-token-mean}

# groups whose rewards are all equal are replaced; long rollouts are penalised (4,096 of 20,480 tokens: 20%)
filter_groups=${filter_groups:-True}
overlong_percent=${overlong_percent:-20}
