"""Measure the tiny stack on held-out sentences. Prints a table and, as the last line, one JSON object.

``*_per`` are toneless pinyin error rates on test sentences, measured with the evaluation recogniser: of the teacher's
recordings, of their resynthesis from speech tokens, and of the language model's speech with greedy decoding and with
sampling (temperature 1.0, top_p 1.0, top_k -1). ``*_ms_per_s`` are CPU milliseconds per second of audio on one thread
with batches of 32.

``--test-set hard`` with a folder of recordings of its sentences, made by tiny_stack.corpus, measures the hard set.
``--noise-db -90 -70`` instead measures what both recognisers make of the recordings alone, and with white noise of
these levels relative to full scale.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch

from tiny_stack.pipeline import MAX_NEW_TOKENS, corpus_error_rate, synthesise_and_transcribe
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.generation import Sampling, generate_speech_tokens, load_lm
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.text.errors import pinyin_error_rate
from tts_grpo.text.jsonl import read_jsonl
from tts_grpo.text.prompts import render_prompt
from tts_grpo.text.rules import TextRules, model_text
from tts_grpo.text.tokens import TOKEN_HZ

SEED = 0
BATCH = 32  # batch size for the timing of token2wav and of the recogniser
UNITS = {"size_mb": "MB", "codes_used": "of 6561", "token2wav_ms_per_s": "ms", "asr_ms_per_s": "ms"}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets-dir", type=Path, default=Path("assets/tiny"), help="folder of the tiny stack")
    parser.add_argument("--test-set", default="test", help="name of the set in the folder's data")
    parser.add_argument("--audio-dir", type=Path, help="recordings of some of its sentences (default: recordings)")
    parser.add_argument("--noise-db", type=float, nargs="*", default=[], help="only measure the recordings with noise")
    return parser.parse_args(argv)


def recorded(assets: Path, test_set: str, audio_dir: Path | None) -> tuple[list[str], list[np.ndarray]]:
    """Texts and recordings of the sentences of a set that have recordings."""
    audio = {path.stem: load_audio(path) for path in sorted((audio_dir or assets / "recordings").glob("*.*"))}
    rows = [row for row in read_jsonl(assets / "data" / f"{test_set}.jsonl") if row["id"] in audio]
    return [row["text"] for row in rows], [audio[row["id"]] for row in rows]


def noise_effect(assets: Path, test_set: str, audio_dir: Path | None, levels_db: list[float]) -> dict[str, float]:
    """Toneless pinyin error rates of both recognisers on the recordings, without and with white noise."""
    texts, recordings = recorded(assets, test_set, audio_dir)
    rng, metrics = np.random.default_rng(SEED), {}
    noise = [rng.standard_normal(len(one)).astype(np.float32) for one in recordings]
    for name in ("asr_eval", "asr_reward"):
        asr = SenseVoice(assets / name)
        for level in (None, *levels_db):
            gain = 0.0 if level is None else 10 ** (level / 20)
            heard = asr.transcribe([one + gain * added for one, added in zip(recordings, noise, strict=True)])
            key = f"{name}_{'clean' if level is None else f'{level:g}_db'}_per"
            metrics[key] = pinyin_error_rate(texts, heard, tones=False)
    return metrics


def cpu_ms(function) -> float:
    """CPU milliseconds per call on one thread: the faster of two calls after a warm-up call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(3):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return 1000 * min(times[1:])


def measure(assets: Path, test_set: str = "test", audio_dir: Path | None = None) -> dict[str, float]:
    """All metrics, by name, on the sentences of a set that have recordings."""
    token2wav = load_token2wav(assets / "token2wav")
    eval_asr, reward_asr = SenseVoice(assets / "asr_eval"), SenseVoice(assets / "asr_reward")
    texts, recordings = recorded(assets, test_set, audio_dir)
    tokens = token2wav.encode(recordings)
    resynthesised = decode(token2wav, tokens)
    lm = load_lm(assets / "llm", "cpu")
    in_words = [model_text(text, TextRules(llm_text="spoken")) for text in texts]
    greedy = synthesise_and_transcribe(lm, token2wav, eval_asr, in_words, 0.0, SEED)
    sampled = synthesise_and_transcribe(lm, token2wav, eval_asr, in_words, 1.0, SEED)
    per = lambda transcripts: pinyin_error_rate(texts, transcripts, tones=False)  # noqa: E731
    counts = json.loads((assets / "token2wav" / "corpus_token_counts.json").read_text())
    return {
        "size_mb": sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) / 1e6,
        "teacher_per": per(eval_asr.transcribe(recordings)),
        "resynthesis_per": per(eval_asr.transcribe(resynthesised)),
        "lm_greedy_per": corpus_error_rate(greedy),
        "lm_sampled_per": corpus_error_rate(sampled),
        "reward_asr_teacher_per": per(reward_asr.transcribe(recordings)),
        "codes_used": int(np.count_nonzero(counts)),
        **speeds(token2wav, eval_asr, tokens[:BATCH], resynthesised[:BATCH]),
        "lm_tokens_per_s": lm_speed(lm, texts),
        "duration_ratio": sum(len(s.speech_tokens) for s in sampled) / sum(map(len, tokens)),
        "eos_share": float(np.mean([s.finish_reason == "eos" for s in sampled])),
    }


def speeds(token2wav, asr: SenseVoice, tokens, recordings) -> dict[str, float]:
    """CPU milliseconds per second of audio."""
    return {
        "token2wav_ms_per_s": cpu_ms(lambda: token2wav(tokens)) / (sum(map(len, tokens)) / TOKEN_HZ),
        "asr_ms_per_s": cpu_ms(lambda: asr.transcribe(recordings)) / (sum(map(len, recordings)) / ASR_HZ),
    }


def lm_speed(lm, texts: list[str]) -> float:
    """Sampled tokens per second in one batch of 60, on all threads."""
    model, tokenizer = lm
    prompts = [render_prompt(tokenizer, text) for text in texts[:60]]
    start = time.perf_counter()
    utterances = generate_speech_tokens(model, tokenizer, prompts, range(60), Sampling(max_new_tokens=MAX_NEW_TOKENS))
    return sum(len(utterance.speech_tokens) for utterance in utterances) / (time.perf_counter() - start)


def main(argv=None):
    logging.disable(logging.INFO)  # funasr logs at this level
    args = get_args(argv)
    of_set = args.assets_dir, args.test_set, args.audio_dir
    metrics = noise_effect(*of_set, args.noise_db) if args.noise_db else measure(*of_set)
    for name, value in metrics.items():
        text = f"{100 * value:8.2f} %" if name.endswith(("_per", "_share")) else f"{value:8.2f} {UNITS.get(name, '')}"
        print(f"{name:24}{text}")
    print(json.dumps({name: round(value, 5) for name, value in metrics.items()}))


if __name__ == "__main__":
    main()
