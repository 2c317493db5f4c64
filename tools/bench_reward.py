"""Benchmark the reward: rollouts per second of the server, of batches in one process, and of the official code.

    python tools/bench_reward.py                                     # tiny stack, CPU: a running server, one thread
    python tools/bench_reward.py --random DIR --device cuda:0 --precision fp16 --baseline 12

Rollouts have the lengths given by --seconds and a random order. These measurements run in this order; the options
select which of them:

* server: the server at --server-url, with all requests in flight at once;
* in process: the server's scorer on batches, with the seconds of each step;
* official: CosyVoice's own ``flow.inference`` and ``hift.inference`` and funasr's ``generate``, one rollout at a time,
  computing the prompt features for each rollout, as the original recipe's server does (--baseline rollouts);
* differences in mel, waveform and transcript due to batching in fp32 and due to --compare-precisions;
* graph: the same networks, one rollout at a time, with a CUDA graph for each length, as an approximation of TensorRT.

With --rewards, the scorer has these parts of the reward, and --record writes what each costs per rollout to
docs/results/reward_parts.json and the table of docs/rewards.md.

--random DIR makes CosyVoice2 and SenseVoiceSmall folders of the full size (or of a small one, --small) with random
weights in DIR, which are sufficient to measure speed and exactness. Prints one JSON object and a table to stdout, and
each measurement to stderr as soon as it is done.
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

from tts_grpo.evaluation.provenance import ROOT, provenance, replace_tables
from tts_grpo.reward.client import RewardClient
from tts_grpo.reward.parts.interface import Context, load_parts
from tts_grpo.reward.rewards import DEFAULT, parse_rewards
from tts_grpo.reward.scorer import RewardScorer
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, resample_batch
from tts_grpo.speech.cosyvoice2 import random_weights
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.errors import align_texts
from tts_grpo.text.input_files import read_known_answers
from tts_grpo.text.jsonl import write_json
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, TOKEN_HZ
from tts_grpo.text.units import pinyin


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server-url", default="http://127.0.0.1:8000", help="URL of a running server; empty: do not measure it"
    )
    parser.add_argument(
        "--jsonl", type=Path, default=Path("assets/tiny/data/test.jsonl"), help="JSONL with text and speech_tokens"
    )
    parser.add_argument(
        "--token2wav-dir", type=Path, default=Path("assets/tiny/token2wav"), help="as in token2wav_asr_server.py"
    )
    parser.add_argument(
        "--asr-dir", type=Path, default=Path("assets/tiny/asr_reward"), help="as in token2wav_asr_server.py"
    )
    parser.add_argument("--prompt-audio", type=Path, default=None, help="as in token2wav_asr_server.py")
    parser.add_argument("--random", type=Path, default=None, help="folder for models with random weights")
    parser.add_argument("--small", action="store_true", help="make small models, to test this program")
    parser.add_argument("--make-only", action="store_true", help="make the models of --random and exit")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--precision", default="fp32", help="precision of token2wav")
    parser.add_argument("--seconds", type=float, nargs=3, default=(2, 2, 2), help="minimum, mean and maximum length")
    parser.add_argument("--num-rollouts", type=int, default=512, help="number of rollouts to score")
    parser.add_argument("--batch-size", type=int, nargs="*", default=[16], help="batch sizes to measure in process")
    parser.add_argument("--baseline", type=int, default=0, help="rollouts to score one at a time")
    parser.add_argument("--compare-precisions", nargs="*", default=[], help="compare these with fp32; needs --baseline")
    parser.add_argument("--rewards", default=DEFAULT, help="parts of the reward, as in token2wav_asr_server.py")
    parser.add_argument("--record", action="store_true", help="write the costs of the parts into docs")
    parser.add_argument("--cores", type=int, default=2, help="number of cores of a server without a GPU")
    return parser.parse_args(argv)


def make_random(args) -> None:
    """Make models with random weights and a prompt recording in the folder of --random, unless they exist."""
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
    """Speech tokens and texts in random order; tokens of short recordings are repeated."""
    rng = np.random.default_rng(0)
    rows = read_known_answers(args.jsonl)
    minimum, mean, maximum = args.seconds
    lens = [minimum] * args.num_rollouts
    if maximum > minimum:  # a beta distribution with this range and mean, and a long tail
        a = 1.5
        b = a * (maximum - mean) / (mean - minimum)
        lens = minimum + (maximum - minimum) * rng.beta(a, b, args.num_rollouts)
    pairs = []
    for i, seconds in enumerate(lens):
        row, size = rows[i % len(rows)], round(seconds * TOKEN_HZ)
        tokens = (row["speech_tokens"] * size)[:size]
        if args.random:
            tokens = rng.integers(0, NUM_SPEECH_TOKENS, size).tolist()
        pairs.append((tokens, row["text"]))
    return pairs


def served_seconds(url: str, pairs) -> float:
    """Wall-clock seconds in which the server scores all rollouts."""

    async def measure() -> float:
        client = RewardClient([url], max_in_flight=len(pairs), patience_s=0)
        await asyncio.gather(*(client.score(*pair) for pair in pairs[:128]))  # warm up connections and caches
        start = time.perf_counter()
        await asyncio.gather(*(client.score(*pair) for pair in pairs))
        seconds = time.perf_counter() - start
        await client.close()
        return seconds

    return asyncio.run(measure())


def make_scorer(args, precision: str) -> RewardScorer:
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"  # as in the server
    token2wav = load_token2wav(args.token2wav_dir, args.device, precision)
    voices = [load_prompt_voice(token2wav, args.prompt_audio, "你好")] if args.prompt_audio else []
    asr = SenseVoice(args.asr_dir, args.device)
    context = Context(args.device, asr=asr, token2wav_dir=args.token2wav_dir)
    parts = load_parts(parse_rewards(args.rewards), context)
    return RewardScorer(token2wav, asr, args.random is not None, "tanh", voices, parts=parts)


def score_in_batches(scorer: RewardScorer, pairs, batch_size: int) -> list:
    """Scores of all rollouts; exits if one has an error."""
    scores = []
    for first in range(0, len(pairs), batch_size):
        scores += scorer.score(*zip(*pairs[first : first + batch_size], strict=True))
    for score in scores:
        if score.error:
            raise SystemExit(f"bench_reward.py: {score.error}")
    return scores


def in_process(args, scorer: RewardScorer, pairs, batch_size: int) -> dict:
    """Rollouts per second of one process, and the seconds of each step."""
    score_in_batches(scorer, pairs[:batch_size], batch_size)
    scorer.seconds = dict.fromkeys(scorer.seconds, 0.0)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    score_in_batches(scorer, pairs, batch_size)
    wall_s = time.perf_counter() - start
    result = {"rollouts_per_s": len(pairs) / wall_s, "wall_s": wall_s, "seconds": dict(scorer.seconds)}
    if args.device != "cpu":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


class OfficialInference:
    """CosyVoice's and funasr's own inference, one rollout at a time."""

    def __init__(self, args):
        from tts_grpo.speech.cosyvoice2.token2wav import CosyVoice2Token2Wav, load_modules

        self.device, self.asr = args.device, SenseVoice(args.asr_dir, args.device)
        self.frontend = CosyVoice2Token2Wav(args.token2wav_dir)  # used only for prompt features
        modules = load_modules(args.token2wav_dir)
        flow = torch.load(args.token2wav_dir / "flow.pt", weights_only=True)
        hift = torch.load(args.token2wav_dir / "hift.pt", weights_only=True)
        modules["flow"].load_state_dict(flow)
        modules["hift"].load_state_dict({key.removeprefix("generator."): value for key, value in hift.items()})
        self.flow, self.hift = (modules[name].eval().to(self.device) for name in ("flow", "hift"))

    @torch.inference_mode()
    def decode(self, tokens: list[int], speech: np.ndarray) -> torch.Tensor:
        """Waveform (1, T) at 24 kHz in the voice of ``speech``, by CosyVoice's own frontend and model."""
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
        """Seconds of token2wav and of the recogniser, after one warm-up rollout."""
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
    """Rollouts per second with batch size 1, TF32, and the solver's ten steps in one CUDA graph for each length.

    Only replays are timed, since an engine such as TensorRT knows its shapes in advance. ``scorer`` must not be used
    afterwards.
    """
    import cosyvoice.flow.decoder as decoder

    original = decoder.add_optional_chunk_mask
    decoder.add_optional_chunk_mask = lambda x, mask, *_: mask  # the same mask, without a check that waits for the GPU
    token2wav, flow = scorer.token2wav, scorer.token2wav.flow
    original_solve, graphs = flow.solve, {}

    def solve(*inputs):
        if inputs[0].shape not in graphs:
            graph_inputs = [value.clone() for value in inputs]
            original_solve(*graph_inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = original_solve(*graph_inputs)
            graphs[inputs[0].shape] = graph, graph_inputs, result
        graph, graph_inputs, result = graphs[inputs[0].shape]
        for target, value in zip(graph_inputs, inputs, strict=True):
            target.copy_(value)
        graph.replay()
        return result

    flow.solve, token2wav.fast = solve, True
    torch.backends.cuda.matmul.allow_tf32 = True
    for tokens, _ in pairs:
        token2wav([tokens], scorer.prompt_voices)
    scorer.seconds = dict.fromkeys(scorer.seconds, 0.0)
    start = time.perf_counter()
    for pair in pairs:
        score_in_batches(scorer, [pair], 1)
    wall_s = time.perf_counter() - start
    decoder.add_optional_chunk_mask = original
    return {"rollouts_per_s": len(pairs) / wall_s, "seconds": dict(scorer.seconds),
            "token2wav_rollouts_per_s": len(pairs) / scorer.seconds["token2wav"]}  # fmt: skip


@torch.inference_mode()
def exactness(fp32: RewardScorer, official: OfficialInference, pairs, voice: PromptVoice) -> dict:
    """The largest difference between waveforms of a batch in fp32 and those of the official code."""
    batch, lens = fp32.token2wav([tokens for tokens, _ in pairs], [voice] * len(pairs))
    max_difference = 0.0
    for waveform, length, (tokens, _) in zip(batch, lens.tolist(), pairs, strict=True):
        with fp32.token2wav.vocoder.fixed_noise(0, length):
            expected = official.decode(tokens, voice.prompt_speech_16k)[0]
        max_difference = max(max_difference, (waveform[:length] - expected).abs().max().item())
    return {"fp32_batch_max_difference": max_difference, "waveform_peak": batch.abs().max().item()}


@torch.inference_mode()
def precision_effect(fp32: RewardScorer, half: RewardScorer, pairs, voice: PromptVoice) -> dict:
    """Differences between half precision and fp32: relative errors, and the pinyin of the transcripts."""
    tokens, voices = [tokens for tokens, _ in pairs], [voice] * len(pairs)
    waveforms = [scorer.token2wav(tokens, voices)[0] for scorer in (fp32, half)]
    prompts = [fp32.token2wav.prompt_features(voice)] * len(pairs)
    mels = [scorer.token2wav.flow(tokens, prompts) for scorer in (fp32, half)]
    used = torch.arange(mels[0].shape[2]) < 2 * torch.tensor(list(map(len, tokens)))[:, None]
    mels = [mel.transpose(1, 2)[used.to(mel.device)] for mel in mels]
    relative = lambda a, b: ((a - b).norm() / a.norm()).item()  # noqa: E731
    transcripts = []
    for scorer in (fp32, half):
        torch.manual_seed(0)  # the same random numbers for both
        transcripts.append([one.text for one in scorer.synthesise_and_transcribe(tokens, voices)])
    differences = [align_texts(*pair, "toned") for pair in zip(*transcripts, strict=True)]
    return {
        "mel_relative_error": relative(*mels), "waveform_relative_error": relative(*waveforms),
        "transcript_difference": float(np.mean([found.counts.rate for found in differences])),
        "distinct_syllables": len({syllable for text in transcripts[0] for syllable in pinyin(text, True)}),
    }  # fmt: skip


def measure_baselines(args, pairs, measured) -> None:
    """Measure the paths that score one rollout at a time, and compare results with them."""
    few = pairs[: args.baseline]
    official, fp32 = OfficialInference(args), make_scorer(args, "fp32")
    voice = fp32.prompt_voices[0]
    measured("official", official.measure(few, voice.prompt_speech_16k))
    torch.backends.cudnn.allow_tf32 = False
    measured("exactness", exactness(fp32, official, few, voice))
    torch.backends.cudnn.allow_tf32 = True
    for precision in args.compare_precisions:
        measured(precision, precision_effect(fp32, make_scorer(args, precision), few, voice))
    if args.device != "cpu":
        measured("graph", graph_one_by_one(fp32, few))


def table(result: dict, audio_s: float) -> str:
    """Table of rollouts and seconds of audio per second, with the ratios to "official" and "graph"."""
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


def part_costs(seconds: dict[str, float], num_rollouts: int) -> list[dict]:
    """Milliseconds per rollout of each step and part, and relative to token2wav and ASR together."""
    base = seconds["token2wav"] + seconds["asr"]
    return [
        {"step": name, "ms_per_rollout": round(1000 * value / num_rollouts, 2),
         "relative_percent": round(100 * value / base, 1)}
        for name, value in seconds.items()
    ]  # fmt: skip


def record_parts(result: dict, argv: list[str]) -> None:
    """Write docs/results/reward_parts.json and the table of docs/rewards.md."""
    (measured,) = result["in_process"].values()
    figures = part_costs(measured["seconds"], result["num_rollouts"])
    conditions = f"{result['num_rollouts']} rollouts of {result['mean_audio_s']:.1f} s on average, one process"
    about = provenance("Cost of the parts of the reward", ["tools/bench_reward.py", *argv])
    write_json(ROOT / "docs/results/reward_parts.json", about | {"conditions": conditions, "figures": figures})
    page = ROOT / "docs/rewards.md"
    rows = [f"| {row['step']} | {row['ms_per_rollout']:.2f} | {row['relative_percent']}% |" for row in figures]
    table = ["| Step | Milliseconds per rollout | Relative to token2wav and ASR |", "| --- | --- | --- |", *rows]
    page.write_text(replace_tables(page.read_text(encoding="utf-8"), {"reward_parts": table}), encoding="utf-8")


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # funasr logs at this level
    if args.random:
        make_random(args)
    if args.make_only:
        return
    if args.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(args.device)  # kernels and graphs run on the current device
    pairs = rollouts(args)
    audio_s = sum(len(tokens) for tokens, _ in pairs) / TOKEN_HZ / len(pairs)
    result = {"num_rollouts": len(pairs), "mean_audio_s": audio_s}

    def measured(name: str, value) -> None:
        result[name] = value
        print(
            json.dumps({name: value}), file=sys.stderr, flush=True
        )  # immediately, because a later measurement may fail

    if args.server_url:
        measured("server", {"rollouts_per_s": len(pairs) / served_seconds(args.server_url, pairs)})
    if args.batch_size:
        start = time.perf_counter()
        scorer = make_scorer(args, args.precision)
        scorer.token2wav.warm_up()
        score_in_batches(scorer, pairs[:16], 16)
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
    if args.record:
        record_parts(result, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
