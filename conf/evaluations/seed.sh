# shellcheck shell=bash disable=SC2034  # run.sh's settings
# Evaluation "seed": the tables of mair-hub's first version and of CosyVoice's examples/grpo.
# Source: infer_dataset.py of github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm (5659ee4), and of
# github.com/FunAudioLLM/CosyVoice, examples/grpo/cosyvoice2 (ace7c47).
# What it cannot reproduce is in docs/differences.md.

temperature=${temperature:-0.8} top_p=${top_p:-0.95} top_k=${top_k:-50} max_new_tokens=${max_new_tokens:-2048}
repetition_penalty=${repetition_penalty:-1.1} # of Qwen's generation_config.json, which upstream's inference reads
infer_lm_precision=${infer_lm_precision:-fp32} infer_precision=${infer_precision:-fp16}
