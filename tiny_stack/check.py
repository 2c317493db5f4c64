"""Measure the tiny stack on held-out sentences: a table, and as the last line one JSON object.

``*_per`` are toneless pinyin error rates of test sentences by the evaluation recogniser: of the teacher's
recordings, of their resynthesis from speech tokens, of what the language model says greedily and sampled
(temperature 1.0, top_p 1.0, top_k -1). Times are of one thread, batch 32, and a second of audio.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch

from tiny_stack.stack import MAX_NEW_TOKENS, overall_error, speak
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.generation import Sampling, generate_speech_tokens, load_lm
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.text.errors import pinyin_error_rate
from tts_grpo.text.jsonl import read_jsonl
from tts_grpo.text.prompts import render_prompt
from tts_grpo.text.tokens import TOKEN_HZ

SEED = 0
BATCH = 32  # of the timed decoding and recognition
UNITS = {"size_mb": "MB", "codes_used": "of 6561", "token2wav_ms_per_s": "ms", "asr_ms_per_s": "ms"}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets-dir", type=Path, default=Path("assets/tiny"), help="the stack's folder")
    return parser.parse_args(argv)


def cpu_ms(function) -> float:
    """CPU milliseconds of a call on one thread, the better of two after one to warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(3):
        begun = time.process_time()
        function()
        times.append(time.process_time() - begun)
    torch.set_num_threads(threads)
    return 1000 * min(times[1:])


def measure(assets: Path) -> dict[str, float]:
    """All figures, by name."""
    token2wav = load_token2wav(assets / "token2wav")
    judge, reward_asr = SenseVoice(assets / "asr_eval"), SenseVoice(assets / "asr_reward")
    recorded = {path.stem: load_audio(path) for path in sorted((assets / "recordings").glob("*.ogg"))}
    rows = [row for row in read_jsonl(assets / "data" / "test.jsonl") if row["id"] in recorded]
    texts, recordings = [row["text"] for row in rows], [recorded[row["id"]] for row in rows]
    tokens = token2wav.encode(recordings)
    resynthesised = decode(token2wav, tokens)
    lm = load_lm(assets / "llm", "cpu")
    greedy = speak(lm, token2wav, judge, texts, 0.0, SEED)
    sampled = speak(lm, token2wav, judge, texts, 1.0, SEED)
    per = lambda transcripts: pinyin_error_rate(texts, transcripts, tones=False)  # noqa: E731
    counts = json.loads((assets / "token2wav" / "corpus_token_counts.json").read_text())
    return {
        "size_mb": sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) / 1e6,
        "teacher_per": per(judge.transcribe(recordings)),
        "resynthesis_per": per(judge.transcribe(resynthesised)),
        "lm_greedy_per": overall_error(greedy),
        "lm_sampled_per": overall_error(sampled),
        "reward_asr_teacher_per": per(reward_asr.transcribe(recordings)),
        "codes_used": int(np.count_nonzero(counts)),
        **speeds(token2wav, judge, tokens[:BATCH], resynthesised[:BATCH]),
        "lm_tokens_per_s": lm_speed(lm, texts),
        "duration_ratio": sum(len(s.speech_tokens) for s in sampled) / sum(map(len, tokens)),
        "eos_share": float(np.mean([s.finish_reason == "eos" for s in sampled])),
    }


def speeds(token2wav, asr: SenseVoice, tokens, recordings) -> dict[str, float]:
    """CPU milliseconds a second of audio."""
    return {
        "token2wav_ms_per_s": cpu_ms(lambda: token2wav(tokens)) / (sum(map(len, tokens)) / TOKEN_HZ),
        "asr_ms_per_s": cpu_ms(lambda: asr.transcribe(recordings)) / (sum(map(len, recordings)) / ASR_HZ),
    }


def lm_speed(lm, texts: list[str]) -> float:
    """Sampled tokens a second in one batch of 60, all threads."""
    model, tokenizer = lm
    prompts = [render_prompt(tokenizer, text) for text in texts[:60]]
    begun = time.perf_counter()
    said = generate_speech_tokens(model, tokenizer, prompts, range(60), Sampling(max_new_tokens=MAX_NEW_TOKENS))
    return sum(len(utterance.speech_tokens) for utterance in said) / (time.perf_counter() - begun)


def main(argv=None):
    logging.disable(logging.INFO)  # funasr's
    figures = measure(get_args(argv).assets_dir)
    for name, value in figures.items():
        shown = f"{100 * value:8.2f} %" if name.endswith(("_per", "_share")) else f"{value:8.2f} {UNITS.get(name, '')}"
        print(f"{name:24}{shown}")
    print(json.dumps({name: round(value, 5) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
