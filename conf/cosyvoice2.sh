# shellcheck shell=bash disable=SC2034,SC2154  # run.sh's variables
# Profile "cosyvoice2": the CosyVoice2 LLM (0.5B), CosyVoice2's token2wav and SenseVoice, on GPUs.
# Every variable can also be set in the environment: num_gpus=8 profile=cosyvoice2 bash run.sh
#
# State: token2wav is tested against the official code with random weights; nothing was run with the real ones yet.

workspace=${workspace:-/workspace} # folder of what is downloaded

# models
sft_path=${sft_path:-$workspace/llasa_cosyvoice2_token_qwen_0.5b} # language model to train, a Hugging Face folder
token2wav_dir=${token2wav_dir:-$workspace/CosyVoice2-0.5B}        # speech tokens -> waveform
cosyvoice_dir=${cosyvoice_dir:-$workspace/CosyVoice}              # its source
prompt_audio=${prompt_audio:-$cosyvoice_dir/asset/zero_shot_prompt.wav}
prompt_text=${prompt_text:-希望你以后能够做的比我还好呦。}
reward_asr_dir=${reward_asr_dir:-$workspace/SenseVoiceSmall} # recogniser of the reward
eval_asr_dir=${eval_asr_dir:-$workspace/paraformer-zh}       # recogniser of the evaluation: another one

# data (stage 0)
train_jsonl=${train_jsonl:-$workspace/data/train.jsonl}
test_jsonl=${test_jsonl:-$workspace/data/test.jsonl}                         # validation during training
known_answer_jsonl=${known_answer_jsonl:-$workspace/data/known_answer.jsonl} # text and speech_tokens of real speech
max_prompt_length=${max_prompt_length:-512}                                  # in tokens

# reward server (stage 1)
server_devices=${server_devices:-cuda:0}   # torch devices, separated by spaces
server_instances=${server_instances:-1}    # processes on each device
server_threads=${server_threads:-4}        # torch threads of each
server_batch_size=${server_batch_size:-32} # rollouts scored at once
reward_tones=${reward_tones:-1}            # 1: tones count in the reward's pinyin error rate

# GRPO (stage 2)
num_gpus=${num_gpus:-1} num_nodes=${num_nodes:-1}
total_steps=${total_steps:-400}
train_batch_size=${train_batch_size:-32} # prompts a step
rollout_n=${rollout_n:-8}                # rollouts a prompt
max_response_length=${max_response_length:-1024}
learning_rate=${learning_rate:-1e-6}
learning_rate_schedule=${learning_rate_schedule:-constant} # constant or cosine, which ends at 0
norm_adv_by_std=${norm_adv_by_std:-True}                   # False: as Dr. GRPO, no division by a group's deviation
micro_batch_size=${micro_batch_size:-16}                   # rollouts in one backward pass
test_freq=${test_freq:-50}                                 # steps between validations
save_freq=${save_freq:-50}                                 # steps between checkpoints
max_checkpoints=${max_checkpoints:-4}                      # kept of them
train_threads=${train_threads:-4}

# evaluation (stages 4 and 5)
dataset=${dataset:-zero_shot_zh} # or test_zh
eval_jsonl=${eval_jsonl:-$workspace/data/$dataset.jsonl}
infer_procs=${infer_procs:-$num_gpus}
infer_device=${infer_device:-cuda}
infer_batch_size=${infer_batch_size:-32}
temperature=${temperature:-0.8} top_p=${top_p:-0.95} top_k=${top_k:--1}

install_profile() {
  [[ -e $cosyvoice_dir/cosyvoice ]] || {
    run git clone --recursive https://github.com/FunAudioLLM/CosyVoice.git "$cosyvoice_dir.part"
    run mv -T "$cosyvoice_dir.part" "$cosyvoice_dir"
  }
  run "$speech_bin/modelscope" download --model iic/CosyVoice2-0.5B --local_dir "$token2wav_dir"
  run "$speech_bin/modelscope" download --model iic/SenseVoiceSmall --local_dir "$reward_asr_dir"
  run "$trainer_bin/hf" download yuekai/llasa_cosyvoice2_token_qwen_0.5b --local-dir "$sft_path"
}

# token2wav imports CosyVoice's modules
export PYTHONPATH=$cosyvoice_dir:$cosyvoice_dir/third_party/Matcha-TTS${PYTHONPATH:+:$PYTHONPATH}

profile_env=(PYTORCH_CUDA_ALLOC_CONF=)
profile_verl_args=(
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.use_fused_kernels=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.gpu_memory_utilization=0.4
)
