"""Measure GRPO's headroom on the tiny stack: mean error rate of several samples per prompt, and that of the best one.

Prints one JSON object: ``mean_per`` and ``best_per`` (toneless pinyin error rate by the reward recogniser, over all
samples and over the best sample of each prompt), and ``spread_share``, the fraction of prompts whose samples differ in
error rate: only these give GRPO a gradient.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np

from tiny_stack.pipeline import corpus_error_rate, sample_groups
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.generation import load_lm
from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.text.jsonl import read_jsonl


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets-dir", type=Path, default=Path("assets/tiny"), help="folder of the tiny stack")
    parser.add_argument("--llm", type=Path, default=None, help="language model to use instead, such as a trained one")
    parser.add_argument("--split", default="train", help="read sentences from data/SPLIT.jsonl")
    parser.add_argument("--num-prompts", type=int, default=100, help="number of sentences, drawn at random")
    parser.add_argument("--num-samples", type=int, default=8, help="samples per prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    parser.add_argument("--seed", type=int, default=0, help="random seed for drawing sentences and for sampling")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # funasr logs at this level
    token2wav, asr = load_token2wav(args.assets_dir / "token2wav"), SenseVoice(args.assets_dir / "asr_reward")
    texts = [row["text"] for row in read_jsonl(args.assets_dir / "data" / f"{args.split}.jsonl")]
    texts = np.random.default_rng(args.seed).permutation(texts)[: args.num_prompts].tolist()
    lm = load_lm(args.llm or args.assets_dir / "llm", "cpu")
    first_seed = args.seed * len(texts) * args.num_samples
    groups = sample_groups(lm, token2wav, asr, texts, args.num_samples, args.temperature, first_seed)
    best = [min(group, key=lambda s: s.error_rate) for group in groups]
    spread = [len({s.error_rate for s in group}) > 1 for group in groups]
    metrics = {
        "mean_per": corpus_error_rate([s for group in groups for s in group]), "best_per": corpus_error_rate(best),
        "spread_share": float(np.mean(spread)),
        "num_prompts": len(texts), "num_samples": args.num_samples, "temperature": args.temperature,
        "split": args.split,
    }  # fmt: skip
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
