# shellcheck shell=bash disable=SC2034  # read by run.sh and scripts/full_size.sh
# Recipe "seed": GRPO on AISHELL-3's texts, as first published.
# Source: github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm at commit 5659ee4.
# Published CER: test_zh 1.06%, zero_shot_zh 4.03% (3.01% once the set's texts were stripped: eval_strip_quotes=1).
# What it cannot reproduce is in docs/differences.md.

# data: the first 80,000 and the last 100 texts, unfiltered
train_texts=${train_texts:-aishell-3} num_train=${num_train:-80000}
max_text_s=${max_text_s:-0} text_excludes=${text_excludes-}
max_test_overlap=${max_test_overlap:-1}

# reward: tones count; each rollout in a random voice of AISHELL's test set
reward_curve=${reward_curve:-tanh} reward_tones=${reward_tones:-1}
reward_voices=${reward_voices:-200} prompt_voice_per=${prompt_voice_per:-rollout}

# training: step 2,100 of an epoch of 2,500
total_steps=${total_steps:-2100}
rollout_n=${rollout_n:-4} rollout_temperature=${rollout_temperature:-0.8} rollout_top_p=${rollout_top_p:-0.9}
norm_adv_by_std=${norm_adv_by_std:-True}

evaluation=${evaluation:-seed}
