#!/usr/bin/env bash
# Score the speech that infer_dist.py made: error rates by the evaluation recogniser, with alignments, and what these
# do not see: voice, sound, pauses, pace, melody.
#
#   bash scripts/compute_wer.sh OUTPUT_DIR DATASET
#
#   OUTPUT_DIR  its seed_*/manifest.jsonl are scored, into scores.json, and into utterances.jsonl and alignment.txt
#               beside each manifest
#   DATASET     JSONL of the test set; every utterance of it counts, one without audio as all deletions
#
# Variables: python (of the speech environment), eval_asr_dir (folder of funasr, sherpa-onnx or faster-whisper), device
# (cpu or cuda), language (zh or en), text_tags (reject or remove: tags such as [laughter] in the set's texts), seeds
# (to score, with spaces; empty: all), quality_utterances (for speaker similarity, DNSMOS and F0; 0: none),
# reference_audio (of the voice, where the set has no prompts), speaker_model_dir (of a WavLM; else Resemblyzer).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
[[ $# -eq 2 ]] || {
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
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
  ${seeds:+--seeds ${seeds}} ${speaker_model_dir:+--speaker-model-dir "$speaker_model_dir"}
