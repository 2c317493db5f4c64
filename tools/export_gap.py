"""Measure which differences between GRPO's rollouts and CosyVoice's own inference change the error rate.

    python tools/export_gap.py [--llms assets/tiny/llm exp/tiny/merged_hf_model] [--output docs/results/export_gap.json]

The baseline synthesises sentences with the sampling of the rollouts (temperature 1, all tokens). Each variant changes
one thing: the sampling (CosyVoice's repetition aware sampling with its length limits, top_p and top_k, or a lower
temperature) or the data type of the weights (veRL's merger writes bfloat16, CosyVoice uses float32 or float16). A row
of the table has the toneless pinyin error rate of each model by the evaluation recogniser, and its difference to the
baseline with a 95% interval (paired bootstrap over sentences).
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch

from tts_grpo.evaluation import bootstrap
from tts_grpo.evaluation.provenance import provenance
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.generation import OFFICIAL, Sampling, generate_speech_tokens, load_lm
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.text.errors import pinyin_errors
from tts_grpo.text.jsonl import read_jsonl, write_json
from tts_grpo.text.prompts import render_prompt

ROLLOUTS = Sampling(max_new_tokens=300)
SAMPLINGS = {
    "official: RAS, top_p 0.8, top_k 25, window 10, 2 to 20 tokens per text token": OFFICIAL,
    "top_p 0.8, top_k 25": Sampling(top_p=0.8, top_k=25),
    "top_p 0.95, temperature 0.8": Sampling(temperature=0.8, top_p=0.95),
    "temperature 0.6": Sampling(temperature=0.6),
    "greedy": Sampling(temperature=0),
}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--assets-dir", type=Path, default=Path("assets/tiny"), help="folder with all models and the test set"
    )
    parser.add_argument(
        "--llms", type=Path, nargs="+", default=[], help="language models, such as the SFT and a trained one"
    )
    parser.add_argument("--num-texts", type=int, default=150, help="number of test sentences")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="synthesise each sentence once per seed"
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args(argv)
    args.llms = args.llms or [args.assets_dir / "llm"]
    return args


class ErrorMeter:
    """Synthesises and transcribes test sentences, and counts errors."""

    def __init__(self, args):
        self.args = args
        self.token2wav = load_token2wav(args.assets_dir / "token2wav")
        self.asr = SenseVoice(args.assets_dir / "asr_eval")
        rows = read_jsonl(args.assets_dir / "data" / "test.jsonl")
        self.texts = [row["text"] for row in rows[:: max(1, len(rows) // args.num_texts)]][: args.num_texts]

    def errors(self, model, tokenizer, sampling: Sampling) -> tuple[np.ndarray, float]:
        """Return errors and syllables of each sentence (N, 2), summed over the seeds, and the EOS rate."""
        counts, ended = np.zeros((len(self.texts), 2)), []
        prompts = [render_prompt(tokenizer, text) for text in self.texts]
        for seed in self.args.seeds:
            seeds = [seed * len(prompts) + i for i in range(len(prompts))]
            utterances = generate_speech_tokens(model, tokenizer, prompts, seeds, sampling, texts=self.texts)
            waveforms = decode(self.token2wav, [utterance.speech_tokens for utterance in utterances])
            transcripts = self.asr.transcribe(waveforms)
            errors = [pinyin_errors(*pair, tones=False) for pair in zip(self.texts, transcripts, strict=True)]
            counts += [(c.errors, c.length) for c in errors]
            ended += [utterance.finish_reason == "eos" for utterance in utterances]
        return counts, float(np.mean(ended))


def variants(llm: Path):
    """Yield ``(name, model, tokenizer, sampling)`` of each row of the table; the first is the baseline."""
    model, tokenizer = load_lm(llm)
    yield "as in the rollouts: temperature 1", model, tokenizer, ROLLOUTS
    for name, sampling in SAMPLINGS.items():
        yield name, model, tokenizer, sampling
    half = load_lm(llm, dtype=torch.bfloat16)[0]
    yield "computed in bfloat16", half, tokenizer, ROLLOUTS
    yield "weights rounded to bfloat16", half.float(), tokenizer, ROLLOUTS


def measure(meter: ErrorMeter, llm: Path) -> list[dict]:
    """Return the figures of each variant of a model: rates in percent, differences in percentage points."""
    figures, baseline = [], None
    for name, model, tokenizer, sampling in variants(llm):
        counts, ended = meter.errors(model, tokenizer, sampling)
        figure = {
            "name": name,
            "error_rate": round(100 * bootstrap.ratio(counts), 1),
            "eos_rate": round(100 * ended, 1),
        }
        if baseline is None:
            baseline = counts
        else:
            change = bootstrap.compare(baseline, counts)
            figure["difference"] = round(100 * change["difference"], 1)
            figure["ci95"] = [round(100 * bound, 1) for bound in change["ci"]]
        figures.append(figure)
    return figures


def cell(figure: dict) -> str:
    """Format a rate as "4.4%; -1.0 (-2.1 to +0.1)"."""
    rate = f"{figure['error_rate']:.1f}%"
    if "difference" not in figure:
        return rate
    return f"{rate}; {figure['difference']:+.1f} ({figure['ci95'][0]:+.1f} to {figure['ci95'][1]:+.1f})"


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # funasr logs at this level
    meter = ErrorMeter(args)
    found = {str(llm): measure(meter, llm) for llm in args.llms}
    print(f"| | {' | '.join(found)} |\n|{' --- |' * (len(found) + 1)}")
    for figures in zip(*found.values(), strict=True):
        print(f"| {figures[0]['name']} | {' | '.join(map(cell, figures))} |")
    if args.output:
        recorded = provenance("What changes the error from rollouts to CosyVoice's inference", sys.argv)
        recorded["conditions"] = (
            f"tiny stack, {len(meter.texts)} sentences, {len(args.seeds)} seeds; toneless pinyin error rate by the "
            "evaluation ASR model in percent; differences to the first row in percentage points, with 95% intervals by "
            "paired bootstrap over sentences"
        )
        write_json(args.output, recorded | {"figures": found})


if __name__ == "__main__":
    main()
