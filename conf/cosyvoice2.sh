# shellcheck shell=bash disable=SC2034,SC2154  # run.sh's variables
# Profile "cosyvoice2": the CosyVoice2 LLM (0.5B), CosyVoice2's token2wav and SenseVoice, on GPUs.
# scripts/full_size.sh has the values that differ from conf/settings.sh, which explains every setting, and the values
# that are derived from the GPUs. Any setting can also be set in the environment:
# num_gpus=8 profile=cosyvoice2 bash run.sh
#
# The defaults are the training settings of the newest published recipe (conf/recipes/mair-hub.sh). recipe=NAME uses the
# settings of a published result (conf/recipes/NAME.sh); docs/differences.md says what differs from each, and why.
#
# Status: run on an H100 with random weights of the full shape (docs/full_size.md has the measurements), but never with
# the released weights.

declare -gA official_repos=([modelscope]=iic/CosyVoice2-0.5B [huggingface]=FunAudioLLM/CosyVoice2-0.5B)
official_gib=4
official_files=(cosyvoice2.yaml flow.pt hift.pt campplus.onnx speech_tokenizer_v2.onnx)
codebook=''

# shellcheck source=scripts/full_size.sh
source "$root/scripts/full_size.sh"
