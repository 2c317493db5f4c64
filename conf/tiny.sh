# shellcheck shell=bash disable=SC2034  # run.sh uses the variables
# Profile "tiny": everything on two CPU cores, offline, with the weights of assets/tiny.
# Every variable can also be set in the environment: rollout_n=4 bash run.sh 2 2

# models
sft_path=${sft_path:-$root/assets/tiny/llm}                    # language model to train, a Hugging Face folder
token2wav_dir=${token2wav_dir:-$root/assets/tiny/token2wav}    # speech tokens -> waveform
reward_asr_dir=${reward_asr_dir:-$root/assets/tiny/asr_reward} # recogniser of the reward
eval_asr_dir=${eval_asr_dir:-$root/assets/tiny/asr_eval}       # recogniser of the evaluation: another one

# data (stage 0)
train_jsonl=${train_jsonl:-$root/assets/tiny/data/grpo.jsonl}              # texts that no part was trained on
test_jsonl=${test_jsonl:-$root/assets/tiny/data/dev.jsonl}                 # validation during training
known_answer_jsonl=${known_answer_jsonl:-$root/assets/tiny/data/dev.jsonl} # text and speech_tokens of real speech
max_prompt_length=${max_prompt_length:-64}                                 # in tokens

# reward server (stage 1)
server_devices=${server_devices:-cpu}      # torch devices, separated by spaces
server_instances=${server_instances:-2}    # processes on each device
server_threads=${server_threads:-1}        # torch threads of each
server_batch_size=${server_batch_size:-16} # rollouts scored at once
token2wav_precision=${token2wav_precision:-fp32}
reward_curve=${reward_curve:-tanh} # or exp, see tts_grpo/text/errors.py
reward_tones=${reward_tones:-0}    # 1: tones count in the reward's pinyin error rate

# GRPO (stage 2)
num_gpus=${num_gpus:-1} num_nodes=${num_nodes:-1} # here one worker on the CPU
total_steps=${total_steps:-30}
train_batch_size=${train_batch_size:-16}              # prompts per step
mini_batch_size=${mini_batch_size:-$train_batch_size} # prompts per update
rollout_n=${rollout_n:-8}                             # rollouts per prompt
rollout_temperature=${rollout_temperature:-1.0}       # of rollouts and validation
rollout_top_p=${rollout_top_p:-1.0} rollout_top_k=${rollout_top_k:--1}
max_response_length=${max_response_length:-160}
learning_rate=${learning_rate:-4.5e-4}
learning_rate_schedule=${learning_rate_schedule:-constant} # constant or cosine, which ends at 0
adam_eps=${adam_eps:-1e-5}                                 # about a weight's gradient here: those without one, such as rare tokens', stay
credit=${credit:-syllable}                                 # whose advantage a token gets: syllable, or utterance as GRPO has it
norm_adv_by_std=${norm_adv_by_std:-False}                  # True: GRPO's division by a group's deviation
micro_batch_size=${micro_batch_size:-8}                    # rollouts in one backward pass
test_freq=${test_freq:-15}                                 # steps between validations
save_freq=${save_freq:-15}                                 # steps between checkpoints
max_checkpoints=${max_checkpoints:-1}                      # kept of them
train_threads=${train_threads:-2}
trainer_requirements=${trainer_requirements:-$root/requirements-verl.txt}

# evaluation (stages 4 and 5)
eval_jsonl=${eval_jsonl:-$root/assets/tiny/data/test.jsonl}
quality_utterances=${quality_utterances:-25}                  # whose voice, DNSMOS and F0 are measured; 0: none
reference_audio=${reference_audio:-$root/assets/tiny/prompts} # of the one voice: the set has no prompts
infer_procs=${infer_procs:-2}                                 # processes of torchrun, one for each GPU where there are any
infer_device=${infer_device:-cpu}
infer_batch_size=${infer_batch_size:-50}
infer_precision=${infer_precision:-fp32}       # of token2wav
infer_lm_precision=${infer_lm_precision:-fp32} # of the language model
temperature=${temperature:-1.0} top_p=${top_p:-1.0} top_k=${top_k:--1}
repetition_penalty=${repetition_penalty:-1.0}          # of the evaluation, on ids in prompt and response; 1.0: none
max_new_tokens=${max_new_tokens:-$max_response_length} # where the evaluation cuts an utterance

# shellcheck source=scripts/verl_cpu.sh
source "$root/scripts/verl_cpu.sh"
