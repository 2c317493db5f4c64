"""Measure the reward: rollouts a second behind the server and in this process, against one at a time.

    python scripts/bench_reward.py                                     # tiny stack, CPU: a running server, one thread
    python scripts/bench_reward.py --random DIR --device cuda:0 --precision fp16 --baseline 12 ...

Rollouts are as long as --seconds says and come in random order. Measured are, in this order and each only if asked for:

* server: the server at --server-url, all requests in flight at once;
* in process: the scorer of the server, batch by batch, with the seconds of each part;
* official: CosyVoice's own ``flow.inference`` and ``hift.inference`` and funasr's ``generate``, one rollout after the
  other, the prompt's features computed anew for each, as the original recipe's server does (--baseline rollouts);
* what batching in fp32 and the --compare-precisions change in mel, waveform and transcript;
* graph: the same networks one rollout after the other, with a CUDA graph for each length: a stand-in for TensorRT.

--random DIR makes CosyVoice2 and SenseVoiceSmall folders of the full shape (or of a small one, --small) with random
weights in DIR, which is enough to measure speed and exactness. Prints one JSON object, and a table last; each part as
soon as it is measured on stderr.
"""

import argparse
import asyncio
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tts_grpo.reward.client import RewardClient
from tts_grpo.reward.scorer import RewardScorer
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, resample_batch
from tts_grpo.speech.cosyvoice2 import random_weights
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.errors import count_errors
from tts_grpo.text.input_files import read_known_answers
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, TOKEN_HZ
from tts_grpo.text.units import pinyin


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-url", default="http://127.0.0.1:8000", help="a running server; empty: none")
    parser.add_argument("--jsonl", type=Path, default=Path("assets/tiny/data/test.jsonl"), help="text, speech_tokens")
    parser.add_argument("--token2wav-dir", type=Path, default=Path("assets/tiny/token2wav"), help="as the server's")
    parser.add_argument("--asr-dir", type=Path, default=Path("assets/tiny/asr_reward"), help="as the server's")
    parser.add_argument("--prompt-audio", type=Path, default=None, help="as the server's")
    parser.add_argument("--random", type=Path, default=None, help="folder for networks with random weights")
    parser.add_argument("--small", action="store_true", help="make them small, to try this program")
    parser.add_argument("--make-only", action="store_true", help="make them and end")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--precision", default="fp32", help="of token2wav")
    parser.add_argument("--seconds", type=float, nargs=3, default=(2, 2, 2), help="shortest, mean and longest rollout")
    parser.add_argument("--num-rollouts", type=int, default=512, help="how many are scored")
    parser.add_argument("--batch-size", type=int, nargs="*", default=[16], help="of the in-process runs")
    parser.add_argument("--baseline", type=int, default=0, help="rollouts that are scored one at a time")
    parser.add_argument("--compare-precisions", nargs="*", default=[], help="tell what these change; with --baseline")
    parser.add_argument("--cores", type=int, default=2, help="cores that the server runs on, where it has no GPU")
    return parser.parse_args(argv)


def make_random(args) -> None:
    """Networks with random weights and a prompt, in the folder that --random names, unless they are there."""
    args.token2wav_dir, args.asr_dir = args.random / "cosyvoice2", args.random / "sensevoice"
    args.prompt_audio = args.random / "prompt.wav"
    if args.prompt_audio.exists():
        return
    small = args.small
    shapes = (random_weights.SMALL, random_weights.SENSEVOICE_SMALL) if small else (
        random_weights.FULL, random_weights.SENSEVOICE_FULL)  # fmt: skip
    random_weights.make_cosyvoice2_folder(args.token2wav_dir, shapes[0])
    random_weights.make_sensevoice_folder(args.asr_dir, shapes[1])
    random_weights.save_prompt(args.prompt_audio)


