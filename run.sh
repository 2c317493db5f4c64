#!/usr/bin/env bash
# Train a speech language model with GRPO, stage by stage.
#
#   bash run.sh [--dry-run] [START [STOP]] [-- VERL_OVERRIDE...]
#   bash run.sh --check
#
#   no stages: all, -1 to 5; START alone: that one. --dry-run prints the commands and runs none.
#   --check: says in a minute all that would stop a run, and runs no stage
#   VERL_OVERRIDE: veRL settings of stage 2, such as algorithm.norm_adv_by_std_in_grpo=False
#
#   -1  install: the speech and the trainer environment, and what the profile downloads
#    0  data: JSONL with one text per line -> parquet for veRL; the language model as veRL can train it
#    1  reward server; alone it stays in the foreground, in a range it serves stage 2 and ends
#    2  GRPO on veRL; goes on from its last checkpoint
#    3  merge the last checkpoint into $llm_path/merged_hf_model, a Hugging Face folder
#    4  evaluation before and after: inference on the test set, error rates, summary.json, report.html
#    5  one tongue-twister through the merged checkpoint
#
# A stage that is done with the same settings is skipped. Everything that is made is in exp/$exp_name.
# Variables: those below, and those in conf/$profile.sh; set them there or in the environment.
# shellcheck disable=SC2329  # stages are called by name
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"

profile=${profile:-tiny}         # conf/$profile.sh: tiny (CPU, offline) or cosyvoice2 (GPUs)
recipe=${recipe:-}               # conf/recipes/$recipe.sh: a published recipe, for profile=cosyvoice2
recipe_verl_args=()              # veRL settings of the recipe
load_recipe "$recipe" "$profile" # before all defaults: these do not replace its values

exp_name=${exp_name:-${recipe:-$profile}} # name of the experiment
exp_dir=${exp_dir:-$root/exp/$exp_name}   # its folder
seed=${seed:-42}                          # of data order and sampling
force=${force:-0}                         # 1: redo the stages asked for, from nothing
base_python=${base_python:-python3}       # interpreter the environments are built on, 3.11 or 3.12
venv_root=${venv_root:-$root/.venv}       # folder of the environments, speech and trainer
make_envs=${make_envs:-1}                 # 0: those in venv_root are used as they are
server_timeout_s=${server_timeout_s:-900} # longest wait for the reward server

