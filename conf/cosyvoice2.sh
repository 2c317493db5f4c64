# shellcheck shell=bash disable=SC2034,SC2154  # run.sh's variables
# Profile "cosyvoice2": the CosyVoice2 LLM (0.5B), CosyVoice2's token2wav and SenseVoice, on GPUs.
# Every variable can also be set in the environment: num_gpus=8 profile=cosyvoice2 bash run.sh
#
# The defaults train as the newest published recipe does (conf/recipes/mair-hub.sh); recipe=NAME reproduces a published
# row, conf/recipes/NAME.sh; docs/differences.md says what differs from each of them, and why.
#
# State: run on an H100 with random weights of the full shape (README.md has the figures); nobody has used the real ones.

larger() { echo $(($1 > $2 ? $1 : $2)); }
smaller() { echo $(($1 < $2 ? $1 : $2)); }

# smallest_gpu_gib DEFAULT: memory of the smallest GPU here, in GiB; DEFAULT where there is none.
smallest_gpu_gib() {
  local mib
  mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | sort -n | head -n 1) || true
  [[ $mib =~ ^[0-9]+$ ]] && echo $((mib / 1024)) || echo "$1"
}

# first_gpus COUNT: the first GPUs of those that this shell may use, separated by commas.
first_gpus() { cut -d , -f "1-$1" <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $(($1 - 1)))}"; }

# micro_batch GIB: rollouts of full length whose activations fit beside 12 GiB of weights and optimizer, and the server.
micro_batch() { echo $(($1 >= 70 ? 16 : $1 >= 38 ? 8 : 4)); }

# vllm_share GIB: what trainer and reward server leave of a GPU, at most 40% of it: 256 rollouts of 1,536 tokens need 5 GiB of cache.
vllm_share() {
  local shared=0 device left
  for device in $server_devices; do [[ $device != cuda:0 ]] || shared=$((server_gib * server_instances)); done
  left=$((100 * ($1 - 12 - shared) / $1))
  ((left <= 40)) || left=40
  ((left > 0)) || left=1 # bash run.sh --check says that it is too little
  printf '0.%02d\n' "$left"
}

workspace=${workspace:-/workspace} # folder of what is downloaded

# models
llm=${llm:-llasa} # language model to train: llasa (yuekai's SFT model) or official (CosyVoice2-0.5B's own, converted)
llasa_dir=$workspace/llasa_cosyvoice2_token_qwen_0.5b
sft_checkpoint=${sft_checkpoint-checkpoint-885000} # of llm=llasa: the folder of its repository to train; empty: the root
default_sft_path=$([[ $llm == official ]] && echo "$workspace/CosyVoice2-0.5B-llm" || echo "$llasa_dir${sft_checkpoint:+/$sft_checkpoint}")
sft_path=${sft_path:-$default_sft_path}                    # or a folder of your own, which is left as it is
token2wav_dir=${token2wav_dir:-$workspace/CosyVoice2-0.5B} # speech tokens -> waveform
cosyvoice_dir=${cosyvoice_dir:-$workspace/CosyVoice}       # its source
prompt_audio=${prompt_audio:-$cosyvoice_dir/asset/zero_shot_prompt.wav}
prompt_text=${prompt_text:-希望你以后能够做的比我还好呦。}
reward_asr_dir=${reward_asr_dir:-$workspace/SenseVoiceSmall} # recogniser of the reward
eval_asr_dir=${eval_asr_dir:-$workspace/paraformer-zh}       # recogniser of the evaluation: another one

# data (stage 0): texts of voxbox, SparkAudio/voxbox's metadata/$train_texts.jsonl
train_texts=${train_texts:-emilia_zh}      # or aishell-3, 88,035 texts
num_train=${num_train:-80000}              # its first texts in Chinese of that length are considered
num_test=${num_test:-100}                  # its last texts, whatever they are
max_text_s=${max_text_s:-30}               # duration of the recording that a text must be below; 0: any
text_excludes=${text_excludes-[A-Za-z0-9]} # texts with such a character are left out, as the reward cannot read them; empty: none
texts_dir=$workspace/data/$train_texts-$(key train_texts num_train num_test max_text_s text_excludes)
train_jsonl=${train_jsonl:-$texts_dir/train.jsonl}
test_jsonl=${test_jsonl:-$texts_dir/test.jsonl}                              # validation during training
known_answer_jsonl=${known_answer_jsonl:-$workspace/data/known_answer.jsonl} # text and speech_tokens of real speech
max_prompt_length=${max_prompt_length:-512}                                  # in tokens