def rollouts(args) -> list[tuple[list[int], str]]:
    """Speech tokens and texts, in random order; short recordings are said again and again."""
    rng = np.random.default_rng(0)
    rows = read_known_answers(args.jsonl)
    least, mean, most = args.seconds
    lens = [least] * args.num_rollouts
    if most > least:  # a beta distribution between the two, of that mean, with a long tail
        a = 1.5
        b = a * (most - mean) / (mean - least)
        lens = least + (most - least) * rng.beta(a, b, args.num_rollouts)
    chosen = []
    for i, seconds in enumerate(lens):
        row, size = rows[i % len(rows)], round(seconds * TOKEN_HZ)
        tokens = (row["speech_tokens"] * size)[:size]
        if args.random:
            tokens = rng.integers(0, NUM_SPEECH_TOKENS, size).tolist()
        chosen.append((tokens, row["text"]))
    return chosen


def served_seconds(url: str, pairs) -> float:
    """Wall-clock time of all rollouts through the server."""

    async def go() -> float:
        client = RewardClient([url], max_in_flight=len(pairs), max_tries=1)
        await asyncio.gather(*(client.score(*pair) for pair in pairs[:128]))  # connections and caches
        start = time.perf_counter()
        await asyncio.gather(*(client.score(*pair) for pair in pairs))
        seconds = time.perf_counter() - start
        await client.close()
        return seconds

    return asyncio.run(go())


def make_scorer(args, precision: str) -> RewardScorer:
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"  # as the server does
    token2wav = load_token2wav(args.token2wav_dir, args.device, precision)
    voices = [load_prompt_voice(token2wav, args.prompt_audio, "你好")] if args.prompt_audio else []
    return RewardScorer(token2wav, SenseVoice(args.asr_dir, args.device), args.random is not None, "tanh", voices)


def scored(scorer: RewardScorer, pairs, batch_size: int) -> list:
    """Scores of all rollouts, batch by batch."""
    scores = []
    for first in range(0, len(pairs), batch_size):
        scores += scorer.score(*zip(*pairs[first : first + batch_size], strict=True))
    for score in scores:
        if score.error:
            raise SystemExit(f"bench_reward.py: {score.error}")
    return scores


def in_process(args, scorer: RewardScorer, pairs, batch_size: int) -> dict:
    """Rollouts a second of one process, and the seconds of each part."""
    scored(scorer, pairs[:batch_size], batch_size)
    scorer.seconds = dict.fromkeys(scorer.seconds, 0.0)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    scored(scorer, pairs, batch_size)
    wall_s = time.perf_counter() - start
    result = {"rollouts_per_s": len(pairs) / wall_s, "wall_s": wall_s, "seconds": dict(scorer.seconds)}
    if args.device != "cpu":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


class OneByOne:
    """CosyVoice's and funasr's own inference, a rollout at a time."""

    def __init__(self, args):
        from tts_grpo.speech.cosyvoice2.token2wav import CosyVoice2Token2Wav, load_modules

        self.device, self.asr = args.device, SenseVoice(args.asr_dir, args.device)
        self.frontend = CosyVoice2Token2Wav(args.token2wav_dir)  # for the prompt's features alone
        modules = load_modules(args.token2wav_dir)
        flow = torch.load(args.token2wav_dir / "flow.pt", weights_only=True)
        hift = torch.load(args.token2wav_dir / "hift.pt", weights_only=True)
        modules["flow"].load_state_dict(flow)
        modules["hift"].load_state_dict({key.removeprefix("generator."): value for key, value in hift.items()})
        self.flow, self.hift = (modules[name].eval().to(self.device) for name in ("flow", "hift"))

    @torch.inference_mode()
    def decode(self, tokens: list[int], speech: np.ndarray) -> torch.Tensor:
        """(1, T) waveform at 24 kHz in the voice of ``speech``, as CosyVoice's frontend and model do it."""
        features = self.frontend.compute_prompt_features(speech)
        prompt = {name: value[None].to(self.device) for name, value in features.items()}
        row = torch.tensor([tokens], device=self.device)
        length = lambda value: torch.tensor([value.shape[1]], device=self.device)  # noqa: E731
        mel, _ = self.flow.inference(
            row, length(row), prompt["tokens"], length(prompt["tokens"]), prompt["mel"], length(prompt["mel"]),
            prompt["speaker_embedding"], streaming=False, finalize=True,
        )  # fmt: skip
        return self.hift.inference(speech_feat=mel)[0]

    def measure(self, pairs, speech: np.ndarray) -> dict:
        """Seconds of token2wav and of the recogniser, after one rollout to warm up."""
        seconds = {"token2wav": 0.0, "asr": 0.0}
        for number, (tokens, _) in enumerate([pairs[0], *pairs]):
            start = time.perf_counter()
            waveform = resample_batch(self.decode(tokens, speech), 24_000, ASR_HZ)[0].cpu().numpy()
            decoded = time.perf_counter()
            self.asr._model.generate(input=[waveform], language="zh", use_itn=False, cache={})
            if number:
                seconds["token2wav"] += decoded - start
                seconds["asr"] += time.perf_counter() - decoded
        return {"rollouts_per_s": len(pairs) / sum(seconds.values()), "seconds": seconds,
                "token2wav_rollouts_per_s": len(pairs) / seconds["token2wav"]}  # fmt: skip


