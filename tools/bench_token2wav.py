"""Benchmark token2wav alone: rollouts per second of batches, and of the official code one by one.

    python tools/bench_token2wav.py --random DIR --device cuda:0 --runs fp16:32 fp16:128 fp32:32 --official 24

A run is a precision and a batch size. Rollouts have random tokens, lengths between those of --seconds and a random
order, and the same prompt voice, whose features are computed before. --random DIR makes a folder of --model with random
weights of the full size (or of a small one, --small) in DIR, which is sufficient to measure speed and exactness.

--official N decodes the first N rollouts by CosyVoice3's own ``flow.inference`` and ``hift.inference``, one at a time,
and compares them with a batch in fp32; CosyVoice's source, its third_party/Matcha-TTS and x-transformers must be on
PYTHONPATH. The differences of the other precisions are relative errors of the mel spectrogram, and of the waveform of
the same mel spectrogram (phases add up frequencies, so small differences in the mel spectrogram shift them).

--flash SIZES also measures FlashCosyVoice (https://github.com/xingchensong/FlashCosyVoice), the fastest published
decoder of CosyVoice2, at these batch sizes, with the same weights, rollouts and prompt: a padded batch of the flow in
half precision, and the vocoder one by one, as in its own program. Its source must be on PYTHONPATH. Each batch size is
measured in the random order of the rollouts and sorted by length.

Prints one JSON object to stdout, and each measurement to stderr as soon as it is done.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.cosyvoice2.random_weights import FULL, SMALL, make_cosyvoice2_folder
from tts_grpo.speech.cosyvoice2.token2wav import MEL_PER_TOKEN, load_modules
from tts_grpo.speech.cosyvoice3.random_weights import write_token2wav
from tts_grpo.speech.decoder import PromptVoice, Token2Wav, tf32
from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, TOKEN_HZ


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=Path, required=True, help="folder for the model with random weights")
    parser.add_argument("--model", choices=("cosyvoice2", "cosyvoice3"), default="cosyvoice3", help="kind of model")
    parser.add_argument("--small", action="store_true", help="make a small model, to test this program")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--runs", nargs="+", default=["fp32:16"], help="precision:batch size of each run")
    parser.add_argument("--seconds", type=float, nargs=3, default=(2, 4.3, 12), help="minimum, mean, maximum length")
    parser.add_argument("--prompt-s", type=float, default=3.0, help="seconds of the prompt")
    parser.add_argument("--num-rollouts", type=int, default=256, help="number of rollouts")
    parser.add_argument("--num-fp32-rollouts", type=int, default=64, help="number of rollouts of runs in fp32")
    parser.add_argument("--official", type=int, default=0, help="rollouts to decode by the official code")
    parser.add_argument(
        "--flash", type=int, nargs="*", default=[], help="batch sizes of FlashCosyVoice (CosyVoice2 only)"
    )
    return parser.parse_args(argv)


def rollouts(args) -> list[list[int]]:
    """Speech tokens; lengths have a beta distribution with the given range and mean, and a long tail."""
    rng = np.random.default_rng(0)
    minimum, mean, maximum = args.seconds
    a = 1.5
    shares = rng.beta(a, a * (maximum - mean) / (mean - minimum), args.num_rollouts)
    lens = np.round((minimum + (maximum - minimum) * shares) * TOKEN_HZ).astype(int)
    return [rng.integers(0, NUM_SPEECH_TOKENS, n).tolist() for n in lens]


def prompt_voice(seconds: float) -> PromptVoice:
    """A noisy tone, as a substitute for a recording."""
    times = np.arange(int(seconds * ASR_HZ)) / ASR_HZ
    noise = np.random.default_rng(1).standard_normal(len(times))
    return PromptVoice("你好", (0.3 * np.sin(2 * np.pi * 180 * times) + 0.05 * noise).astype(np.float32), ())


def seconds_of(args, action) -> float:
    """Wall-clock seconds of ``action()``, which may queue work on the GPU."""
    if args.device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args, token2wav: Token2Wav, tokens, voice: PromptVoice, batch_size: int) -> dict:
    """Rollouts per second of whole batches, and the seconds of the flow alone for the same batches."""
    batches = [tokens[first : first + batch_size] for first in range(0, len(tokens), batch_size)]
    prompt = token2wav.prompt_features(voice)

    @torch.inference_mode()
    def flow_only():
        with tf32(token2wav.fast):
            for batch in batches:
                batch = sorted(batch, key=len)
                token2wav.flow(batch, [prompt] * len(batch))

    def all_batches():
        for batch in batches:
            token2wav(batch, [voice] * len(batch))

    token2wav(batches[0], [voice] * len(batches[0]))  # compiles what warm_up leaves
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    wall_s = seconds_of(args, all_batches)
    result = {"rollouts": len(tokens), "rollouts_per_s": len(tokens) / wall_s, "wall_s": wall_s,
              "flow_s": seconds_of(args, flow_only)}  # fmt: skip
    if args.device != "cpu":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


class Official:
    """CosyVoice's own inference, one rollout at a time, in fp32 without TF32."""

    def __init__(self, folder: Path, device: str):
        modules = load_modules(folder, "cosyvoice3.yaml")
        modules["flow"].load_state_dict(torch.load(folder / "flow.pt", weights_only=True))
        state = torch.load(folder / "hift.pt", weights_only=True)
        modules["hift"].load_state_dict({name.removeprefix("generator."): value for name, value in state.items()})
        self.device = device
        self.flow, self.hift = (modules[name].eval().to(device) for name in ("flow", "hift"))

    @torch.inference_mode()
    def __call__(self, tokens: list[int], features: dict) -> torch.Tensor:
        """Waveform (T,) in the voice of the given prompt features."""
        prompt = {name: torch.as_tensor(value)[None].to(self.device) for name, value in features.items()}
        row = torch.tensor([tokens], device=self.device)
        length = lambda value: torch.tensor([value.shape[1]], device=self.device)  # noqa: E731
        with tf32(False):
            mel, _ = self.flow.inference(
                row, length(row), prompt["tokens"], length(prompt["tokens"]), prompt["mel"], length(prompt["mel"]),
                prompt["speaker_embedding"], streaming=False, finalize=True,
            )  # fmt: skip
            return self.hift.inference(speech_feat=mel)[0][0]


