#!/usr/bin/env bash
# Train a speech language model with GRPO, stage by stage.
#
#   bash run.sh [--dry-run] [START [STOP]] [-- VERL_OVERRIDE...]
#   bash run.sh [--dry-run] evaluate
#   bash run.sh [--dry-run] reproduce [SYSTEM...]
#   bash run.sh --check | --settings
#
#   no stage: all, from -1 to 5; START alone: this stage. --dry-run prints the commands and runs none.
#   evaluate: scores the language model without any training: exp/evaluate-$profile/eval/SET/sft/scores.json
#   reproduce: does so for the published systems, and compares the scores with the published ones
#   --check: reports in a minute everything that would stop a run; runs no stage
#   --settings: prints all settings with their values, the origins of the values, and their meanings
#   VERL_OVERRIDE: veRL settings of stage 2, such as algorithm.norm_adv_by_std_in_grpo=False
#
#   -1  install: the speech and the trainer environment, and what the profile downloads
#    0  data: JSONL with one text per line -> parquet for veRL; the language model's folder, prepared for veRL
#    1  reward server: alone it stays in the foreground; before stage 2 it runs until training ends
#    2  GRPO on veRL; resumes from its last checkpoint
#    3  merge the last checkpoint (or $llm_path) to a Hugging Face folder, merged_hf_model
#    4  evaluation before and after: inference on the test set, error rates, summary.json, report.html
#    5  synthesis of a tongue-twister with the merged checkpoint
#
# A stage that is done with the same settings is skipped. All results are in exp/$exp_name.
# Settings: conf/settings.sh explains all of them; set them in conf/$profile.sh or in the environment.
# shellcheck disable=SC2329,SC2154  # stages are called by name; conf/settings.sh declares the settings
((BASH_VERSINFO[0] > 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] >= 4))) || {
  echo "run.sh: bash $BASH_VERSION is too old: version 4.4 or later is needed" >&2
  exit 1
}
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"
# shellcheck source=scripts/eval_sets.sh
source "$root/scripts/eval_sets.sh"

dry_run=0 mode=run
models=(sft grpo) # of the evaluation
server_pid='' memory_pid='' background_pids=()
running='' began=0 # current stage, and its start time in seconds
verl_overrides=()

usage() {
  sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//p}' "$root/run.sh" >&2
  exit 2
}

# cleanup: stop the processes that this run started and that still run: reward server, memory monitor, installations, and
# what these have left behind.
cleanup() {
  local status=$? pid
  trap - EXIT INT TERM
  [[ -z $running ]] || record "$running" "$((SECONDS - began))" || true
  ((status == 0 || status > 128 || dry_run)) || name_full_disks
  for pid in $(jobs -p); do stop "$pid"; done
  ((dry_run)) || end_processes $$
  exit "$status"
}

stage_-1() {
  work_on environments
  make_environments
  [[ -z $(type -t install_profile) ]] || install_profile
  echo "environments: $venv_root/speech, $venv_root/trainer"
}

# make_environments: make the environments, unless make_envs is 0, and check their Python.
make_environments() {
  local check_libpython=$root/tts_grpo/reward/libpython.py
  if ((make_envs)); then
    run "$base_python" -I "$check_libpython"
    export base_python venv_root
    in_background bash "$root/scripts/make_env.sh" speech "$root/requirements-cosyvoice.txt"
    in_background bash "$root/scripts/make_env.sh" trainer "$trainer_requirements"
    wait_for_all || die "an environment could not be made: see above"
  fi
  run "$speech_bin/python" -I "$check_libpython"
}

stage_0() {
  local state
  state=$(state_of 0)
  [[ -e $sft_model/config.json ]] && done_with 0 "$state" && skip && return
  work_on "$state"
  prepare_llm
  [[ $speech_prefix != voice ]] || run "$speech_bin/python" "$root/scripts/encode_prompts.py" --voices "$prompt_list" \
    --token2wav-dir "$token2wav_dir" --output "$voices_jsonl"
  run "$trainer_bin/python" "$root/prepare_data.py" --train-file "$train_jsonl" --test-file "$test_jsonl" \
    --output-dir "$exp_dir/data" --llm-path "$sft_model" "${data_flags[@]}"
  mark_done 0 "$state"
  echo "data: $exp_dir/data"
}

# prepare_llm: make sft_model from sft_path.
prepare_llm() {
  local speech_role=()
  [[ $speech_prefix == none ]] || speech_role=(--speech-role)
  run "$trainer_bin/python" "$root/scripts/prepare_llm.py" --sft-path "$sft_path" --output-dir "$sft_model" "${speech_role[@]}"
}