max_bad_ratio=${max_bad_ratio:-0.01}        # of unusable lines of the data (stage 0)
server_address=${server_address:-127.0.0.1} # of the reward server; 0.0.0.0 serves other machines
http_port=${http_port:-8000} grpc_port=${grpc_port:-8001} metrics_port=${metrics_port:-8002}
server_urls=${server_urls:-http://127.0.0.1:$http_port} # what training talks to; several with commas
check_reward=${check_reward:-1}                         # 0: train though real speech does not score high
seeds=${seeds:-0 1 2 3 4}                               # of the evaluation (stage 4)
language=${language:-zh}                                # of the evaluation set: zh or en
reference_audio=${reference_audio:-}                    # recordings of the voice, where the set has no prompts
speaker_model_dir=${speaker_model_dir:-}                # WavLM folder for the voice; empty: Resemblyzer
prompt_audio=${prompt_audio:-}                          # recording whose voice speaks in stages 1 and 5
prompt_text=${prompt_text:-}                            # its transcript
prompt_list=${prompt_list:-}                            # instead of the two: JSONL of voices (stage 1)
prompt_voice_per=${prompt_voice_per:-text}              # each has one of them; or rollout
single_text=${single_text:-}                            # said in stage 5; empty: the tongue-twister

dry_run=0 preflight=0
server_pid='' memory_pid='' beside_pids=()
verl_overrides=()

usage() {
  sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//p}' "$root/run.sh" >&2
  exit 2
}

# End what this run started and has not ended: reward server, memory watch, installations.
cleanup() {
  local status=$? pid
  trap - EXIT INT TERM
  for pid in $(jobs -p); do stop "$pid"; done
  exit "$status"
}

stage_-1() {
  ((make_envs)) && make_environments
  run "$speech_bin/python" -c 'import token2wav_asr_server; token2wav_asr_server.check_libpython()'
  [[ -z $(type -t install_profile) ]] || install_profile
  echo "environments: $venv_root/speech, $venv_root/trainer"
}

make_environments() {
  export base_python venv_root
  beside bash "$root/scripts/make_env.sh" speech "$root/requirements-cosyvoice.txt"
  beside bash "$root/scripts/make_env.sh" trainer "$trainer_requirements"
  wait_for_all "an environment could not be made: see above"
}

stage_0() {
  [[ -e $sft_model/config.json ]] && done_with 0 "$key_0" && skip 0 && return
  run "$trainer_bin/python" "$root/scripts/prepare_llm.py" --sft-path "$sft_path" --output-dir "$sft_model"
  run "$trainer_bin/python" "$root/prepare_data.py" --train-file "$train_jsonl" --test-file "$test_jsonl" \
    --output-dir "$exp_dir/data" --llm-path "$sft_model" --max-prompt-length "$max_prompt_length" \
    --max-bad-ratio "$max_bad_ratio"
  mark_done 0 "$key_0"
  echo "data: $exp_dir/data"
}

stage_1() {
  if ((start == 1 && stop == 1)); then
    run exec "${server_command[@]}"
  elif ((stop >= 2)) && done_with 2 "$key_2"; then
    echo "not needed: stage 2 is done"
  else
    start_server
  fi
}

stage_2() {
  done_with 2 "$key_2" && skip 2 && return
  need "$exp_dir/data/train.parquet" 0
  need "$sft_model/config.json" 0
  check_checkpoints
  if ((dry_run == 0)) && ! server_ready "${server_urls%%[, ]*}"; then
    die "no reward server is ready at ${server_urls%%[, ]*}: start one with bash run.sh 1 1"
  fi
  local check=()
  ((check_reward == 0)) || check=(--check)
  run "$trainer_bin/python" "$root/reward_tts.py" --jsonl "$known_answer_jsonl" --limit 64 \
    --server-urls "$server_urls" "${check[@]}"
  run_long env "${train_env[@]}" "$trainer_bin/python" "$root/scripts/train.py" --log-file "$exp_dir/log/train.log" \
    --total-steps "$total_steps" --failure-file "$exp_dir/reward_failure" \
    --server-url "${server_urls%%[, ]*}" --tensorboard-dir "$exp_dir/tensorboard" --validation-dir "$exp_dir/validation" -- \
    "$trainer_bin/python" -m verl.trainer.main_ppo "${verl_args[@]}" "${profile_verl_args[@]}" \
    "${recipe_verl_args[@]}" "${verl_overrides[@]}"
  mark_done 2 "$key_2"
  [[ -z $server_pid ]] || { stop "$server_pid" && server_pid=''; }
  echo "checkpoints: $exp_dir/checkpoints; curves: tensorboard --logdir $exp_dir/tensorboard"
}

stage_3() {
  done_with 3 "$key_3" && skip 3 && return
  local checkpoint=${llm_path:-$(last_checkpoint)}
  need "$checkpoint/actor" 2
  need "$sft_model/config.json" 0
  run rm -rf "$checkpoint/merged_hf_model.part" "$checkpoint/merged_hf_model"
  run "$trainer_bin/python" "$root/scripts/merge.py" --checkpoint "$checkpoint/actor" --sft-path "$sft_model" \
    --output-dir "$checkpoint/merged_hf_model.part"
  run mv -T "$checkpoint/merged_hf_model.part" "$checkpoint/merged_hf_model"
  run ln -sfnT "$checkpoint/merged_hf_model" "$exp_dir/merged_hf_model"
  [[ -z $(type -t export_profile) ]] || export_profile "$checkpoint/merged_hf_model"
  mark_done 3 "$key_3"
  echo "merged model: $checkpoint/merged_hf_model"
}

stage_4() {
  done_with 4 "$key_4" && skip 4 && return
  need "$exp_dir/merged_hf_model/config.json" 3
  need "$sft_model/config.json" 0
  ((force)) && run rm -rf "$exp_dir/eval"
  infer sft "$sft_model"
  infer grpo "$exp_dir/merged_hf_model"
  score sft
  score grpo
  wait_for_all "speech could not be scored: see above"
  run "$speech_bin/python" "$root/scripts/summarise.py" --exp-dir "$exp_dir" --settings "$(settings_json "${recorded_settings[@]}")"
  run "$speech_bin/python" "$root/scripts/report.py" --exp-dir "$exp_dir"
  mark_done 4 "$key_4"
  echo "report: $exp_dir/report.html; figures: $exp_dir/summary.json; speech and alignments: $exp_dir/eval"
}

# infer NAME MODEL: speech of the test set by a model.
infer() {
  run_long env OMP_NUM_THREADS=1 "$speech_bin/torchrun" --standalone --nproc-per-node "$infer_procs" "$root/infer_dist.py" \
    --llm-path "$2" --token2wav-dir "$token2wav_dir" --eval-set "$eval_jsonl" --output-dir "$exp_dir/eval/$1" \
    --seeds "${seed_list[@]}" --batch-size "$infer_batch_size" --device "$infer_device" --precision "$infer_precision" \
    --lm-precision "$infer_lm_precision" --max-new-tokens "$max_new_tokens" --temperature "$temperature" --top-p "$top_p" --top-k "$top_k" \
    --repetition-penalty "$repetition_penalty"
}

# score NAME: error rates of that speech, and what they do not see; on one core, beside the other model's.
score() {
  beside env OMP_NUM_THREADS=1 python="$speech_bin/python" eval_asr_dir="$eval_asr_dir" device="$infer_device" language="$language" \
    quality_utterances="$quality_utterances" reference_audio="$reference_audio" speaker_model_dir="$speaker_model_dir" \
    bash "$root/scripts/compute_wer.sh" "$exp_dir/eval/$1" "$eval_jsonl"
}

stage_5() {
  need "$exp_dir/merged_hf_model/config.json" 3
  run "$speech_bin/python" "$root/infer_single.py" --llm-path "$exp_dir/merged_hf_model" --device "$infer_device" \
    --token2wav-dir "$token2wav_dir" ${single_text:+--text "$single_text"} "${prompt_flags[@]}" \
    --output "$exp_dir/tongue_twister.wav"
}

skip() { echo "done already (force=1 redoes it)"; }

last_checkpoint() {
  local step=N
  [[ ! -f $exp_dir/checkpoints/latest_checkpointed_iteration.txt ]] ||
    step=$(<"$exp_dir/checkpoints/latest_checkpointed_iteration.txt")
  echo "$exp_dir/checkpoints/global_step_$step"
}

# Checkpoints of other settings must not be trained on by mistake.
check_checkpoints() {
  ((dry_run)) && return
  ((force)) && rm -rf "$exp_dir/checkpoints" "$exp_dir/tensorboard" "$exp_dir/validation"
  if [[ -f $exp_dir/checkpoints/settings && $(<"$exp_dir/checkpoints/settings") != "$key_2" ]]; then
    die "$exp_dir/checkpoints were trained with other settings: set exp_name to train anew beside them, or force=1 to train anew in their place"
  fi
  mkdir -p "$exp_dir/checkpoints"
  echo "$key_2" >"$exp_dir/checkpoints/settings"
}

# settings_json NAME...: variables as JSON.
settings_json() {
  local name value separator='{'
  for name; do
    value=${!name-}
    printf '%s"%s": "%s"' "$separator" "$name" "${value//\"/\\\"}"
    separator=', '
  done
  printf '}'
}

# The most memory of the run's processes goes into the summary.
watch_memory() {
  ((dry_run == 0)) && [[ -x $speech_bin/python ]] && ((stop >= 2)) || return 0
  mkdir -p "$exp_dir"
  "$speech_bin/python" "$root/scripts/watch_memory.py" --run-id $$ --output "$exp_dir/peak_memory_gib" &
  memory_pid=$!
}

# Sizes that veRL would refuse only after minutes.
check_batches() {
  local rollouts=$((mini_batch_size * rollout_n)) passes=$((micro_batch_size * num_gpus * num_nodes))
  ((mini_batch_size > 0 && train_batch_size % mini_batch_size == 0)) ||
    die "train_batch_size=$train_batch_size is no multiple of mini_batch_size=$mini_batch_size: change one of them"
  ((passes > 0 && rollouts % passes == 0)) ||
    die "mini_batch_size * rollout_n = $rollouts rollouts are no multiple of micro_batch_size * GPUs = $passes: change one of them"
}

configure() {
  [[ -f $root/conf/$profile.sh ]] || { log "no profile conf/$profile.sh" && usage; }
  # shellcheck source=conf/tiny.sh
  source "$root/conf/$profile.sh"
  ((preflight)) || check_batches
  case $credit in
  syllable) by_syllable=true ;;
  utterance) by_syllable=false ;;
  *) die "credit=$credit: it is syllable or utterance" ;;
  esac
  case $prompt_voice_per in
  text | rollout) ;;
  *) die "prompt_voice_per=$prompt_voice_per: it is text or rollout" ;;
  esac
  # The log-probabilities of rollouts are the old policy's. If top_p or top_k cut off tokens, they are those of the
  # distribution that is left, which the trainer does not compute: then it computes the old policy's itself.
  local reuse_log_probs=False
  [[ ! $rollout_top_p =~ ^1(\.0*)?$ ]] || ((rollout_top_k > 0)) || reuse_log_probs=True
  local device_list
  read -ra device_list <<<"$server_devices"
  read -ra seed_list <<<"$seeds"
  sft_model=$exp_dir/sft_model # sft_path as veRL can train it: stage 0 makes it
  speech_bin=$venv_root/speech/bin trainer_bin=$venv_root/trainer/bin
  server_command=(
    "$speech_bin/python" "$root/token2wav_asr_server.py" --token2wav-dir "$token2wav_dir" --asr-dir "$reward_asr_dir"
    --instances "$server_instances" --threads "$server_threads" --max-batch-size "$server_batch_size"
    --reward-curve "$reward_curve" --address "$server_address" --http-port "$http_port" --grpc-port "$grpc_port"
    --metrics-port "$metrics_port" --precision "$token2wav_precision" --devices "${device_list[@]}"
  )
  ((reward_tones)) || server_command+=(--no-tones)
  prompt_flags=()
  [[ -z $prompt_audio ]] || prompt_flags=(--prompt-audio "$prompt_audio" --prompt-text "$prompt_text")
  if [[ -n $prompt_list ]]; then
    server_command+=(--prompt-list "$prompt_list" --prompt-voice-per "$prompt_voice_per" --seed "$seed")
  else
    server_command+=("${prompt_flags[@]}")
  fi
  train_env=(
    "${profile_env[@]}" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TENSORBOARD_DIR="$exp_dir/tensorboard"
    OMP_NUM_THREADS="$train_threads" RAY_USAGE_STATS_ENABLED=0
  )
  verl_args=(
    trainer.v1.trainer_mode=tts_grpo # tts_grpo/training/trainer.py
    algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo="$norm_adv_by_std"
    data.train_files="$exp_dir/data/train.parquet" data.val_files="$exp_dir/data/test.parquet"
    data.train_batch_size="$train_batch_size" data.seed="$seed"
    data.max_prompt_length="$max_prompt_length" data.max_response_length="$max_response_length"
    data.truncation=error data.filter_overlong_prompts=False data.dataloader_num_workers=0
    actor_rollout_ref.model.path="$sft_model"
    actor_rollout_ref.actor.optim.lr="$learning_rate" actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.optim.lr_scheduler_type="$learning_rate_schedule"
    "actor_rollout_ref.actor.optim.override_optimizer_config={eps: $adam_eps}"
    actor_rollout_ref.actor.ppo_mini_batch_size="$mini_batch_size"
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu="$micro_batch_size"
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="$micro_batch_size"
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.n="$rollout_n" actor_rollout_ref.rollout.seed="$seed"
    actor_rollout_ref.rollout.temperature="$rollout_temperature" actor_rollout_ref.rollout.top_p="$rollout_top_p"
    actor_rollout_ref.rollout.top_k="$rollout_top_k" actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature="$rollout_temperature"
    actor_rollout_ref.rollout.val_kwargs.top_p="$rollout_top_p" actor_rollout_ref.rollout.val_kwargs.top_k="$rollout_top_k"
    actor_rollout_ref.rollout.calculate_log_probs=True algorithm.rollout_correction.bypass_mode="$reuse_log_probs"
    actor_rollout_ref.actor.calculate_entropy=True # for its curve; entropy_coeff is 0
    reward.custom_reward_function.path="$root/reward_tts.py" reward.custom_reward_function.name=compute_score
    "+reward.custom_reward_function.reward_kwargs={server_urls: '$server_urls', failure_file: '$exp_dir/reward_failure', by_syllable: $by_syllable}"
    trainer.n_gpus_per_node="$num_gpus" trainer.nnodes="$num_nodes"
    "trainer.logger=[console,tensorboard]" trainer.project_name=tts_grpo trainer.experiment_name="$exp_name"
    trainer.default_local_dir="$exp_dir/checkpoints" trainer.resume_mode=auto
    trainer.max_actor_ckpt_to_keep="$max_checkpoints" trainer.save_freq="$save_freq" trainer.test_freq="$test_freq"
    trainer.validation_data_dir="$exp_dir/validation" # what was said, for TensorBoard's audio
    hydra.run.dir="$exp_dir/log/hydra"                # its copy of the settings; the working folder by default
    trainer.val_before_train=True trainer.total_epochs=1000 trainer.total_training_steps="$total_steps"
  )
  recorded_settings=(
    profile recipe exp_name seed llm sft_path token2wav_dir prompt_audio prompt_list prompt_voice_per token2wav_precision
    reward_asr_dir eval_asr_dir train_texts num_train num_test max_text_s text_excludes train_jsonl test_jsonl
    max_prompt_length reward_curve reward_tones num_gpus num_nodes total_steps train_batch_size mini_batch_size rollout_n
    rollout_temperature rollout_top_p rollout_top_k max_response_length learning_rate learning_rate_schedule adam_eps credit
    norm_adv_by_std eval_strip_quotes eval_jsonl language seeds infer_precision infer_lm_precision temperature top_p top_k
    repetition_penalty max_new_tokens recipe_args overrides
  )
  checked_settings=(
    exp_dir venv_root make_envs trainer_requirements prompt_text known_answer_jsonl server_address server_urls
    http_port grpc_port metrics_port check_reward server_devices server_instances server_gib train_device micro_batch_size
    vllm_memory_share max_checkpoints ray_address
  )
}