def measure_official(args, exact: Token2Wav, tokens, voice: PromptVoice) -> dict:
    """Rollouts per second of the official code, and the largest difference of a batch in fp32."""
    official, features = Official(args.random, args.device), exact.prompt_features(voice)
    official(tokens[0], features)
    expected = []
    wall_s = seconds_of(args, lambda: expected.extend(official(row, features) for row in tokens))
    batch, lens = exact(tokens, [voice] * len(tokens))
    pairs = zip(batch, lens.tolist(), expected, strict=True)
    return {
        "rollouts": len(tokens), "rollouts_per_s": len(tokens) / wall_s, "wall_s": wall_s,
        "largest_difference_of_fp32_batch": max((row[:n] - one).abs().max().item() for row, n, one in pairs),
        "largest_sample": max(one.abs().max().item() for one in expected),
    }  # fmt: skip


class FlashCosyVoice:
    """FlashCosyVoice's decoder: a padded batch of the flow, in half precision on a GPU, and the vocoder one by one."""

    def __init__(self, folder: Path, device: str):
        from flashcosyvoice.modules.flow import CausalMaskedDiffWithXvec
        from flashcosyvoice.modules.hifigan import HiFTGenerator

        flow, self.hift, self.device = CausalMaskedDiffWithXvec(), HiFTGenerator(), torch.device(device)
        self.flow = flow if self.device.type == "cpu" else flow.half()
        self.flow.load_state_dict(torch.load(folder / "flow.pt", weights_only=True))
        state = torch.load(folder / "hift.pt", weights_only=True)
        self.hift.load_state_dict({name.removeprefix("generator."): value for name, value in state.items()})
        for module in (self.flow, self.hift):
            module.eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, batch: list[list[int]], features: dict) -> list[torch.Tensor]:
        """Waveforms (1, T) in the voice of the given prompt features."""
        prompt = {name: torch.as_tensor(value).to(self.device) for name, value in features.items()}
        rows = [torch.cat([prompt["tokens"], torch.tensor(tokens, device=self.device)]) for tokens in batch]
        frames = len(prompt["mel"])
        repeated = lambda value: value[None].expand(len(batch), *value.shape)  # noqa: E731
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type != "cpu"):
            mels, lens = self.flow(
                torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
                torch.tensor([len(row) for row in rows], device=self.device), repeated(prompt["mel"]),
                torch.full((len(batch),), frames, device=self.device), repeated(prompt["speaker_embedding"]),
                streaming=False, finalize=True,
            )  # fmt: skip
        return [self.hift(speech_feat=mel[None, :, frames:n])[0] for mel, n in zip(mels, lens.tolist(), strict=True)]


