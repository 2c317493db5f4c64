# shellcheck shell=bash disable=SC2154  # run.sh's variables
# The published evaluation sets: where they come from, and how stage -1 prepares them.

published_sets=(zero_shot_zh zero_shot_en zero_shot_hard_zh zero_shot_hard_en test_zh test_en test_hard)

is_published() { [[ " ${published_sets[*]} " == *" ${1%-stripped} "* ]]; }

# language_of NAME: print the language of a published set. Other sets have the language of the setting.
language_of() {
  if ! is_published "$1"; then
    echo "$language"
  elif [[ ${1%-stripped} == *_en ]]; then
    echo en
  else
    echo zh
  fi
}

# recogniser_of NAME: print the folder of the evaluation's recogniser for a set.
recogniser_of() { [[ $(language_of "$1") == en && -n $eval_asr_dir_en ]] && echo "$eval_asr_dir_en" || echo "$eval_asr_dir"; }

# described_sets: print three lines per evaluation set: its file, its language and the folder of its recogniser.
described_sets() {
  local file
  for file in "${eval_sets[@]}"; do
    printf '%s\n' "$file" "$(language_of "$(set_name "$file")")" "$(recogniser_of "$(set_name "$file")")"
  done
}

# read_eval_sets: put the files of the evaluation sets, those of eval_jsonls or else eval_jsonl, into the array eval_sets.
read_eval_sets() {
  eval_sets=("$eval_jsonl")
  # shellcheck disable=SC2162  # without -r, "\ " is a space within a path
  [[ -z ${eval_jsonls-} ]] || read -a eval_sets <<<"$eval_jsonls"
}

# choose_eval_sets: set eval_jsonl and eval_jsonls from the names in dataset, and eval_asr_dir_en if a set is English.
# eval_jsonl and eval_jsonls of the environment take precedence.
choose_eval_sets() {
  local names name suffix='' files=() path
  ((eval_strip_quotes == 0)) || suffix=-stripped
  read -ra names <<<"$dataset"
  for name in "${names[@]}"; do
    is_published "$name" && [[ $name != *-stripped ]] ||
      die "dataset=$dataset: $name is unknown: choose from ${published_sets[*]} (eval_strip_quotes=1 removes quotes), or set eval_jsonl to a file of yours"
    path=$workspace/data/$name$suffix.jsonl
    files+=("${path// /\\ }")
  done
  [[ -n ${eval_jsonl-} || ${#files[@]} -eq 1 ]] || eval_jsonls=${eval_jsonls:-${files[*]}}
  eval_jsonl=${eval_jsonl:-$workspace/data/${names[0]}$suffix.jsonl}
  read_eval_sets
  for path in "${eval_sets[@]}"; do
    [[ $(language_of "$(set_name "$path")") != en ]] || eval_asr_dir_en=${eval_asr_dir_en:-$workspace/faster-whisper-large-v3}
  done
}

# install_eval_sets: download and prepare the published sets that do not exist yet, and Whisper if one is English.
install_eval_sets() {
  local file name
  for file in "${eval_sets[@]}"; do
    name=$(set_name "$file")
    [[ ! -e $file ]] || continue
    is_published "$name" || die "the evaluation set $file is missing: correct its path (eval_jsonl, eval_jsonls), or choose published sets by dataset"
    install_eval_set "$name" "$file"
  done
  [[ $eval_asr_dir_en != "$workspace/faster-whisper-large-v3" ]] || install_whisper
}

# install_eval_set NAME OUTPUT: download a published set and write it to OUTPUT; without quotes if NAME ends with -stripped.
install_eval_set() {
  local repo source flags=()
  [[ $1 != *-stripped ]] || flags=(--strip-quotes)
  flags+=(--language "$(language_of "$1")")
  set -- "${1%-stripped}" "$2"
  case $1 in
  zero_shot_*) repo=yuekai/CV3-Eval ;;
  test_hard) repo=zhaochenyang20/seed-tts-eval ;; # seed-tts-eval's archive, which others publish as a repository
  *) repo=yuekai/seed_tts_cosy2 ;;
  esac
  source=$workspace/data/$repo
  if [[ $1 == test_hard ]]; then
    download --hub huggingface --repo "$repo" --repo-type dataset --include zh/hardcase.lst "zh/prompt-wavs/*" \
      --output-dir "$source" --require zh/hardcase.lst --need-gib 2
    run "$trainer_bin/python" "$root/scripts/prepare_eval_set.py" --source "$source/zh/hardcase.lst" \
      --output "$2" "${flags[@]}"
  else # usually data/SPLIT-00000-of-0000N.parquet; otherwise the README.md lists the files
    download --hub huggingface --repo "$repo" --repo-type dataset --include README.md "*$1*" \
      --output-dir "$source" --need-gib 2
    run "$trainer_bin/python" "$root/scripts/prepare_eval_set.py" --source "$source" --split "$1" \
      --output "$2" "${flags[@]}"
  fi
}

install_whisper() {
  ((make_envs == 0)) || run "$speech_bin/python" -m pip install --quiet --requirement "$root/requirements-asr.txt"
  download --hub huggingface --repo Systran/faster-whisper-large-v3 --output-dir "$eval_asr_dir_en" --need-gib 3.2 \
    --require model.bin config.json tokenizer.json preprocessor_config.json
}