# What each stage depends on, told anew before each: stage -1 may bring the files whose content counts.
set_keys() {
  # shellcheck disable=SC2034  # read by name
  overrides=${verl_overrides[*]-} recipe_args=${recipe_verl_args[*]-}
  key_0=$(key train_jsonl test_jsonl sft_path max_prompt_length max_bad_ratio)
  key_2=$(key key_0 seed token2wav_dir prompt_audio prompt_list prompt_voice_per token2wav_precision reward_asr_dir \
    reward_curve reward_tones num_gpus num_nodes total_steps train_batch_size mini_batch_size rollout_n \
    rollout_temperature rollout_top_p rollout_top_k max_response_length learning_rate learning_rate_schedule adam_eps \
    credit norm_adv_by_std recipe_args overrides)
  key_3=$(key key_2 llm_path)
  key_4=$(key key_3 eval_asr_dir eval_jsonl language quality_utterances reference_audio speaker_model_dir seeds \
    infer_batch_size infer_precision infer_lm_precision temperature top_p top_k repetition_penalty max_new_tokens)
}

main() {
  local positional=() stage begin
  while (($#)); do
    case $1 in
    --dry-run) dry_run=1 ;;
    --check) preflight=1 ;;
    --)
      shift
      verl_overrides=("$@")
      break
      ;;
    -h | --help) usage ;;
    *) positional+=("$1") ;;
    esac
    shift
  done
  start=${positional[0]--1} stop=${positional[1]-${positional[0]-5}}
  if ((${#positional[@]} > 2)) || ! [[ $start =~ ^(-1|[0-5])$ && $stop =~ ^(-1|[0-5])$ ]] || ((start > stop)); then
    usage
  fi
  [[ $force =~ ^[01]$ ]] || usage
  cd "$root"
  configure
  if ((preflight)); then
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$base_python" "$root/scripts/check.py" \
      --settings "$(settings_json "${recorded_settings[@]}" "${checked_settings[@]}")"
  fi
  trap cleanup EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TTS_GRPO_RUN=$$
  # Threads that wait give their core away: spinning, they make torch ten times slower on a busy machine.
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
  for ((stage = start; stage <= stop; stage++)); do
    echo "== stage $stage ($(date +%T))"
    begin=$SECONDS
    [[ -n $memory_pid ]] || watch_memory
    set_keys
    "stage_$stage"
    echo "== stage $stage took $((SECONDS - begin)) s"
    record "$stage" "$((SECONDS - begin))"
    if ((stage >= 4 && dry_run == 0)) && [[ -f $exp_dir/summary.json ]]; then # it was written before they were known
      "$speech_bin/python" "$root/scripts/summarise.py" --exp-dir "$exp_dir" --costs-only
    fi
  done
  exit # bash reads no further: an edit of this file does not disturb a run
}

main "$@"
