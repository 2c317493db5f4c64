# shellcheck shell=bash disable=SC2034,SC2154  # run.sh uses the variables
# Profile "tiny": everything on two CPU cores, offline, with the weights of assets/tiny.
# This file holds the values that differ from conf/settings.sh, which explains every setting. Any setting can also be
# set in the environment: rollout_n=4 bash run.sh 2 2

# models
sft_path=${sft_path:-$root/assets/tiny/llm}
token2wav_dir=${token2wav_dir:-$root/assets/tiny/token2wav}
reward_asr_dir=${reward_asr_dir:-$root/assets/tiny/asr_reward}
eval_asr_dir=${eval_asr_dir:-$root/assets/tiny/asr_eval}

# data (stage 0)
train_jsonl=${train_jsonl:-$root/assets/tiny/data/grpo.jsonl} # texts on which none of the tiny models was trained
test_jsonl=${test_jsonl:-$root/assets/tiny/data/dev.jsonl}
known_answer_jsonl=${known_answer_jsonl:-$root/assets/tiny/data/dev.jsonl}
max_prompt_length=${max_prompt_length:-$([[ ${speech_prefix:-none} == none ]] && echo 64 || echo 224)}
llm_text=${llm_text:-spoken} # the tiny language model was trained on spoken forms (numbers in words)

# reward server (stage 1)
server_threads=${server_threads:-1}
server_batch_size=${server_batch_size:-16}
token2wav_precision=${token2wav_precision:-fp32}
reward_curve=${reward_curve:-tanh}
# Pace and pitch are held near those of the SFT model (3.9 syllables per second and 3.1 semitones on the training texts;
# the references lie beyond them, because intelligibility alone makes speech faster and flatter).
rewards=${rewards:-intelligibility:1 pace:0.4,units_per_s=3.8 pitch:0.6,semitones=3.3,width=0.5}

# GRPO (stage 2)
train_device=${train_device:-cpu}
total_steps=${total_steps:-30}
train_batch_size=${train_batch_size:-16}
micro_batch_size=${micro_batch_size:-16} # FSDP gathers all weights for each backward pass, so few are faster
max_response_length=${max_response_length:-160}
learning_rate=${learning_rate:-4.5e-4}
adam_eps=${adam_eps:-1e-5} # about as large as a typical gradient: weights with almost none (rare tokens) hardly move
credit=${credit:-syllable}
test_freq=${test_freq:-15}
save_freq=${save_freq:-15}
max_checkpoints=${max_checkpoints:-1}
train_threads=${train_threads:-2}

# evaluation (stages 4 and 5)
eval_jsonl=${eval_jsonl:-$root/assets/tiny/data/test.jsonl}
quality_utterances=${quality_utterances:-25}
reference_audio=${reference_audio:-$root/assets/tiny/prompts}
infer_procs=${infer_procs:-2}
infer_device=${infer_device:-cpu}
infer_batch_size=${infer_batch_size:-50}
infer_lm_precision=${infer_lm_precision:-fp32}
temperature=${temperature:-1.0} top_p=${top_p:-1.0} top_k=${top_k:--1}
max_new_tokens=${max_new_tokens:-240} # sentences of the hard set need up to 200

# shellcheck source=scripts/verl_cpu.sh
source "$root/scripts/verl_cpu.sh"
configure_profile() { configure_cpu_training; } # environment and arguments of veRL