stage_1() {
  if ((start == 1 && stop == 1)); then
    run exec "${server_command[@]}"
  elif ((stop >= 2)) && done_with 2 "$(state_of 2)"; then
    echo "not needed: stage 2 is done"
  else
    work_on server
    start_server
  fi
}

stage_2() {
  local state
  need "$exp_dir/data/train.parquet" 0
  need "$sft_model/config.json" 0
  need_made_from 0 "$exp_dir/data"
  state=$(state_of 2)
  done_with 2 "$state" && skip && return
  check_checkpoints "$state"
  ((dry_run)) || work_on "$(<"$exp_dir/checkpoints/begun")"
  if ((dry_run == 0)) && ! server_ready "${server_urls%%[, ]*}"; then
    die "no reward server is ready at ${server_urls%%[, ]*}: start one with bash run.sh 1 1"
  fi
  local check=() trainer
  trainer=$(plain_path "$venv_root/trainer")
  ((check_reward == 0)) || check=(--check)
  run "$trainer_bin/python" "$root/reward_tts.py" --jsonl "$known_answer_jsonl" --limit 64 --language "$language" \
    --train-parquet "$exp_dir/data/train.parquet" --server-urls "$server_urls" "${check[@]}"
  run_beside_server env "${train_env[@]}" "$trainer_bin/python" "$root/scripts/train.py" --log-file "$exp_dir/log/train.log" \
    --total-steps "$total_steps" --checkpoint-dir "$exp_dir/checkpoints" --failure-file "$exp_dir/reward_failure" \
    --server-url "${server_urls%%[, ]*}" --tensorboard-dir "$exp_dir/tensorboard" --validation-dir "$exp_dir/validation" -- \
    "$trainer/bin/python" -m verl.trainer.main_ppo "${verl_args[@]}" "${profile_verl_args[@]}" \
    "${recipe_verl_args[@]}" "${verl_overrides[@]}"
  mark_done 2 "$state"
  [[ -z $server_pid ]] || kill "$server_pid" 2>/dev/null || true # it takes seconds to end, meanwhile stage 3 runs
  echo "checkpoints: $exp_dir/checkpoints; curves: tensorboard --logdir $exp_dir/tensorboard"
}

stage_3() {
  local checkpoint=${llm_path:-$(last_checkpoint)} state
  state=$(state_of 3)
  done_with 3 "$state" && skip && return
  work_on "$state"
  need "$checkpoint/actor" 2
  need "$sft_model/config.json" 0
  run "$base_python" -IS "$root/scripts/checkpoints.py" --check "$checkpoint"
  run rm -rf "$checkpoint/merged_hf_model.part" "$checkpoint/merged_hf_model"
  run "$trainer_bin/python" "$root/scripts/merge.py" --checkpoint "$checkpoint/actor" --sft-path "$sft_model" \
    --output-dir "$checkpoint/merged_hf_model.part"
  run mv -T "$checkpoint/merged_hf_model.part" "$checkpoint/merged_hf_model"
  run ln -sfnT "$checkpoint/merged_hf_model" "$exp_dir/merged_hf_model"
  [[ -z $(type -t export_profile) ]] || export_profile "$checkpoint/merged_hf_model"
  mark_done 3 "$state"
  echo "merged model: $checkpoint/merged_hf_model"
}