def graph_one_by_one(scorer: RewardScorer, pairs) -> dict:
    """Seconds a rollout with the solver's ten steps as one CUDA graph for each length, batch 1, TF32.

    Only replays are timed: an engine has its shapes beforehand. ``scorer`` is of no use afterwards.
    """
    import cosyvoice.flow.decoder as decoder

    original = decoder.add_optional_chunk_mask
    decoder.add_optional_chunk_mask = lambda x, mask, *_: mask  # the same mask, without waiting for the GPU to check it
    token2wav, flow = scorer.token2wav, scorer.token2wav.flow
    plain, graphs = flow.solve, {}

    def solve(*inputs):
        if inputs[0].shape not in graphs:
            fixed = [value.clone() for value in inputs]
            plain(*fixed)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = plain(*fixed)
            graphs[inputs[0].shape] = graph, fixed, result
        graph, fixed, result = graphs[inputs[0].shape]
        for place, value in zip(fixed, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return result

    flow.solve, token2wav.fast = solve, True
    torch.backends.cuda.matmul.allow_tf32 = True
    for tokens, _ in pairs:
        token2wav([tokens], scorer.prompt_voices)
    scorer.seconds = dict.fromkeys(scorer.seconds, 0.0)
    start = time.perf_counter()
    for pair in pairs:
        scored(scorer, [pair], 1)
    wall_s = time.perf_counter() - start
    decoder.add_optional_chunk_mask = original
    return {"rollouts_per_s": len(pairs) / wall_s, "seconds": dict(scorer.seconds),
            "token2wav_rollouts_per_s": len(pairs) / scorer.seconds["token2wav"]}  # fmt: skip


@torch.inference_mode()
def exactness(strict: RewardScorer, official: OneByOne, pairs, voice: PromptVoice) -> dict:
    """What batching changes, in fp32: the largest difference of a batch's waveforms to the official code's."""
    batch, lens = strict.token2wav([tokens for tokens, _ in pairs], [voice] * len(pairs))
    worst = 0.0
    for waveform, length, (tokens, _) in zip(batch, lens.tolist(), pairs, strict=True):
        with strict.token2wav.vocoder.fixed_noise(0, length):
            alone = official.decode(tokens, voice.prompt_speech_16k)[0]
        worst = max(worst, (waveform[:length] - alone).abs().max().item())
    return {"fp32_batch_max_difference": worst, "waveform_peak": batch.abs().max().item()}


@torch.inference_mode()
def precision_effect(strict: RewardScorer, fast: RewardScorer, pairs, voice: PromptVoice) -> dict:
    """What a faster precision changes against fp32: relative errors, and the pinyin of the transcripts."""
    tokens, voices = [tokens for tokens, _ in pairs], [voice] * len(pairs)
    exact, quick = (scorer.token2wav(tokens, voices)[0] for scorer in (strict, fast))
    prompts = [strict.token2wav.prompt_features(voice)] * len(pairs)
    mels = [scorer.token2wav.flow(tokens, prompts) for scorer in (strict, fast)]
    used = torch.arange(mels[0].shape[2]) < 2 * torch.tensor(list(map(len, tokens)))[:, None]
    mels = [mel.transpose(1, 2)[used.to(mel.device)] for mel in mels]
    relative = lambda a, b: ((a - b).norm() / a.norm()).item()  # noqa: E731
    heard = []
    for scorer in (strict, fast):
        torch.manual_seed(0)  # the recogniser's features have noise of one bit: the same for both
        heard.append([pinyin(one.text, True) for one in scorer.hear(tokens, voices)])
    return {
        "mel_relative_error": relative(*mels), "waveform_relative_error": relative(exact, quick),
        "transcript_difference": float(np.mean([count_errors(a, b).rate for a, b in zip(*heard, strict=True)])),
        "distinct_syllables": len({syllable for syllables in heard[0] for syllable in syllables}),
    }  # fmt: skip


def measure_baselines(args, pairs, measured) -> None:
    """The one-by-one paths and what they tell about exactness."""
    few = pairs[: args.baseline]
    official, strict = OneByOne(args), make_scorer(args, "fp32")
    voice = strict.prompt_voices[0]
    measured("official", official.measure(few, voice.prompt_speech_16k))
    torch.backends.cudnn.allow_tf32 = False
    measured("exactness", exactness(strict, official, few, voice))
    torch.backends.cudnn.allow_tf32 = True
    for precision in args.compare_precisions:
        measured(precision, precision_effect(strict, make_scorer(args, precision), few, voice))
    if args.device != "cpu":
        measured("graph", graph_one_by_one(strict, few))


def table(result: dict, audio_s: float) -> str:
    """Rollouts and audio-seconds a second of each way, and the ratio to the official one."""
    rows = [("official", result.get("official")), ("graph", result.get("graph"))]
    rows += [(f"in process, batch {size}", value) for size, value in result.get("in_process", {}).items()]
    rows += [("server", result.get("server"))]
    lines = [f"{'':24}{'rollouts/s':>12}{'audio-s/s':>12}{'x official':>12}{'x graph':>12}"]
    for name, value in rows:
        if value:
            rate = value["rollouts_per_s"]
            bases = [result[base]["rollouts_per_s"] if result.get(base) else None for base in ("official", "graph")]
            ratios = [f"{rate / base:.1f}" if base else "-" for base in bases]
            lines.append(f"{name:24}{rate:12.2f}{rate * audio_s:12.1f}{ratios[0]:>12}{ratios[1]:>12}")
    return "\n".join(lines)


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # funasr's
    if args.random:
        make_random(args)
    if args.make_only:
        return
    if args.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(args.device)  # kernels and graphs run on the current one
    pairs = rollouts(args)
    audio_s = sum(len(tokens) for tokens, _ in pairs) / TOKEN_HZ / len(pairs)
    result = {"num_rollouts": len(pairs), "mean_audio_s": audio_s}

    def measured(name: str, value) -> None:
        result[name] = value
        print(json.dumps({name: value}), file=sys.stderr, flush=True)  # at once: what follows may fail

    if args.server_url:
        measured("server", {"rollouts_per_s": len(pairs) / served_seconds(args.server_url, pairs)})
    if args.batch_size:
        start = time.perf_counter()
        scorer = make_scorer(args, args.precision)
        scorer.token2wav.warm_up()
        scored(scorer, pairs[:16], 16)
        measured("load_and_warm_up_s", time.perf_counter() - start)
        measured("in_process", {size: in_process(args, scorer, pairs, size) for size in args.batch_size})
    if args.server_url and args.device == "cpu" and args.batch_size:
        core_s = args.cores * len(pairs) / result["server"]["rollouts_per_s"]
        shares = {name: s / core_s for name, s in result["in_process"][args.batch_size[0]]["seconds"].items()}
        result["server"]["shares"] = shares | {"transport_and_waiting": 1 - sum(shares.values())}
    if args.baseline:
        measure_baselines(args, pairs, measured)
    print(json.dumps(result))
    print(table(result, audio_s))


if __name__ == "__main__":
    main()