# GPUs
num_gpus=${num_gpus:-1}                                  # for training, of a machine: the first ones
num_nodes=${num_nodes:-1}                                # machines; several need ray_address
ray_address=${ray_address:-}                             # of a running Ray cluster (ray start), such as 10.0.0.1:6379
gpu_memory_gib=${gpu_memory_gib:-$(smallest_gpu_gib 80)} # of a GPU

# reward server (stage 1): by default it shares the training's GPUs; cuda:8, say, is one of its own beside eight
server_devices=${server_devices:-$(seq -s ' ' -f 'cuda:%g' 0 $((num_gpus - 1)))} # torch devices, separated by spaces
server_instances=${server_instances:-$((gpu_memory_gib >= 70 ? 2 : 1))}          # processes on each device
server_gib=${server_gib:-$((gpu_memory_gib >= 40 ? 9 : 6))}                      # what one of them may take of a GPU
server_threads=${server_threads:-4}                                              # torch threads of each
server_batch_size=${server_batch_size:-64}                                       # rollouts scored at once
token2wav_precision=${token2wav_precision:-fp16}                                 # of the server's token2wav: fp32 (slow, exact), fp16 or bf16
[[ $server_devices != cpu ]] || token2wav_precision=fp32
reward_curve=${reward_curve:-exp} # or tanh, see tts_grpo/text/errors.py
reward_tones=${reward_tones:-0}   # 1: tones count in the reward's pinyin error rate
reward_voices=${reward_voices:-1} # 1: prompt_audio; N: as many recordings of AISHELL's test set, instead of a prompt_list
aishell_voices=$workspace/data/aishell-voices-$reward_voices.jsonl
((reward_voices == 1)) || prompt_list=${prompt_list:-$aishell_voices}

# GRPO (stage 2)
train_device=${train_device:-cuda} # or cpu
total_steps=${total_steps:-1800}
rollout_n=${rollout_n:-8}                                                        # rollouts per prompt
train_batch_size=${train_batch_size:-$(larger 32 $((4 * num_gpus * num_nodes)))} # prompts per step: alike up to 8 GPUs
mini_batch_size=${mini_batch_size:-$(larger 1 $((train_batch_size / 2)))}        # prompts per update
rollout_temperature=${rollout_temperature:-1.0}                                  # of rollouts and validation
rollout_top_p=${rollout_top_p:-1.0} rollout_top_k=${rollout_top_k:--1}
max_response_length=${max_response_length:-1024}
learning_rate=${learning_rate:-1e-6}
learning_rate_schedule=${learning_rate_schedule:-constant}              # constant or cosine, which ends at 0
adam_eps=${adam_eps:-1e-8}                                              # of AdamW
credit=${credit:-utterance}                                             # syllable: advantages where the errors are (tts_grpo/training/credit.py)
norm_adv_by_std=${norm_adv_by_std:-False}                               # True: GRPO's division by a group's deviation
vllm_memory_share=${vllm_memory_share:-$(vllm_share "$gpu_memory_gib")} # of a GPU, for vLLM's weights and cache
test_freq=${test_freq:-50}                                              # steps between validations
save_freq=${save_freq:-50}                                              # steps between checkpoints
max_checkpoints=${max_checkpoints:-4}                                   # kept of them

# rollouts in one backward pass: those that fit, at most a GPU's share of an update
rollouts_per_update=$((mini_batch_size * rollout_n / (num_gpus * num_nodes)))
micro_batch_size=${micro_batch_size:-$(smaller "$(micro_batch "$gpu_memory_gib")" "$rollouts_per_update")}
train_threads=${train_threads:-4}
trainer_requirements=${trainer_requirements:-$root/requirements-verl-gpu.txt}

# evaluation (stages 4 and 5)
dataset=${dataset:-zero_shot_zh}          # or test_zh
eval_strip_quotes=${eval_strip_quotes:-0} # 1: quotes and brackets are taken out of the set's texts
eval_jsonl=${eval_jsonl:-$workspace/data/$dataset$( ((eval_strip_quotes)) && echo -stripped || true).jsonl}
quality_utterances=${quality_utterances:-100} # whose voice, DNSMOS and F0 are measured; 0: none
infer_procs=${infer_procs:-$num_gpus}
infer_device=${infer_device:-cuda}
infer_batch_size=${infer_batch_size:-$((gpu_memory_gib >= 40 ? 128 : 32))}
infer_precision=${infer_precision:-fp32}       # of token2wav in the evaluation; fp16, the server's, is several times as fast
infer_lm_precision=${infer_lm_precision:-bf16} # of the language model there; or fp32
[[ $infer_device != cpu ]] || infer_precision=fp32 infer_lm_precision=fp32
temperature=${temperature:-0.8} top_p=${top_p:-0.95} top_k=${top_k:-50}
repetition_penalty=${repetition_penalty:-1.0} # of the evaluation, on ids in prompt and response; 1.0: none
max_new_tokens=${max_new_tokens:-2048}        # where the evaluation cuts an utterance

