# shellcheck shell=bash disable=SC2034  # read by run.sh and scripts/full_size.sh
# Recipe "cosyvoice": GRPO of the official language model on AISHELL-3's texts.
# Source: github.com/FunAudioLLM/CosyVoice, examples/grpo/cosyvoice2 at commit ace7c47.
# Published CER: test_zh 1.37%, zero_shot_zh 3.36%, at one of the steps 100 to 500; which one is not said.
# What it cannot reproduce is in docs/differences.md.

llm=${llm:-official}

# data: the first 80,000 and the last 100 texts, unfiltered
train_texts=${train_texts:-aishell-3} num_train=${num_train:-80000}
max_text_s=${max_text_s:-0} text_excludes=${text_excludes-}
max_test_overlap=${max_test_overlap:-1} llm_text=${llm_text:-raw}

# reward: tones count; each rollout in a random voice of AISHELL's test set
reward_curve=${reward_curve:-tanh} reward_tones=${reward_tones:-1}
reward_voices=${reward_voices:-200} prompt_voice_per=${prompt_voice_per:-rollout}

# training: one update per step; step 400 is the one that huggingface_to_pretrained.py has as an example
total_steps=${total_steps:-400}
mini_batch_size=${mini_batch_size:-32} max_response_length=${max_response_length:-512}
rollout_n=${rollout_n:-4} rollout_temperature=${rollout_temperature:-0.8} rollout_top_p=${rollout_top_p:-0.95}
rollout_top_k=${rollout_top_k:-25}
norm_adv_by_std=${norm_adv_by_std:-True}

evaluation=${evaluation:-seed}