def measure_flash(args, tokens, features: dict) -> dict:
    """Rollouts per second of FlashCosyVoice by batch size and order."""
    flash, result = FlashCosyVoice(args.random, args.device), {}
    for size in args.flash:
        for order, rows in (("random order", tokens), ("sorted by length", sorted(tokens, key=len))):
            batches = [rows[first : first + size] for first in range(0, len(rows), size)]
            flash(batches[0], features)
            wall_s = seconds_of(args, lambda batches=batches: [flash(batch, features) for batch in batches])
            result[f"{size}, {order}"] = {"rollouts": len(rows), "rollouts_per_s": len(rows) / wall_s, "wall_s": wall_s}
    return result


@torch.inference_mode()
def precision_effect(exact, half, tokens, voice: PromptVoice) -> dict:
    """Relative errors in half precision: of the mel spectrogram, and of the waveform of the same mel spectrogram."""
    tokens = sorted(tokens, key=len)
    lens = [len(row) for row in tokens]
    prompts = [exact.prompt_features(voice)] * len(tokens)
    mels, waveforms = [], []
    for token2wav in (exact, half):
        with tf32(token2wav.fast):
            mel = token2wav.flow(tokens, prompts)
            mels.append(torch.cat([row[:, : MEL_PER_TOKEN * n].flatten() for row, n in zip(mel, lens, strict=True)]))
            if token2wav is exact:
                given = mel
            waveforms.append(torch.cat(token2wav._vocode(given, lens, 0)))
    relative = lambda a, b: ((a - b).norm() / a.norm()).item()  # noqa: E731
    return {"mel_relative_error": relative(*mels), "waveform_relative_error": relative(*waveforms)}


def main(argv=None):
    args = get_args(argv)
    if args.official and args.model != "cosyvoice3":
        raise SystemExit("bench_token2wav.py: --official needs --model cosyvoice3; for CosyVoice2, use bench_reward.py")
    if args.flash and args.model != "cosyvoice2":
        raise SystemExit("bench_token2wav.py: --flash needs --model cosyvoice2, which is what FlashCosyVoice decodes")
    if not (args.random / "flow.pt").exists():
        if args.model == "cosyvoice3":
            write_token2wav(args.random, small=args.small)
        else:
            make_cosyvoice2_folder(args.random, SMALL if args.small else FULL)
    if args.device != "cpu":
        torch.cuda.set_device(args.device)  # kernels and graphs run on the current device
    tokens, voice = rollouts(args), prompt_voice(args.prompt_s)
    result = {"mean_audio_s": sum(map(len, tokens)) / TOKEN_HZ / len(tokens), "torch": torch.__version__}
    if args.device != "cpu":
        result["gpu"] = torch.cuda.get_device_name()

    def measured(name: str, value) -> None:
        result[name] = value
        print(json.dumps({name: value}), file=sys.stderr, flush=True)  # immediately: a later measurement may fail

    decoders = {}
    for run in args.runs:
        precision, batch_size = run.split(":")
        if precision not in decoders:
            decoders[precision] = load_token2wav(args.random, args.device, precision)
            measured(f"{precision} warm-up", {"wall_s": seconds_of(args, decoders[precision].warm_up)})
        some = tokens[: args.num_fp32_rollouts] if precision == "fp32" else tokens
        measured(run, measure(args, decoders[precision], some, voice, int(batch_size)))
    if args.official or len(decoders) > 1:
        exact = decoders.get("fp32") or load_token2wav(args.random, args.device)
        for precision in decoders.keys() - {"fp32"}:
            measured(f"{precision} error", precision_effect(exact, decoders[precision], tokens[:16], voice))
        if args.official:
            measured("official", measure_official(args, exact, tokens[: args.official], voice))
    if args.flash:
        decoder = next(iter(decoders.values()))
        measured("FlashCosyVoice", measure_flash(args, tokens, decoder.prompt_features(voice)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
