# shellcheck shell=bash disable=SC2034  # run.sh's settings
# Evaluation "official": CosyVoice's own inference, of CosyVoice2 and CosyVoice3.
# Source: cosyvoice2.yaml of iic/CosyVoice2-0.5B, and Qwen2LM.inference (cosyvoice/llm/llm.py) and ras_sampling
# (cosyvoice/utils/common.py) of github.com/FunAudioLLM/CosyVoice (ace7c47). CosyVoice3 has the same values.

temperature=${temperature:-1.0} top_p=${top_p:-0.8} top_k=${top_k:-25} repetition_window=${repetition_window:-10}
min_token_text_ratio=${min_token_text_ratio:-2} max_token_text_ratio=${max_token_text_ratio:-20}
repetition_penalty=${repetition_penalty:-1.0}
infer_lm_precision=${infer_lm_precision:-fp32} infer_precision=${infer_precision:-fp32}
llm_text=${llm_text:-raw} # text_frontend=False, as CosyVoice's README says for its published results