# stage -1: everything is resumed, and skipped when it is there
cosyvoice_url=${cosyvoice_url:-https://github.com/FunAudioLLM/CosyVoice.git}
cosyvoice_commit=${cosyvoice_commit:-ace7c47f41bbd303aa6bf1ea80e6f9fbd595cd40}

download() { run "$speech_bin/python" "$root/scripts/download.py" "$@"; }

cosyvoice2_files=(cosyvoice2.yaml flow.pt hift.pt llm.pt campplus.onnx speech_tokenizer_v2.onnx)

install_profile() {
  clone_cosyvoice
  # 3.8 GiB of the repository's 5.2: without the exports for TensorRT, TorchScript and batches
  download --hub modelscope --repo iic/CosyVoice2-0.5B --output-dir "$token2wav_dir" --need-gib 4 \
    --include "${cosyvoice2_files[@]}" 'CosyVoice-BlankEN/*' configuration.json README.md \
    --require "${cosyvoice2_files[@]}" CosyVoice-BlankEN/config.json
  download --hub modelscope --repo iic/SenseVoiceSmall --output-dir "$reward_asr_dir" --need-gib 1 \
    --require model.pt config.yaml am.mvn configuration.json
  download --hub modelscope --repo iic/speech_seaco_paraformer_large_asr_nat-zh-cn-16k-common-vocab8404-pytorch \
    --output-dir "$eval_asr_dir" --need-gib 2 --require model.pt config.yaml am.mvn configuration.json tokens.json
  install_llm
  install_texts
  [[ $prompt_list != "$aishell_voices" ]] || install_voices
  install_eval_set
}

install_llm() {
  if [[ $sft_path != "$default_sft_path" ]]; then
    ((dry_run)) || [[ -e $sft_path/config.json ]] || die "sft_path $sft_path has no config.json: it is no folder of a language model"
  elif [[ $llm == official ]]; then
    [[ -e $sft_path/config.json ]] || run "$speech_bin/python" "$root/scripts/convert_llm.py" to-hf \
      --cosyvoice-dir "$token2wav_dir" --output "$sft_path"
  else
    # The repository has dozens of checkpoints beside logs and samples: fetch one, without the state of its optimizer.
    local inside=${sft_checkpoint:+$sft_checkpoint/}
    download --hub huggingface --repo yuekai/llasa_cosyvoice2_token_qwen_0.5b --output-dir "$llasa_dir" --need-gib 1.2 \
      --include "$inside"{config,generation_config,tokenizer,tokenizer_config,special_tokens_map,added_tokens,vocab}.json \
      "$inside"{merges.txt,chat_template.jinja,model.safetensors} \
      --require "$inside"{config.json,tokenizer_config.json,model.safetensors}
  fi
}

# is_official_llm MODEL: whether a Hugging Face folder is CosyVoice2's own model (with llm=official it may not exist yet).
is_official_llm() {
  [[ $llm == official ]] || grep -qsF '"<|task_id|>"' "$1/tokenizer.json"
}

# export_profile MODEL: after stage 3, the trained official model also in CosyVoice's own format.
export_profile() {
  is_official_llm "$sft_path" || return 0
  run "$speech_bin/python" "$root/scripts/convert_llm.py" to-official --hf "$1" --like "$token2wav_dir/llm.pt" \
    --output "$exp_dir/llm.pt"
  echo "for CosyVoice: $exp_dir/llm.pt"
}

clone_cosyvoice() {
  [[ -e $cosyvoice_dir/cosyvoice ]] && return
  run rm -rf "$cosyvoice_dir.part"
  run git clone --quiet --no-checkout "$cosyvoice_url" "$cosyvoice_dir.part"
  run git -C "$cosyvoice_dir.part" checkout --quiet --detach "$cosyvoice_commit"
  run git -C "$cosyvoice_dir.part" submodule --quiet update --init --recursive
  run mv -T "$cosyvoice_dir.part" "$cosyvoice_dir"
}

# voxbox's metadata of Emilia has some 15 million lines; the size that is asked for is an estimate.
install_texts() {
  [[ -e $train_jsonl && -e $test_jsonl ]] && return
  local file=metadata/$train_texts.jsonl need_gib=1
  [[ $train_texts != emilia* ]] || need_gib=16
  download --hub huggingface --repo SparkAudio/voxbox --repo-type dataset --include "$file" \
    --output-dir "$workspace/data/voxbox/$train_texts" --require "$file" --need-gib "$need_gib"
  run "$speech_bin/python" "$root/scripts/select_texts.py" --source "$workspace/data/voxbox/$train_texts/$file" \
    --num-train "$num_train" --num-test "$num_test" --max-duration-s "$max_text_s" --excludes "$text_excludes" \
    --train-output "$train_jsonl" --test-output "$test_jsonl"
}

# Voices of AISHELL-1's test set: 7,176 recordings of 20 speakers.
install_voices() {
  [[ -e $prompt_list ]] && return
  download --hub huggingface --repo yuekai/aishell --repo-type dataset --include "*test*" \
    --output-dir "$workspace/data/yuekai/aishell" --need-gib 3
  run "$trainer_bin/python" "$root/scripts/prepare_eval_set.py" --source "$workspace/data/yuekai/aishell" \
    --voices "$reward_voices" --output "$prompt_list"
}

install_eval_set() {
  local repo=yuekai/CV3-Eval flags=()
  ((eval_strip_quotes == 0)) || flags=(--strip-quotes)
  [[ $dataset == zero_shot_zh ]] || repo=yuekai/seed_tts_cosy2
  if [[ ! -e $eval_jsonl ]]; then
    # data/SPLIT-00000-of-0000N.parquet; the README.md says so if it is otherwise
    download --hub huggingface --repo "$repo" --repo-type dataset --include README.md "*$dataset*" \
      --output-dir "$workspace/data/$repo" --need-gib 2
    run "$trainer_bin/python" "$root/scripts/prepare_eval_set.py" --source "$workspace/data/$repo" --split "$dataset" \
      --output "$eval_jsonl" "${flags[@]}"
  fi
  [[ -e $known_answer_jsonl ]] || run "$speech_bin/python" "$root/scripts/encode_prompts.py" --eval-set "$eval_jsonl" \
    --token2wav-dir "$token2wav_dir" --output "$known_answer_jsonl"
}

# token2wav imports CosyVoice's modules
export PYTHONPATH=$cosyvoice_dir:$cosyvoice_dir/third_party/Matcha-TTS${PYTHONPATH:+:$PYTHONPATH}

profile_env=(PYTORCH_CUDA_ALLOC_CONF= VERL_USE_EXTERNAL_MODULES=tts_grpo.training.trainer)
profile_verl_args=(
  actor_rollout_ref.model.external_lib=tts_grpo.training.engine
  actor_rollout_ref.model.use_remove_padding=True
  actor_rollout_ref.model.use_fused_kernels=True
  actor_rollout_ref.model.enable_gradient_checkpointing=True
  +actor_rollout_ref.model.override_config.attn_implementation=sdpa
  actor_rollout_ref.rollout.name=vllm
  +actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=tts_grpo.training.verl_vllm.HeadBiasExtension
  actor_rollout_ref.rollout.gpu_memory_utilization="$vllm_memory_share"
)
if [[ $train_device == cpu ]]; then # to try the profile with small weights
  # shellcheck source=scripts/verl_cpu.sh
  source "$root/scripts/verl_cpu.sh"
elif [[ -n $ray_address ]]; then # its processes were started elsewhere, without this environment
  profile_env+=(RAY_ADDRESS="$ray_address")
  profile_verl_args+=("+ray_kwargs.ray_init.runtime_env.env_vars={PYTHONPATH: '$root:$PYTHONPATH', VERL_USE_EXTERNAL_MODULES: tts_grpo.training.trainer, TENSORBOARD_DIR: '$exp_dir/tensorboard', OMP_NUM_THREADS: '$train_threads'}")
else
  ((num_nodes == 1 || preflight)) || die "num_nodes=$num_nodes needs ray_address: start Ray on each machine (ray start), see README.md"
  # Ray hands out any GPU that it sees: those beyond num_gpus may be the reward server's
  profile_env+=(CUDA_VISIBLE_DEVICES="$(first_gpus "$num_gpus")")
fi
