# shellcheck shell=bash disable=SC2034  # read by run.sh
# Algorithm "dr_grpo": GRPO without its biases towards long rollouts and towards texts with similar rewards.
# Source: arXiv 2503.20783, and veRL's docs/algo/grpo.md ("DrGRPO").

credit=${credit:-utterance}

# no division by the standard deviation; the loss of a rollout is the sum over its tokens, divided by a constant
norm_adv_by_std=${norm_adv_by_std:-False}
loss_agg_mode=${loss_agg_mode:-seq-mean-token-sum-norm}
