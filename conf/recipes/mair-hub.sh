# shellcheck shell=bash disable=SC2034  # read by run.sh and scripts/full_size.sh
# Recipe "mair-hub": GRPO on Emilia's Chinese texts, the newest of the original recipe.
# Source: github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm at commit 374bc49 (results of commit 1b57059).
# Published CER: test_zh 0.87%, zero_shot_zh 2.63% (step 1,800).
# scripts/full_size.sh has its training settings as defaults; here is what it does differently from them.
# What it cannot reproduce is in docs/differences.md.

# reward: each rollout in a random voice of AISHELL's test set
reward_voices=${reward_voices:-200} prompt_voice_per=${prompt_voice_per:-rollout}

evaluation=${evaluation:-mair-hub}
