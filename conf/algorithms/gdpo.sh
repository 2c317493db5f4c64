# shellcheck shell=bash disable=SC2034  # read by run.sh
# Algorithm "gdpo": Group reward-Decoupled Normalization Policy Optimization: each part of the reward is normalised in its
# group, the weighted sum of the parts over the batch. With one part, it differs from GRPO only in the latter.
# Source: arXiv 2601.05242; veRL's estimator (compute_gdpo_outcome_advantage in verl/trainer/ppo/core_algos.py).

credit=${credit:-utterance}
adv_estimator=${adv_estimator:-gdpo} norm_adv_by_std=${norm_adv_by_std:-True}
