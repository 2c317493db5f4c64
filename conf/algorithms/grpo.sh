# shellcheck shell=bash
# Algorithm "grpo": GRPO as mair-hub uses it. The defaults of conf/settings.sh are its values.
# Source: github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm/run.sh at commit 374bc49.
# GRPO as first published (arXiv 2402.03300) divides advantages by the group's standard deviation, averages the loss per
# rollout, and has a KL term: norm_adv_by_std=True loss_agg_mode=seq-mean-token-mean kl_loss_coef=0.04
