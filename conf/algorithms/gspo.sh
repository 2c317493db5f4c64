# shellcheck shell=bash disable=SC2034  # read by run.sh
# Algorithm "gspo": Group Sequence Policy Optimization: ratios of probabilities of whole rollouts instead of tokens.
# Source: arXiv 2507.18071, section 5.1 for the clip ratios; examples/gspo_trainer of veRL.

credit=${credit:-utterance}
norm_adv_by_std=${norm_adv_by_std:-True}

# the ratio is a geometric mean over the tokens of a rollout, therefore so close to 1
loss_mode=${loss_mode:-gspo} loss_agg_mode=${loss_agg_mode:-seq-mean-token-mean}
clip_ratio_low=${clip_ratio_low:-3e-4} clip_ratio_high=${clip_ratio_high:-4e-4}
