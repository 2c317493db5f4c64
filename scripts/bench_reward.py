"""Measure the reward server: rollouts a second, and where the time goes.

Two-second rollouts (50 tokens of real speech, cut from --jsonl) are scored by a running server, all requests in
flight at once, and by the same code in this process on one thread. The parts' shares are those of the in-process
run, scaled to the core-seconds that the server had (--cores); what is left is transport, batching and waiting.
Prints one JSON object.
"""

import argparse
import asyncio
import json
import logging
import time
from pathlib import Path

import torch

from tts_grpo.asr import SenseVoice
from tts_grpo.jsonl import read_jsonl
from tts_grpo.reward_client import RewardClient
from tts_grpo.scorer import RewardScorer
from tts_grpo.token2wav import load_token2wav
from tts_grpo.tokens import TOKEN_HZ

ROLLOUT_S = 2


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-url", default="http://127.0.0.1:8000", help="the running server")
    parser.add_argument("--jsonl", type=Path, default=Path("assets/tiny/data/test.jsonl"), help="text, speech_tokens")
    parser.add_argument("--token2wav-dir", type=Path, default=Path("assets/tiny/token2wav"), help="as the server's")
    parser.add_argument("--asr-dir", type=Path, default=Path("assets/tiny/asr_reward"), help="as the server's")
    parser.add_argument("--num-rollouts", type=int, default=512, help="how many are scored")
    parser.add_argument("--batch-size", type=int, default=16, help="of the in-process run; as the server's")
    parser.add_argument("--cores", type=int, default=2, help="cores that the server runs on")
    return parser.parse_args(argv)


def rollouts(path: Path, count: int) -> list[tuple[list[int], str]]:
    """``count`` rollouts of two seconds with their texts; short recordings are said again and again."""
    rows = read_jsonl(path)
    size = ROLLOUT_S * TOKEN_HZ
    chosen = (rows[i % len(rows)] for i in range(count))
    return [((row["speech_tokens"] * size)[:size], row["text"]) for row in chosen]


def served_seconds(url: str, pairs) -> float:
    """Wall-clock time of all rollouts through the server."""

    async def go() -> float:
        client = RewardClient([url], max_in_flight=len(pairs), max_tries=1)
        await asyncio.gather(*(client.score(*pair) for pair in pairs[:32]))  # connections and caches
        start = time.perf_counter()
        await asyncio.gather(*(client.score(*pair) for pair in pairs))
        seconds = time.perf_counter() - start
        await client.close()
        return seconds

    return asyncio.run(go())


def in_process_seconds(args, pairs) -> dict[str, float]:
    """Seconds in each part, on one thread."""
    torch.set_num_threads(1)
    scorer = RewardScorer(load_token2wav(args.token2wav_dir), SenseVoice(args.asr_dir, "cpu", args.batch_size), False)
    batches = [pairs[i : i + args.batch_size] for i in range(0, len(pairs), args.batch_size)]
    for number, batch in enumerate([batches[0], *batches]):
        if number == 1:  # the first one warms up
            scorer.seconds = dict.fromkeys(scorer.seconds, 0.0)
        for score in scorer.score(*zip(*batch, strict=True)):
            if score.error:
                raise SystemExit(f"bench_reward.py: {score.error}")
    return scorer.seconds


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # funasr's
    pairs = rollouts(args.jsonl, args.num_rollouts)
    wall_s = served_seconds(args.server_url, pairs)
    parts = in_process_seconds(args, pairs)
    core_s = wall_s * args.cores
    shares = {name: seconds / core_s for name, seconds in parts.items()}
    result = {
        "rollouts_per_s": args.num_rollouts / wall_s,
        "audio_s_per_s": args.num_rollouts * ROLLOUT_S / wall_s,
        "in_process_one_thread_rollouts_per_s": args.num_rollouts / sum(parts.values()),
        "shares": shares | {"transport_and_waiting": 1 - sum(shares.values())},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
