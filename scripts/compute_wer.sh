#!/usr/bin/env bash
# Score the speech of infer_dist.py: error rates by the evaluation's ASR model, with alignments, and the metrics that
# error rates miss: speaker similarity, DNSMOS, pauses, speech rate, F0.
#
#   bash scripts/compute_wer.sh OUTPUT_DIR DATASET
#
#   OUTPUT_DIR  folder with seed_*/manifest.jsonl to score; receives scores.json, and utterances.jsonl and
#               alignment.txt next to each manifest
#   DATASET     JSONL of the test set; every utterance counts, and one without audio counts as all deletions
#
# Variables: python (the speech environment's), eval_asr_dir (a model folder for funasr, sherpa-onnx or faster-whisper),
# device (cpu or cuda), language (of utterances without one: zh or en), text_tags (reject or remove: tags such as
# [laughter] in the set's texts),
# seeds (seeds to score, separated by spaces; empty: all), quality_utterances (number for speaker similarity, DNSMOS and
# F0; 0: none), judge_asr_dir (a further recogniser, as eval_asr_dir; empty: none), reference_audio (the voice, if the set has no prompts), speaker_model_dir (a WavLM; empty: Resemblyzer).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
[[ $# -eq 2 ]] || {
  sed -n '2,16s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
python=${python:-$root/.venv/speech/bin/python}
eval_asr_dir=${eval_asr_dir:-$root/assets/tiny/asr_eval}
[[ -x $(command -v "$python") ]] || {
  echo "compute_wer.sh: no $python: run bash run.sh -1 -1" >&2
  exit 1
}
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$root/scripts/score.py" --output-dir "$1" \
  --eval-set "$2" --asr-dir "$eval_asr_dir" --device "${device:-cpu}" --language "${language:-zh}" \
  --text-tags "${text_tags:-reject}" \
  --quality-utterances "${quality_utterances:-80}" ${reference_audio:+--reference-audio "$reference_audio"} \
  ${judge_asr_dir:+--judge-asr-dir "$judge_asr_dir"} ${seeds:+--seeds ${seeds}} ${speaker_model_dir:+--speaker-model-dir "$speaker_model_dir"}
