# shellcheck shell=bash disable=SC2034,SC2154  # run.sh's variables
# What the profiles of full size share: values that are derived from the GPUs, and what stage -1 installs.
#
# A profile (conf/cosyvoice2.sh, conf/cosyvoice3.sh) sources this file after it has set
#
#   official_repos   CosyVoice's repository on modelscope and on huggingface
#   official_gib     GiB that its files take
#   official_files   the files that are loaded, besides CosyVoice-BlankEN and llm_pt
#   codebook         part of the names of files with its speech tokens

larger() { echo $(($1 > $2 ? $1 : $2)); }
smaller() { echo $(($1 < $2 ? $1 : $2)); }

# smallest_gpu_gib DEFAULT: print the memory of the smallest visible GPU in GiB, or DEFAULT if it is unknown.
smallest_gpu_gib() {
  local visible=${CUDA_VISIBLE_DEVICES-} mib lines i chosen=() select=()
  visible=${visible// /}
  [[ ! $visible =~ ^GPU- ]] || select=(--id="$visible")
  mapfile -t lines < <(nvidia-smi "${select[@]}" --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null)
  if [[ $visible =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    for i in ${visible//,/ }; do chosen+=("${lines[i]-}"); done
    lines=("${chosen[@]}")
  fi
  mib=$(printf '%s\n' "${lines[@]}" | grep -xE ' *[0-9]+' | sort -n | head -n 1) || true
  if [[ -z $mib || ${lines[*]} == *'['* || $visible == *MIG-* ]]; then
    [[ ${#lines[@]} -eq 0 || ${lines[*]} =~ ^\ *$ ]] ||
      echo "run.sh: nvidia-smi does not report the memory of each GPU (${lines[*]}): assuming $1 GiB; set gpu_memory_gib" >&2
    echo "$1"
  else
    echo $((mib / 1024))
  fi
}

# first_gpus COUNT: print the first COUNT visible GPUs, separated by commas. As in CUDA, entries after an invalid one do
# not count.
first_gpus() { local ids && mapfile -t ids < <(tr -d ' ' <<<"${CUDA_VISIBLE_DEVICES-$(seq -s , 0 $(($1 - 1)))}" | tr , '\n' | sed -E '/^([0-9]+|(GPU|MIG)-.+)$/!Q') && if ((${#ids[@]} < $1)); then echo "run.sh: CUDA_VISIBLE_DEVICES='${CUDA_VISIBLE_DEVICES-}' allows ${#ids[@]} GPUs, but num_gpus=$1: unset it, name more, or lower num_gpus" >&2 && return 1; else printf '%s\n' "${ids[@]:0:$1}" | paste -sd ,; fi; }

# micro_batch GIB: print how many rollouts of full length fit into a GPU's memory with their activations, besides 12 GiB
# of weights and optimizer states and the reward server.
micro_batch() { echo $(($1 >= 70 ? 16 : $1 >= 38 ? 8 : 4)); }

# pack GIB: print how many tokens fit into a GPU's memory in one pass, beside weights, optimizer states and reward server:
# 1.4 MiB per token without recomputation (24 layers, bf16), a tenth of it with.
pack() { echo $(($1 >= 70 ? 24576 : $1 >= 38 ? 8192 : 4096)); }

# vllm_share GIB: print the share of a GPU's memory that trainer and reward server leave to vLLM, at most 40%: the KV
# cache of 256 rollouts of 1,536 tokens takes 5 GiB.
vllm_share() {
  local shared=0 device left
  for device in $server_devices; do [[ $device != cuda:0 ]] || shared=$((server_gib * server_instances)); done
  left=$((100 * ($1 - 12 - shared) / $1))
  ((left <= 40)) || left=40
  ((left > 0)) || left=1 # bash run.sh --check reports that this is too little
  printf '0.%02d\n' "$left"
}

gpu_memory_gib=${gpu_memory_gib:-$(smallest_gpu_gib 80)}
trainer_requirements=${trainer_requirements:-$root/requirements-verl-gpu.txt}

# settings from which the values below are computed
resolve language
other_language=''
[[ $language == zh ]] || other_language=-$language text_excludes=${text_excludes-}
resolve workspace llm llm_pt model_hub sft_checkpoint cosyvoice_dir train_texts num_train num_test max_text_s text_excludes reward_voices \
  num_gpus num_nodes ray_address gpu_memory_gib rollout_n train_device infer_device dataset eval_strip_quotes
[[ $llm == official || $llm_pt == llm.pt ]] || die "llm_pt=$llm_pt has no effect with llm=$llm: set llm=official, or leave out llm_pt"

# models
llasa_dir=$workspace/llasa_cosyvoice2_token_qwen_0.5b
official_dir=$workspace/${official_repos[huggingface]#*/}
default_sft_path=$llasa_dir${sft_checkpoint:+/$sft_checkpoint}
[[ $llm != official ]] || default_sft_path=$official_dir-llm$([[ $llm_pt == llm.pt ]] || echo "-$(key llm_pt)")
sft_path=${sft_path:-$default_sft_path} # or your own folder, which is not modified
token2wav_dir=${token2wav_dir:-$official_dir}
prompt_audio=${prompt_audio:-$cosyvoice_dir/asset/zero_shot_prompt.wav}
prompt_text=${prompt_text:-希望你以后能够做的比我还好呦。}
reward_asr_dir=${reward_asr_dir:-$workspace/SenseVoiceSmall}
eval_asr_dir=${eval_asr_dir:-$workspace/paraformer-zh}

# data (stage 0): texts from metadata/$train_texts.jsonl of SparkAudio/voxbox
texts_dir=$workspace/data/$train_texts-$(key language train_texts num_train num_test max_text_s text_excludes)
train_jsonl=${train_jsonl:-$texts_dir/train.jsonl}
test_jsonl=${test_jsonl:-$texts_dir/test.jsonl}
known_answer_jsonl=${known_answer_jsonl:-$workspace/data/known_answer$codebook$other_language.jsonl}
max_bad_ratio=${max_bad_ratio:-0.05} # transcripts of recordings from the web: a few are in another language
# CosyVoice's own language model gets texts with numbers written out as words; the SFT model was trained on raw texts
llm_text=${llm_text:-$([[ $llm == official ]] && echo spoken || echo raw)}

# reward server (stage 1): by default it shares the training's GPUs; cuda:8, for example, is a separate ninth GPU
server_devices=${server_devices:-$(seq -s ' ' -f 'cuda:%g' 0 $((num_gpus - 1)))}
server_instances=${server_instances:-$((gpu_memory_gib >= 70 ? 2 : 1))}
server_gib=${server_gib:-$((gpu_memory_gib >= 40 ? 9 : 6))}
[[ $server_devices != cpu ]] || token2wav_precision=fp32
aishell_voices=$workspace/data/aishell-voices-$reward_voices.jsonl
((reward_voices == 1)) || prompt_list=${prompt_list:-$aishell_voices}
resolve server_devices server_instances server_gib

# GRPO (stage 2)
train_batch_size=${train_batch_size:-$(larger 32 $((4 * num_gpus * num_nodes)))} # 32 on up to 8 GPUs
resolve train_batch_size
mini_batch_size=${mini_batch_size:-$(larger 1 $((train_batch_size / 2)))}
vllm_memory_share=${vllm_memory_share:-$(vllm_share "$gpu_memory_gib")}
resolve mini_batch_size

# rollouts per backward pass: as many as fit in memory, at most the GPU's share of an update
rollouts_per_update=$((mini_batch_size * rollout_n / (num_gpus * num_nodes)))
micro_batch_size=${micro_batch_size:-$(smaller "$(micro_batch "$gpu_memory_gib")" "$(larger 1 "$rollouts_per_update")")}
resolve max_prompt_length max_response_length
pack_tokens=${pack_tokens:-$(larger "$(pack "$gpu_memory_gib")" $((max_prompt_length + max_response_length)))}
recompute=${recompute:-$((gpu_memory_gib < 70))}

# evaluation (stages 4 and 5)
choose_eval_sets
infer_batch_size=${infer_batch_size:-$((gpu_memory_gib >= 40 ? 128 : 32))}
[[ $infer_device != cpu ]] || infer_precision=fp32 infer_lm_precision=fp32
infer_precision=${infer_precision:-fp16} # no transcript changes with it (docs/results/reward_server.json)

download() { run "$speech_bin/python" "$root/scripts/download.py" "$@"; }

# install_official: download CosyVoice's files, without the exports for TensorRT, TorchScript and batches.
install_official() {
  local files=("${official_files[@]}" llm.pt) need_gib=$official_gib
  [[ $llm_pt == llm.pt || $llm_pt == */* ]] || { files+=("$llm_pt") && need_gib=$((need_gib + 2)); }
  download --hub "$model_hub" --repo "${official_repos[$model_hub]}" --output-dir "$token2wav_dir" --need-gib "$need_gib" \
    --include "${files[@]}" 'CosyVoice-BlankEN/*' configuration.json README.md \
    --require "${files[@]}" CosyVoice-BlankEN/config.json
}

install_profile() {
  install_evaluation
  download --hub modelscope --repo iic/SenseVoiceSmall --output-dir "$reward_asr_dir" --need-gib 1 \
    --require model.pt config.yaml am.mvn configuration.json
  install_texts
  [[ $prompt_list != "$aishell_voices" ]] || install_voices
  install_known_answers
}

# install_evaluation: download what bash run.sh evaluate needs.
install_evaluation() {
  clone_cosyvoice
  install_official
  download --hub modelscope --repo iic/speech_seaco_paraformer_large_asr_nat-zh-cn-16k-common-vocab8404-pytorch \
    --output-dir "$eval_asr_dir" --need-gib 2 --require model.pt config.yaml am.mvn configuration.json tokens.json
  install_llm
  install_eval_sets
}

install_llm() {
  if [[ $sft_path != "$default_sft_path" ]]; then
    ((dry_run)) || [[ -e $sft_path/config.json ]] || die "sft_path $sft_path has no config.json: it is not the folder of a language model"
  elif [[ $llm == official ]]; then
    convert_official
  else
    # The repository has dozens of checkpoints, logs and samples: download one checkpoint, without its optimizer states.
    local inside=${sft_checkpoint:+$sft_checkpoint/}
    download --hub huggingface --repo yuekai/llasa_cosyvoice2_token_qwen_0.5b --output-dir "$llasa_dir" --need-gib 1.2 \
      --include "$inside"{config,generation_config,tokenizer,tokenizer_config,special_tokens_map,added_tokens,vocab}.json \
      "$inside"{merges.txt,chat_template.jinja,model.safetensors} \
      --require "$inside"{config.json,tokenizer_config.json,model.safetensors}
  fi
}

# official_pt: print the path of the official model's weights.
official_pt() { if [[ $llm_pt == /* ]]; then echo "$llm_pt"; else echo "$token2wav_dir/$llm_pt"; fi; }

# convert_official: convert CosyVoice's own model, unless sft_path was made from this file, as it is now.
convert_official() {
  local source record=$sft_path/.converted_from # a hidden file is not among the model's files
  source=$(stat -Lc '%n, %s bytes, %y' "$(official_pt)" 2>/dev/null) || true
  [[ ! -e $sft_path/config.json || ! -f $record || $(<"$record") != "$source" ]] || return 0
  run rm -rf "$sft_path"
  run "$speech_bin/python" "$root/scripts/convert_llm.py" to-hf --cosyvoice-dir "$token2wav_dir" --llm "$llm_pt" \
    --output "$sft_path"
  ((dry_run)) || replace_file "$record" <<<"$source"
}

# is_official_llm MODEL: succeed if the folder holds CosyVoice's own model (with llm=official it may not exist yet).
is_official_llm() {
  [[ $llm == official ]] || grep -qsF '"<|task_id|>"' "$1/tokenizer.json"
}

# export_profile MODEL: after stage 3, also export the trained official model in CosyVoice's own format.
export_profile() {
  is_official_llm "$sft_path" || return 0
  run "$speech_bin/python" "$root/scripts/convert_llm.py" to-official --hf "$1" --like "$(official_pt)" \
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

# Emilia's metadata in voxbox has about 15 million lines; need_gib is an estimate of its size.
install_texts() {
  [[ -e $train_jsonl && -e $test_jsonl ]] && return
  local file=metadata/$train_texts.jsonl need_gib=1
  [[ $train_texts != emilia* ]] || need_gib=16
  download --hub huggingface --repo SparkAudio/voxbox --repo-type dataset --include "$file" \
    --output-dir "$workspace/data/voxbox/$train_texts" --require "$file" --need-gib "$need_gib"
  run "$speech_bin/python" "$root/scripts/select_texts.py" --source "$workspace/data/voxbox/$train_texts/$file" \
    --language "$language" --num-train "$num_train" --num-test "$num_test" --max-duration-s "$max_text_s" \
    --excludes "$text_excludes" --train-output "$train_jsonl" --test-output "$test_jsonl"
}

# install_voices: select voices from AISHELL-1's test set, which has 7,176 recordings of 20 speakers.
install_voices() {
  [[ -e $prompt_list ]] && return
  download --hub huggingface --repo yuekai/aishell --repo-type dataset --include "*test*" \
    --output-dir "$workspace/data/yuekai/aishell" --need-gib 3
  run "$trainer_bin/python" "$root/scripts/prepare_eval_set.py" --source "$workspace/data/yuekai/aishell" \
    --voices "$reward_voices" --output "$prompt_list"
}

# install_known_answers: encode the prompts of the first evaluation set in the reward's language.
install_known_answers() {
  local path=${eval_sets[0]} file
  for file in "${eval_sets[@]}"; do
    [[ $(language_of "$(set_name "$file")") != "$language" ]] || { path=$file && break; }
  done
  [[ -e $known_answer_jsonl ]] || run "$speech_bin/python" "$root/scripts/encode_prompts.py" --eval-set "$path" \
    --token2wav-dir "$token2wav_dir" --language "$language" --output "$known_answer_jsonl"
}

# token2wav imports CosyVoice's modules
export PYTHONPATH=$cosyvoice_dir:$cosyvoice_dir/third_party/Matcha-TTS${PYTHONPATH:+:$PYTHONPATH}

# shellcheck source=scripts/verl_cpu.sh
source "$root/scripts/verl_cpu.sh"

# configure_profile: set veRL's environment and arguments.
configure_profile() {
  local recompute_activations=False
  ((recompute == 0)) || recompute_activations=True
  profile_env=(PYTORCH_CUDA_ALLOC_CONF= VERL_USE_EXTERNAL_MODULES=tts_grpo.training.trainer)
  profile_verl_args=(
    actor_rollout_ref.model.external_lib=tts_grpo.training.engine
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.enable_gradient_checkpointing="$recompute_activations"
    +actor_rollout_ref.model.override_config.attn_implementation=varlen # tts_grpo/training/varlen.py
    actor_rollout_ref.rollout.name=vllm
    +actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=tts_grpo.training.verl_vllm.HeadBiasExtension
    actor_rollout_ref.rollout.gpu_memory_utilization="$vllm_memory_share"
  )
  ((pack_tokens == 0)) || profile_verl_args+=(
    actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$pack_tokens"
  )
  if [[ $train_device == cpu ]]; then # for tests of the profile with small weights
    configure_cpu_training
  elif [[ -n $ray_address ]]; then # Ray's processes were started elsewhere, without this environment
    profile_env+=(RAY_ADDRESS="$ray_address")
    profile_verl_args+=("+ray_kwargs.ray_init.runtime_env.env_vars={PYTHONPATH: $(hydra "$root:$PYTHONPATH"), VERL_USE_EXTERNAL_MODULES: tts_grpo.training.trainer, TENSORBOARD_DIR: $(hydra "$exp_dir/tensorboard"), OMP_NUM_THREADS: '$train_threads', TTS_GRPO_SECRET_FILE: $(hydra "$server_secret_file")}")
  else
    # Ray assigns any visible GPU, but those beyond num_gpus may belong to the reward server
    local gpus
    gpus=$(first_gpus "$num_gpus") || exit 1
    profile_env+=(CUDA_VISIBLE_DEVICES="$gpus")
  fi
}
