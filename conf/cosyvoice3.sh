# shellcheck shell=bash disable=SC2034,SC2154  # run.sh's variables
# Profile "cosyvoice3": the language model of Fun-CosyVoice3-0.5B, its token2wav and SenseVoice, on GPUs.
# scripts/full_size.sh has the values that it shares with CosyVoice2's profile, and docs/cosyvoice3.md what differs.
#
# Status: trained on an H200 with random weights of the full shape (docs/cosyvoice3.md), but never with the released
# weights.

declare -gA official_repos=([modelscope]=FunAudioLLM/Fun-CosyVoice3-0.5B-2512 [huggingface]=FunAudioLLM/Fun-CosyVoice3-0.5B-2512)
official_gib=6
official_files=(cosyvoice3.yaml flow.pt hift.pt campplus.onnx speech_tokenizer_v3.onnx)
codebook=-cosyvoice3

llm=${llm:-official}
[[ $llm == official ]] || die "llm=$llm is a model with CosyVoice2's speech tokens: set profile=cosyvoice2, or leave out llm"

# evaluation: CosyVoice's repetition aware sampling (ras_sampling in cosyvoice3.yaml)
temperature=${temperature:-1.0} top_p=${top_p:-0.8} top_k=${top_k:-25} repetition_window=${repetition_window:-10}

# shellcheck source=scripts/full_size.sh
source "$root/scripts/full_size.sh"