stage_4() {
  local state evaluated=() failed=()
  need "$exp_dir/merged_hf_model/config.json" 3
  need "$sft_model/config.json" 0
  need_made_from 3 "$exp_dir/merged_hf_model"
  state=$(state_of 4)
  done_with 4 "$state" && skip && return
  work_on "$state"
  [[ -z $server_pid ]] || { stop "$server_pid" && server_pid=''; } # its memory is needed
  evaluate_all
  show_first_set "${evaluated[0]}"
  run "$speech_bin/python" "$root/scripts/summarise.py" --exp-dir "$exp_dir" --sets "${evaluated[@]}" --settings "$(recorded_settings)"
  run "$speech_bin/python" "$root/scripts/report.py" --exp-dir "$exp_dir" --sets "${evaluated[@]}"
  ((${#failed[@]} == 0)) || die "the evaluation of ${failed[*]} failed: see above; summary.json and report.html have ${evaluated[*]}, and the same command repeats only what failed"
  mark_done 4 "$state"
  echo "report: $exp_dir/report.html; figures: $exp_dir/summary.json; speech and alignments: $exp_dir/eval"
}

# evaluate_all: evaluate each set, and put the names into the arrays evaluated and failed.
evaluate_all() {
  local file
  ((force == 0)) || run rm -rf "$exp_dir/eval"
  for file in "${eval_sets[@]}"; do
    if evaluate "$file"; then evaluated+=("$(set_name "$file")"); else failed+=("$(set_name "$file")"); fi
  done
  ((${#evaluated[@]})) || die "no evaluation set could be evaluated (${failed[*]}): see above"
}

# evaluate_only: install what the evaluation needs, and evaluate the language model as it is.
evaluate_only() {
  local evaluated=() failed=()
  [[ ! -e $exp_dir/.done/0 && ! -e $exp_dir/checkpoints ]] || die "$exp_dir has a training, whose language model would be replaced: set another exp_name"
  [[ -z $llm_path ]] || die "evaluate scores the model in sft_path, and llm_path=$llm_path has no effect: run bash run.sh 3 4, or set sft_path to a merged model"
  make_environments
  [[ -z $(type -t install_evaluation) ]] || install_evaluation
  prepare_llm
  evaluate_all
  ((${#failed[@]} == 0)) || die "the evaluation of ${failed[*]} failed: see above; the same command repeats only what failed"
  echo "scores: $exp_dir/eval/SET/sft/scores.json of ${evaluated[*]}"
}

# set_name FILE: print the name of an evaluation set, that of its file.
set_name() { basename "$1" .jsonl; }

# evaluate FILE: synthesise and score one evaluation set with all models, unless that is done already. Its results do not
# depend on the other sets. It returns a failure instead of ending the run, so that the other sets are still evaluated.
evaluate() {
  local name state set_language set_recogniser model
  name=$(set_name "$1")
  set_language=$(language_of "$name") set_recogniser=$(recogniser_of "$name")
  local eval_jsonl=$1 eval_jsonls='' language=$set_language eval_asr_dir=$set_recogniser eval_asr_dir_en=''
  state=$(state_of 4) || return
  if done_with "4-$name" "$state" && [[ -d $exp_dir/eval/$name ]]; then
    echo "$name: already evaluated"
    return
  fi
  ((dry_run)) || rm -f "$exp_dir/.done/4-$name"
  for model in "${models[@]}"; do infer "$model" "$(model_folder "$model")" || return; done
  for model in "${models[@]}"; do score "$model"; done
  wait_for_all && mark_done "4-$name" "$state"
}

# model_folder NAME: print the folder of a model of the evaluation.
model_folder() { [[ $1 == sft ]] && echo "$sft_model" || echo "$exp_dir/merged_hf_model"; }

# show_first_set NAME: make eval/sft and eval/grpo links to the results of a set.
show_first_set() {
  local model
  ((dry_run)) && return
  for model in sft grpo; do
    [[ -L $exp_dir/eval/$model || ! -e $exp_dir/eval/$model ]] || mv -T "$exp_dir/eval/$model" "$exp_dir/eval/$model-before"
    ln -sfnT "$1/$model" "$exp_dir/eval/$model"
  done
}

# infer NAME MODEL: synthesise $eval_jsonl with a model into eval/SET/NAME. This is a link to a folder per state, so that
# speech made with other settings is kept.
infer() {
  local folder state
  folder=$exp_dir/eval/$(set_name "$eval_jsonl")/$1
  if ((dry_run == 0)); then
    state=$(state_of 4 "$2" | sha256sum | cut -c 1-12) || return
    mkdir -p "$folder-$state" && ln -sfnT "$1-$state" "$folder" || return
    folder+=-$state
  fi
  run_long env OMP_NUM_THREADS=1 "$speech_bin/torchrun" --standalone --nproc-per-node "$infer_procs" "$root/infer_dist.py" \
    --llm-path "$2" "${synthesis_flags[@]}" --language "$language" --eval-set "$eval_jsonl" --output-dir "$folder" --seeds "${seed_list[@]}" \
    --batch-size "$infer_batch_size" --engine "$infer_engine"
}

# score NAME: compute error rates and quality metrics of eval/SET/NAME, on one core, in parallel with the other model's.
score() {
  in_background env OMP_NUM_THREADS=1 python="$speech_bin/python" eval_asr_dir="$eval_asr_dir" judge_asr_dir="$judge_asr_dir" device="$infer_device" language="$language" text_tags="$text_tags" \
    seeds="$seeds" quality_utterances="$quality_utterances" reference_audio="$reference_audio" speaker_model_dir="$speaker_model_dir" \
    bash "$root/scripts/compute_wer.sh" "$exp_dir/eval/$(set_name "$eval_jsonl")/$1" "$eval_jsonl"
}

stage_5() {
  work_on "this run's: $$ $(date +%T)" # every run synthesises it again
  need "$exp_dir/merged_hf_model/config.json" 3
  run "$speech_bin/python" "$root/infer_single.py" --llm-path "$exp_dir/merged_hf_model" "${synthesis_flags[@]}" \
    --language "$language" --seed "${seed_list[0]}" ${single_text:+--text "$single_text"} "${prompt_flags[@]}" --output "$exp_dir/tongue_twister.wav"
}

skip() { echo "already done (force=1 repeats it)"; }

last_checkpoint() {
  local step=N
  [[ ! -f $exp_dir/checkpoints/latest_checkpointed_iteration.txt ]] ||
    step=$(<"$exp_dir/checkpoints/latest_checkpointed_iteration.txt")
  echo "$exp_dir/checkpoints/global_step_$step"
}

# choose_checkpoint: make training and merge use the newest complete checkpoint. If the last one is damaged, the training
# is not done.
choose_checkpoint() {
  [[ -d $exp_dir/checkpoints ]] || return 0
  local before
  before=$(last_checkpoint)
  "$base_python" -IS "$root/scripts/checkpoints.py" "$exp_dir/checkpoints"
  [[ $(last_checkpoint) == "$before" ]] || rm -f "$exp_dir/.done/2"
}

# check_checkpoints STATE: stop if the existing checkpoints were trained with other settings. A larger total_steps
# extends a training. After a change of the code, only an unfinished training is resumed.
check_checkpoints() {
  ((dry_run)) && return
  local changed ignore=() trained=$exp_dir/checkpoints/settings step=
  ((force)) && rm -rf "$exp_dir/checkpoints" "$exp_dir/tensorboard" "$exp_dir/validation" "$exp_dir/.done/2"
  if [[ -f $trained ]]; then
    [[ $learning_rate_schedule != constant ]] || ignore+=(total_steps)
    [[ -f $exp_dir/.done/2 ]] || ignore+=(code)
    changed=$(differences "$trained" "$1" "${ignore[@]}")
    [[ -z $changed ]] || die "$exp_dir/checkpoints were trained with other settings ($changed): set another exp_name, or set force=1 to delete them and train again"
  fi
  step=$(basename "$(last_checkpoint)")
  step=${step#global_step_}
  [[ $step == N ]] || ((step <= total_steps)) || die "$exp_dir/checkpoints has trained $step steps, more than total_steps=$total_steps: set another exp_name, or set force=1 to delete them and train again"
  mkdir -p "$exp_dir/checkpoints"
  rm -f "$exp_dir/.done/2"
  replace_file "$trained" <<<"$1"
  [[ -f $exp_dir/checkpoints/begun ]] || replace_file "$exp_dir/checkpoints/begun" <<<"$(date +%FT%T) $$"
}

# recorded_settings: print the settings as JSON; those of finished stages have the values with which the stages ran.
recorded_settings() {
  ((dry_run == 0)) || { all_settings json && return; }
  all_settings json --recorded "$exp_dir/.done/0" "$exp_dir/checkpoints/settings" "$exp_dir/.done/3"
}

# state_of STAGE [MODEL]: print the state that the stage's result depends on (see scripts/settings.py). With MODEL,
# print the state for the evaluation's speech of that model.
state_of() {
  ((dry_run)) && return
  local stages=("$1") read=() made_from=() model
  case $1${2:+model} in
  0) [[ $speech_prefix != voice ]] || read=(prompt_list="$prompt_list" token2wav_dir="$token2wav_dir") made_from=(seed="$seed") ;;
  2) made_from=(data="$(checksum "$exp_dir/.done/0")") ;;
  3) [[ -n $llm_path ]] || made_from=(training="$(checksum "$exp_dir/checkpoints/settings")" checkpoint="$(basename "$(last_checkpoint)")") ;;
  4)
    stages+=(4s)
    for model in "${models[@]}"; do read+=("$model=$(model_folder "$model")"); done
    ;;
  4model) read=(model="$2") made_from=(model="$2") ;;
  esac
  all_settings state --stages "${stages[@]}" --commands "$(commands_of "$1${2:+model}" "${stages[@]}")" --read "${read[@]}" --made-from "${made_from[@]}" \
    --cache "$exp_dir/.done/checksums.json"
}

# commands_of RESULT STAGE...: print a checksum of the command lines that this file and conf/ build to make a result.
commands_of() {
  (
    print_only "${@:2}"
    configure
    case $1 in
    2) run "${server_command[@]}" && stage_2 ;;
    4) for model in "${models[@]}"; do infer "$model" model && score "$model"; done ;;
    4model) infer model model ;;
    *) "stage_$1" ;;
    esac
  ) | sha256sum | cut -c 1-16
}

# need_made_from STAGE RESULT: stop if the stage's inputs have changed since it made RESULT.
need_made_from() {
  ((dry_run)) && return
  local changed
  changed=$(differences "$exp_dir/.done/$1" "$(state_of "$1")")
  [[ -z $changed ]] || die "$2 was made from other inputs ($changed): run bash run.sh $1 $1 first"
}

# watch_memory: record the peak memory of the run's processes for the summary.
watch_memory() {
  ((dry_run == 0)) && [[ -x $speech_bin/python ]] && ((stop >= 2)) || return 0
  mkdir -p "$exp_dir"
  "$speech_bin/python" "$root/scripts/watch_memory.py" --run-id $$ --output "$exp_dir/peak_memory_gib" &
  memory_pid=$!
}

# refused_overrides: print a line per veRL override that would silently bypass this recipe, with what to do instead.
refused_overrides() {
  local override key name trainer="this recipe's trainer, which stops at failed rollouts and gives credit, would be replaced or work otherwise: leave it out (docs/credit.md says how to change the algorithm)"
  local -A instead=(
    ["trainer.v1"]=$trainer ["trainer.use_v1"]=$trainer
    ["actor_rollout_ref.model.external_lib"]="it loads this recipe's engine and rollouts: leave it out, and import what you need in tts_grpo/training/engine.py"
    ["reward.custom_reward_function.reward_kwargs"]="set credit and server_urls"
    ["actor_rollout_ref.actor.checkpoint"]="a training resumes only from checkpoints with all their files: leave it out"
    ["actor_rollout_ref.model.path"]="set sft_path, and run stage 0 again" ["data.train_files"]="set train_jsonl, and run stage 0 again"
    ["data.val_files"]="set test_jsonl, and run stage 0 again" ["trainer.default_local_dir"]="set exp_dir"
    ["trainer.total_training_steps"]="set total_steps"
  )
  for override in "${recipe_verl_args[@]}" "${verl_overrides[@]}"; do
    name=$(sed -E 's/^[+~]*//; s/[=@].*//; s/[[:space:]]//g; q' <<<"$override")
    [[ $override != -* ]] || echo "-- $override is refused: it is an option of Hydra, and only settings of veRL (name=value) may follow --"
    for key in "${!instead[@]}"; do # the key itself, a key below it, or a key above it
      [[ $name. != "$key".* && $key. != "$name".* ]] || echo "-- $override is refused: ${instead[$key]}"
    done
  done
}

# contradictions: print a line per pair of inconsistent settings. veRL would reject these only after minutes.
contradictions() {
  local rollouts=$((mini_batch_size * rollout_n)) passes=$((micro_batch_size * num_gpus * num_nodes))
  ((train_batch_size % mini_batch_size == 0)) ||
    echo "train_batch_size=$train_batch_size is not a multiple of mini_batch_size=$mini_batch_size: change one of them"
  ((rollouts % passes == 0)) ||
    echo "mini_batch_size * rollout_n = $rollouts rollouts are not a multiple of micro_batch_size * GPUs = $passes: change one of them"
  ((pack_tokens == 0 || pack_tokens >= max_prompt_length + max_response_length)) ||
    echo "pack_tokens=$pack_tokens holds no rollout of max_prompt_length + max_response_length = $((max_prompt_length + max_response_length)) tokens: enlarge it, or set pack_tokens=0"
  [[ $server_address =~ ^(127\..*|localhost|::1)$ || -n $server_secret_file ]] ||
    echo "server_address=$server_address serves other machines: set server_secret_file to a file with a secret, the same for servers and training (SECURITY.md)"
  [[ $credit == utterance || $adv_estimator == grpo ]] ||
    echo "credit=syllable shares GRPO's advantages among syllables, but adv_estimator=$adv_estimator (algorithm=$algorithm): set credit=utterance"
  [[ $credit == utterance || $overlong_percent == 0 ]] ||
    echo "credit=syllable cannot share the length penalty of overlong_percent=$overlong_percent among syllables: set credit=utterance, or overlong_percent=0"
  [[ $speech_prefix != recording ]] || ((max_response_length + 125 <= 2048)) ||
    echo "speech_prefix=recording adds up to 125 tokens, and the reward server takes 2048: lower max_response_length=$max_response_length"
  [[ $speech_prefix != voice || (-n $prompt_list && $prompt_voice_per == text) ]] ||
    echo "speech_prefix=voice needs a prompt_list, and prompt_voice_per=text, so that the reward has the voice of the prompt: set both"
  set_name_faults
  ((num_nodes == 1)) || [[ -n $ray_address ]] ||
    echo "num_nodes=$num_nodes needs ray_address: start Ray on each machine (ray start), see docs/full_size.md"
}

# set_name_faults: print what is wrong with the names of the evaluation sets: results are in eval/NAME.
set_name_faults() {
  local name names=()
  read_eval_sets
  for name in "${eval_sets[@]}"; do
    name=$(set_name "$name")
    [[ $name != sft && $name != grpo ]] ||
      echo "an evaluation set is named $name, as the results of a model are: rename a file of eval_jsonl or eval_jsonls"
    [[ " ${names[*]} " != *" $name "* ]] ||
      echo "two evaluation sets are named $name, and both would have their results in eval/$name: rename a file of eval_jsonls"
    names+=("$name")
  done
}

configure() {
  [[ -z $(type -t configure_profile) ]] || configure_profile
  local by_syllable=false check_freq=$check_reward_freq
  ((check_reward)) || check_freq=0
  [[ $credit != syllable ]] || by_syllable=true
  # The rollouts' log-probabilities serve as those of the old policy. With top_p or top_k, however, they belong to the
  # truncated distribution, which the trainer does not compute. It then recomputes the old policy's log-probabilities.
  local reuse_log_probs=False
  [[ ! $rollout_top_p =~ ^1(\.0*)?$ ]] || ((rollout_top_k > 0)) || reuse_log_probs=True
  # GSPO's clip range is narrower than the difference between the log-probabilities of rollout engine and trainer, and
  # with LoRA, the rollout engine gets merged weights in bfloat16.
  [[ $loss_mode != gspo ]] && ((lora_rank == 0)) || reuse_log_probs=False
  local use_kl=False
  [[ ${kl_loss_coef%%[eE]*} != *[1-9]* ]] || use_kl=True
  local device_list
  read -ra device_list <<<"$server_devices"
  local asr_dirs=("$reward_asr_dir") more_asr_dirs
  # shellcheck disable=SC2162  # without -r, "\ " is a space within a path
  [[ -z $reward_asr_dirs ]] || read -a asr_dirs <<<"$reward_asr_dirs"
  read_eval_sets
  more_asr_dirs=("${asr_dirs[@]:1}")
  read -ra seed_list <<<"$seeds"
  sft_model=$exp_dir/sft_model # stage 0 makes it from sft_path, in a form that veRL can train
  speech_bin=$venv_root/speech/bin trainer_bin=$venv_root/trainer/bin
  server_command=(
    "$speech_bin/python" "$root/token2wav_asr_server.py" --token2wav-dir "$token2wav_dir" --asr-dir "${asr_dirs[0]}"
    --instances "$server_instances" --threads "$server_threads" --max-batch-size "$server_batch_size"
    --reward-curve "$reward_curve" --address "$server_address" --http-port "$http_port" --grpc-port "$grpc_port"
    --metrics-port "$metrics_port" --batch-timeout-s "$batch_timeout_s" --precision "$token2wav_precision" --devices "${device_list[@]}"
    --rewards "$rewards" --asr-pool "$reward_asr_pool"
  )
  ((${#more_asr_dirs[@]} == 0)) || server_command+=(--more-asr-dirs "${more_asr_dirs[@]}")
  ((check_reward == 0)) || server_command+=(--known-answers "$known_answer_jsonl")
  ((reward_tones)) || server_command+=(--no-tones)
  [[ -z $server_secret_file ]] || server_command+=(--secret-file "$server_secret_file")
  server_command+=(--language "$language")
  text_flags=(--language "$language" --text-tags "$text_tags" --llm-text "$llm_text")
  data_flags=(
    --eval-set "${eval_sets[@]}" --asr-dirs "${asr_dirs[@]}" "${text_flags[@]}" --max-prompt-length "$max_prompt_length" --max-bad-ratio "$max_bad_ratio"
    --max-test-overlap "$max_test_overlap" --batch-size "$train_batch_size" --max-new-tokens "$max_new_tokens"
  )
  voices_jsonl=$exp_dir/voices.jsonl # stage 0 makes it from prompt_list, with speech_prefix=voice
  case $speech_prefix in
  recording) data_flags+=(--speech-prefix recording) ;;
  voice) data_flags+=(--speech-prefix voice --voices "$voices_jsonl" --seed "$seed") ;;
  esac
  prompt_flags=()
  [[ -z $prompt_audio ]] || prompt_flags=(--prompt-audio "$prompt_audio" --prompt-text "$prompt_text")
  if [[ -n $prompt_list ]]; then
    server_command+=(--prompt-list "$prompt_list" --prompt-voice-per "$prompt_voice_per" --seed "$seed")
  else
    server_command+=("${prompt_flags[@]}")
  fi
  synthesis_flags=( # flags of stages 4 and 5
    --token2wav-dir "$token2wav_dir" --device "$infer_device" --precision "$infer_precision"
    --lm-precision "$infer_lm_precision" --max-new-tokens "$max_new_tokens" --temperature "$temperature"
    --top-p "$top_p" --top-k "$top_k" --repetition-penalty "$repetition_penalty"
    --repetition-window "$repetition_window" --min-token-text-ratio "$min_token_text_ratio"
    --max-token-text-ratio "$max_token_text_ratio" --text-tags "$text_tags" --llm-text "$llm_text"
  )
  train_env=(
    "${profile_env[@]}" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TENSORBOARD_DIR="$exp_dir/tensorboard"
    OMP_NUM_THREADS="$train_threads" RAY_USAGE_STATS_ENABLED=0
  )
  verl_args=(
    trainer.v1.trainer_mode=tts_grpo # tts_grpo/training/trainer.py
    algorithm.adv_estimator="$adv_estimator" algorithm.norm_adv_by_std_in_grpo="$norm_adv_by_std"
    algorithm.filter_groups.enable="$filter_groups"
    actor_rollout_ref.actor.policy_loss.loss_mode="$loss_mode" actor_rollout_ref.actor.loss_agg_mode="$loss_agg_mode"
    # by default, veRL divides the loss by the longest rollout of each micro-batch
    actor_rollout_ref.actor.loss_scale_factor="$max_response_length"
    actor_rollout_ref.actor.clip_ratio_low="$clip_ratio_low" actor_rollout_ref.actor.clip_ratio_high="$clip_ratio_high"
    actor_rollout_ref.actor.clip_ratio_c="$clip_ratio_c"
    data.train_files="$(hydra "$exp_dir/data/train.parquet")" data.val_files="$(hydra "$exp_dir/data/test.parquet")"
    data.train_batch_size="$train_batch_size" data.seed="$seed"
    data.max_prompt_length="$max_prompt_length" data.max_response_length="$max_response_length"
    data.truncation=error data.filter_overlong_prompts=False data.dataloader_num_workers=0
    actor_rollout_ref.model.path="$(hydra "$sft_model")"
    actor_rollout_ref.actor.optim.lr="$learning_rate" actor_rollout_ref.actor.use_kl_loss="$use_kl"
    actor_rollout_ref.actor.kl_loss_coef="$kl_loss_coef" actor_rollout_ref.actor.kl_loss_type="$kl_loss_type"
    actor_rollout_ref.model.lora_rank="$lora_rank" actor_rollout_ref.model.lora_alpha="$lora_alpha"
    actor_rollout_ref.actor.fsdp_config.seed="$seed"
    actor_rollout_ref.model.lora.merge=True # rollouts with the sum of weights and adapters
    actor_rollout_ref.model.target_modules="$([[ $lora_modules == all-linear ]] && echo all-linear || echo "[${lora_modules// /,}]")"
    actor_rollout_ref.actor.optim.lr_scheduler_type="$learning_rate_schedule"
    "actor_rollout_ref.actor.optim.override_optimizer_config={eps: $adam_eps}"
    actor_rollout_ref.actor.ppo_mini_batch_size="$mini_batch_size"
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu="$micro_batch_size"
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="$micro_batch_size"
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu="$micro_batch_size"
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.n="$rollout_n" actor_rollout_ref.rollout.seed="$seed"
    actor_rollout_ref.rollout.temperature="$rollout_temperature" actor_rollout_ref.rollout.top_p="$rollout_top_p"
    actor_rollout_ref.rollout.top_k="$rollout_top_k" actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.temperature="$rollout_temperature"
    actor_rollout_ref.rollout.val_kwargs.top_p="$rollout_top_p" actor_rollout_ref.rollout.val_kwargs.top_k="$rollout_top_k"
    actor_rollout_ref.rollout.calculate_log_probs=True algorithm.rollout_correction.bypass_mode="$reuse_log_probs"
    actor_rollout_ref.actor.calculate_entropy=True # logged only: entropy_coeff is 0
    reward.custom_reward_function.path="$(hydra "$root/reward_tts.py")" reward.custom_reward_function.name=compute_score
    "+reward.custom_reward_function.reward_kwargs={server_urls: $(hydra "$server_urls"), failure_file: $(hydra "$exp_dir/reward_failure"), by_syllable: $by_syllable, patience_s: $reward_patience_s, max_unscored_share: $max_unscored_share, language: $language, rewards: $(hydra "$rewards"), check_freq: $check_freq, known_answer_jsonl: $(hydra "$(realpath -m "$known_answer_jsonl")")}"
    trainer.n_gpus_per_node="$num_gpus" trainer.nnodes="$num_nodes"
    "trainer.logger=[console,tensorboard]" trainer.project_name=tts_grpo trainer.experiment_name="$(hydra "$exp_name")"
    trainer.default_local_dir="$(hydra "$exp_dir/checkpoints")" trainer.resume_mode=auto
    # With 1, veRL would delete the old checkpoint before the new one is complete.
    trainer.max_actor_ckpt_to_keep="$((max_checkpoints > 1 ? max_checkpoints : 2))" trainer.save_freq="$save_freq" trainer.test_freq="$test_freq"
    trainer.validation_data_dir="$(hydra "$exp_dir/validation")" # validation responses, for TensorBoard's audio
    hydra.run.dir="$(hydra "$exp_dir/log/hydra")"                # Hydra's copy of the settings, by default in the working folder
    trainer.val_before_train=True trainer.total_epochs="$total_steps" trainer.total_training_steps="$total_steps"
  )
  ((overlong_percent * max_response_length < 100)) || verl_args+=(
    reward.reward_manager.name=dapo
    "+reward.reward_kwargs={max_resp_len: $max_response_length, overlong_buffer_cfg: {enable: True, len: $((max_response_length * overlong_percent / 100)), penalty_factor: 1.0, log: False}}"
  )
}

main() {
  local positional=() wrong=() described=() stage
  while (($#)); do
    case $1 in
    --dry-run) dry_run=1 ;;
    --check) mode=check ;;
    --settings) mode=settings ;;
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
  case ${positional[0]-} in
  reproduce)
    ((dry_run == 0)) || positional+=(--dry-run)
    exec "${base_python:-python3}" "$root/scripts/reproduce.py" "${positional[@]:1}"
    ;;
  evaluate)
    ((${#positional[@]} == 1)) || usage
    mode=evaluate positional=(4) models=(sft)
    exp_name=${exp_name:-evaluate-${recipe:-${profile:-tiny}}}
    ;;
  esac
  start=${positional[0]--1} stop=${positional[1]-${positional[0]-5}}
  if ((${#positional[@]} > 2)) || ! [[ $start =~ ^(-1|[0-5])$ && $stop =~ ^(-1|[0-5])$ ]] || ((start > stop)); then
    usage
  fi
  cd "$root"
  require_tools
  load_settings
  [[ -z $server_secret_file ]] || export TTS_GRPO_SECRET_FILE=$server_secret_file
  if [[ $mode == settings ]]; then
    all_settings table
    return
  fi
  mapfile -t wrong < <(
    ((dry_run)) || { folder_faults && shared_memory_faults; }
    contradictions
    refused_overrides
  )
  adapt_to_machine
  configure
  if [[ $mode == check ]]; then
    mapfile -t described < <(described_sets)
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$base_python" "$root/scripts/check.py" --settings "$(all_settings json)" \
      --eval-sets "${described[@]}" --contradictions "${wrong[@]}" --data-flags "${data_flags[@]}"
  fi
  ((${#wrong[@]} == 0)) || die "${wrong[0]}"
  trap cleanup EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TTS_GRPO_RUN=$$ TTS_GRPO_EXP_DIR=$exp_dir
  # Idle OpenMP threads of torch spin for some 20 microseconds before they yield their core. In a virtual machine, waking
  # a thread takes longer than most of its tasks: without spinning, an update on two idle cores takes twice as long. Ten
  # times as much spinning makes it five times slower on busy cores.
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-active} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
  ((dry_run)) || end_left_processes
  if [[ $mode == evaluate ]]; then
    evaluate_only
    exit
  fi
  ((dry_run || start > 3 || stop < 1)) || choose_checkpoint
  for ((stage = start; stage <= stop; stage++)); do
    echo "== stage $stage ($(date +%T))"
    running=$stage began=$SECONDS worked_on=''
    [[ -n $memory_pid ]] || watch_memory
    "stage_$stage"
    echo "== stage $stage took $((SECONDS - began)) s"
    record "$stage" "$((SECONDS - began))"
    running=''
    if ((stage >= 4 && dry_run == 0)) && [[ -f $exp_dir/summary.json ]]; then # it was written before this stage's time was known
      "$speech_bin/python" "$root/scripts/summarise.py" --exp-dir "$exp_dir" --costs-only
    fi
  done
  exit # stop reading this file here, so that editing it does not disturb a run
}

main "$@"
