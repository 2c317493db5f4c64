"""Measure which differences between GRPO's rollouts and CosyVoice's own inference change the error rate.

    python tools/export_gap.py [--assets-dir assets/tiny] [--num-texts 150] [--seeds 0 1 2]

The baseline synthesises sentences with the sampling of the rollouts (temperature 1, all tokens). Each variant changes
one thing: the sampling (CosyVoice's repetition aware sampling with its length limits, top_p and top_k, or a lower
temperature) or the data type of the weights (veRL's merger writes bfloat16, CosyVoice uses float32 or float16). A row
of the table has the toneless pinyin error rate by the evaluation recogniser, its difference to the baseline with a 95%
interval (paired bootstrap over sentences), and the EOS rate.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

from tts_grpo.evaluation import bootstrap
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.generation import OFFICIAL, Sampling, generate_speech_tokens, load_lm
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.text.errors import pinyin_errors
from tts_grpo.text.jsonl import read_jsonl
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
    parser.add_argument("--llm", type=Path, default=None, help="language model to use instead, such as a trained one")
    parser.add_argument("--num-texts", type=int, default=150, help="number of test sentences")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="synthesise each sentence once per seed"
    )
    return parser.parse_args(argv)


class ErrorMeter:
    """Synthesises and transcribes test sentences, and counts errors."""

    def __init__(self, args):
        self.llm, self.args = args.llm or args.assets_dir / "llm", args
        self.token2wav = load_token2wav(args.assets_dir / "token2wav")
        self.asr = SenseVoice(args.assets_dir / "asr_eval")
        rows = read_jsonl(args.assets_dir / "data" / "test.jsonl")
        self.texts = [row["text"] for row in rows[:: max(1, len(rows) // args.num_texts)]][: args.num_texts]

    def errors(self, model, tokenizer, sampling: Sampling) -> tuple[np.ndarray, float]:
        """Errors and syllables of each sentence (N, 2), summed over the seeds, and the EOS rate."""
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


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # funasr logs at this level
    meter, baseline = ErrorMeter(args), None
    print(f"{len(meter.texts)} sentences, {len(args.seeds)} seeds, {meter.llm}")
    print("| variant | error rate | difference to the rollouts | EOS rate |\n| --- | --- | --- | --- |")
    for name, model, tokenizer, sampling in variants(meter.llm):
        counts, ended = meter.errors(model, tokenizer, sampling)
        baseline = counts if baseline is None else baseline
        change = bootstrap.compare(baseline, counts)
        against = "{:+.1%} ({:+.1%} to {:+.1%})".format(change["difference"], *change["ci"])
        shown = "" if counts is baseline else against
        print(f"| {name} | {bootstrap.ratio(counts):.1%} | {shown} | {ended:.0%} |", flush=True)


if __name__ == "__main__":
    main()
