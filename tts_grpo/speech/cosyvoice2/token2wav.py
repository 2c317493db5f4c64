"""CosyVoice2's token2wav: its own flow and HiFT modules, run on whole batches with the result of one by one.

The modules are those of https://github.com/FunAudioLLM/CosyVoice (or of a packaging of it), which must be importable;
in fp32 nothing of the networks is written again; half precision has its own layers (packed_flow.py, kernels.py). The
modules' inference takes one utterance. What padding would change in a batch is undone at their borders:

* flow: the encoder's look-ahead convolution gets zeros behind the end of each utterance, not the embedding's bias
  (``PreLookaheadLayer``); attention and the causal decoder respect masks already. The solver's classifier-free
  guidance runs both halves for the whole batch (``ConditionalCFM.solve_euler`` has buffers for one utterance).
* HiFT: each convolution gets zeros behind the end, as its own padding would give; the source's short-time transform is
  reflected at each utterance's end, and the inverse transform divides by the windows that are there.
* noise: HiFT's source draws from the global generator; here it is a fixed sequence of the seed, the same for each
  utterance, so that speech does not depend on what else is in the batch.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from tts_grpo.speech.audio import ASR_HZ, resample
from tts_grpo.speech.decoder import PromptVoice, check_speech_tokens, pad_speech_tokens
from tts_grpo.speech.model_folders import TOKEN2WAV_FILES, describe, missing_files

NUM_STEPS = 10  # of the solver, as in CausalMaskedDiffWithXvec.inference
MEL_PER_TOKEN = 2
# Of the utterances that encoder and vocoder take at once: how many, and of how many tokens once padded to the longest.
# A quarter of the tokens takes 2 GiB less and is a tenth slower.
ROWS = 32
PADDED_TOKENS, PADDED_TOKENS_SMALL_GPU = 16384, 4096
SMALL_GPU_GIB = 40
YAML_PARTS = ("flow", "hift", "feat_extractor")  # entries of cosyvoice2.yaml that are made, beside plain values
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_modules(model_dir: Path) -> dict:
    """``flow``, ``hift`` and ``feat_extractor`` as cosyvoice2.yaml describes them, with random weights.

    Raises:
        ImportError: CosyVoice's source cannot be imported; says what to do.
    """
    from hyperpyyaml import load_hyperpyyaml

    text = (model_dir / "cosyvoice2.yaml").read_text(encoding="utf-8")
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    kept = [e for e in entries if e.split(":", 1)[0] in YAML_PARTS or re.fullmatch(r"\w+:[^!\[{\n]*\n*", e)]
    try:
        return load_hyperpyyaml(io.StringIO("".join(kept)))
    except (ImportError, ModuleNotFoundError) as error:
        raise ImportError(
            f"CosyVoice's modules cannot be imported ({error}): put its source and its third_party/Matcha-TTS on "
            "PYTHONPATH (bash run.sh -1 -1 clones it and run.sh sets the path)"
        ) from error


@functools.cache
def most_padded_tokens(device: torch.device) -> int:
    """``PADDED_TOKENS`` of a device."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory >= SMALL_GPU_GIB * 2**30:
        return PADDED_TOKENS
    return PADDED_TOKENS_SMALL_GPU


def padded_parts(lens: Sequence[int], most: int) -> list[slice]:
    """Parts of a batch of at most ``ROWS`` utterances and, unless it is one alone, ``most`` tokens once padded."""
    parts, first = [], 0
    for end in range(1, len(lens) + 1):
        padded = max(lens[first : end + 1]) * (end + 1 - first)
        if end in (len(lens), first + ROWS) or padded > most:
            parts.append(slice(first, end))
            first = end
    return parts


@contextlib.contextmanager
def tf32(allowed: bool):
    """Inside it, products of float32 matrices may, or must not, be computed in TF32."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


class FixedNoise(TorchFunctionMode):
    """Inside it, ``torch.rand`` and ``torch.randn_like`` give the same numbers to each row of a batch.

    The numbers of a shorter row are the beginning of those of a longer one.
    """

    def __init__(self, seed: int, length: int, channels: int, device: torch.device):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.uniform = torch.from_numpy(rng.random(channels, dtype=np.float32)).to(device)
        self.normal = torch.from_numpy(rng.standard_normal((length, channels), dtype=np.float32)).to(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.rand:
            return self.uniform[: args[1]].to(kwargs["device"]).repeat(args[0], 1)
        if func is torch.randn_like:
            like = args[0]
            return self.normal[: like.shape[1], : like.shape[2]].to(like).expand_as(like)
        return func(*args, **(kwargs or {}))


class Flow:
    """Speech tokens -> mel, in batches.

    Args:
        module: CosyVoice's ``CausalMaskedDiffWithXvec``.
        dtype: of the estimator; float32 runs it on padded batches, a half precision on packed ones.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32):
        self.module, self.token_mask = module, None
        module.encoder.pre_lookahead_layer.register_forward_pre_hook(
            lambda _, args: (args[0] * self.token_mask[..., None], *args[1:])
        )
        self.noise = module.decoder.rand_noise.to(self.device)
        steps = torch.linspace(0, 1, NUM_STEPS + 1, device=self.device)
        self.times = 1 - torch.cos(steps * 0.5 * torch.pi)
        self.packed = None
        if dtype != torch.float32:
            from tts_grpo.speech.cosyvoice2.packed_flow import (
                PackedSolver,  # needs Triton, which comes with torch for GPUs
            )

            self.packed = PackedSolver(module.decoder, self.times, dtype)

    @property
    def device(self) -> torch.device:
        return self.module.input_embedding.weight.device

    def __call__(self, speech_tokens: Sequence[Sequence[int]], prompts: Sequence[dict]) -> torch.Tensor:
        """Mel of utterances that each continue a prompt.

        Args:
            speech_tokens: B sequences of ids.
            prompts: B times ``tokens`` (P ids), ``mel`` (2P, 80) and ``speaker_embedding`` (192,).

        Returns:
            float32 (B, 80, 2T), where T is the longest, undefined behind each utterance's end.
        """
        tokens, lens = pad_speech_tokens(
            [[*prompt["tokens"], *row] for prompt, row in zip(prompts, speech_tokens, strict=True)]
        )
        mu = torch.cat([
            F.pad(part, (0, MEL_PER_TOKEN * tokens.shape[1] - part.shape[2]))
            for part in self.encode(tokens.to(self.device), lens)
        ])  # fmt: skip
        given = pad_sequence([prompt["mel"] for prompt in prompts], batch_first=True).transpose(1, 2)
        condition = F.pad(given, (0, mu.shape[2] - given.shape[2]))
        embeddings = torch.stack([prompt["speaker_embedding"] for prompt in prompts])
        spks = self.module.spk_embed_affine_layer(F.normalize(embeddings, dim=1))
        if self.packed:
            mel = self.packed(mu, spks, condition, (MEL_PER_TOKEN * lens).tolist())
        else:
            frames = torch.arange(mu.shape[2])
            mask = (frames < MEL_PER_TOKEN * lens[:, None])[:, None].to(mu)
            mel = self.solve(mu, mask, spks, condition)
        starts = torch.tensor([len(prompt["mel"]) for prompt in prompts])
        size = MEL_PER_TOKEN * max(map(len, speech_tokens))
        places = (starts[:, None] + torch.arange(size)).clamp(max=mel.shape[2] - 1).to(self.device)
        return mel.gather(2, places[:, None].expand(-1, mel.shape[1], -1))

    def encode(self, tokens: torch.Tensor, lens: torch.Tensor) -> Iterator[torch.Tensor]:
        """The encoder's (B', 80, 2T') of parts of a batch of ids (B, T) with lengths (B,): its attention is large."""
        module = self.module
        for rows in padded_parts(lens.tolist(), most_padded_tokens(self.device)):
            part_lens = lens[rows]
            part = tokens[rows, : int(part_lens.max())]
            self.token_mask = (torch.arange(part.shape[1]) < part_lens[:, None]).to(self.device)
            embedded = module.input_embedding(part) * self.token_mask[..., None]
            encoded = module.encoder(embedded, part_lens.to(self.device), streaming=False)[0]
            yield module.encoder_proj(encoded).transpose(1, 2)

    def solve(self, mu, mask, spks, condition) -> torch.Tensor:
        """Euler steps of conditional flow matching with classifier-free guidance (``ConditionalCFM.solve_euler``)."""
        decoder = self.module.decoder
        rate = decoder.inference_cfg_rate
        x = self.noise[:, :, : mu.shape[2]].expand_as(mu)
        both = lambda value: torch.cat([value, torch.zeros_like(value)])  # noqa: E731
        masks, mus, speakers, conditions = torch.cat([mask, mask]), both(mu), both(spks), both(condition)
        for t, dt in zip(self.times[:-1], self.times.diff(), strict=True):
            change = decoder.estimator(
                torch.cat([x, x]), masks, mus, t.expand(len(masks)), speakers, conditions, streaming=False
            )
            guided, free = change.chunk(2)
            x = x + dt * ((1 + rate) * guided - rate * free)
        return x


class Vocoder:
    """Mel -> waveform with HiFT, in batches.

    Args:
        module: CosyVoice's ``HiFTGenerator``.
        dtype: of the residual blocks' products; float32 leaves the module as it is.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32):
        self.module, self.masks = module, {}
        self.n_fft, self.hop = module.istft_params["n_fft"], module.istft_params["hop_len"]
        self.ups = [up.stride[0] for up in module.ups]
        self.samples_per_frame = int(np.prod(self.ups)) * self.hop
        self.noise = None
        for part in module.modules():
            if isinstance(part, nn.Conv1d | nn.ConvTranspose1d):
                part.register_forward_pre_hook(lambda _, args: (args[0] * self.masks[args[0].shape[-1]],))
        if dtype != torch.float32:
            from tts_grpo.speech.cosyvoice2.kernels import SnakeResBlock

            for blocks in (module.resblocks, module.source_resblocks):
                for i, block in enumerate(blocks):
                    blocks[i] = SnakeResBlock(block, self.masks, dtype)
        self.stft = module._stft
        module._stft, module._istft = self.source_spectrum, self.waveform

    def __call__(self, mel: torch.Tensor, lens: torch.Tensor, seed: int) -> torch.Tensor:
        """float32 (B, 80, T) and int64 (B,) frames -> float32 (B, T * samples_per_frame), zeros behind the ends."""
        lens = lens.to(mel.device)
        self.set_masks(lens, mel.shape[2])
        f0 = self.module.f0_predictor(mel) * self.masks[mel.shape[2]][:, 0]
        source = self.module.f0_upsamp(f0[:, None]).transpose(1, 2)
        with self.fixed_noise(seed, source.shape[1]):
            source = self.module.m_source(source)[0].transpose(1, 2)
        speech = self.module.decode(x=mel, s=source)
        ends = (lens * self.samples_per_frame)[:, None]
        return speech * (torch.arange(speech.shape[1], device=speech.device) < ends)

    def set_masks(self, lens: torch.Tensor, size: int) -> None:
        """Masks (B, 1, L) by length L, one for each of HiFT's time scales."""
        scales = [int(n) for n in np.cumprod([1, *self.ups])]
        shapes = [(scale, 0) for scale in scales] + [(scales[-1], 1)]  # the last with the frame of a centred transform
        self.masks.clear()
        for scale, more in shapes:
            position = torch.arange(size * scale + more, device=lens.device)
            self.masks[len(position)] = (position < (lens * scale + more)[:, None]).float()[:, None]
        self.ends, self.frames = lens * self.samples_per_frame, self.masks[size * scales[-1] + 1]

    def fixed_noise(self, seed: int, length: int) -> FixedNoise:
        """Noise of the source, made anew only when it is too short or of another seed."""
        if self.noise is None or self.noise[0] != seed or len(self.noise[1].normal) < length:
            device = self.module.conv_post.bias.device
            self.noise = (seed, FixedNoise(seed, 2 * length, self.module.nb_harmonics + 1, device))
        return self.noise[1]

    def source_spectrum(self, source: torch.Tensor):
        """(B, L) -> real and imaginary part, each row reflected at its own end as ``center=True`` does at the last."""
        position = torch.arange(source.shape[1], device=source.device)
        ends = self.ends[:, None]
        mirrored = torch.where(position < ends, position, 2 * (ends - 1) - position).clamp(min=0)
        return self.stft(source.gather(1, mirrored))

    def waveform(self, magnitude: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """``HiFTGenerator._istft`` for rows of different lengths: frames behind the end neither add nor divide."""
        window = self.module.stft_window.to(magnitude.device)
        spectrum = torch.polar(magnitude.clip(max=1e2).float(), phase.float())
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window[:, None] * self.frames
        windows = (window**2)[:, None] * self.frames
        length = (magnitude.shape[2] - 1) * self.hop + self.n_fft
        added, weight = (
            F.fold(value, (1, length), kernel_size=(1, self.n_fft), stride=(1, self.hop))[:, 0, 0]
            for value in (frames, windows)
        )
        edge = self.n_fft // 2
        return (added / weight.clamp(min=1e-11))[:, edge:-edge]


class CosyVoice2Token2Wav:
    """Decoder and speech tokenizer of a CosyVoice2 folder (``iic/CosyVoice2-0.5B``), 24 kHz.

    Args:
        model_dir: the folder.
        device: torch device of flow and vocoder; the prompt's networks run on the CPU, once a voice.
        precision: "fp32", equal to the official code in fp32; or, on a GPU, "fp16" or "bf16": the flow's estimator, on
            packed batches, and the vocoder's residual blocks in half precision, TF32 elsewhere.
        cache_dir: where prompt features are kept; None is ``tts_grpo`` in the user's cache folder.

    Raises:
        ValueError: a file is missing, or its weights are not the modules'; or half precision without a GPU.
        ImportError: CosyVoice's source is not importable.
    """

    sample_rate_hz = 24_000

    needs_voice = True

    def __init__(
        self, model_dir: str | Path, device: str = "cpu", precision: str = "fp32", cache_dir: Path | None = None
    ):
        self.model_dir, self.device, self.fast = Path(model_dir), torch.device(device), precision != "fp32"
        self.cache_dir = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tts_grpo"
        if self.fast and self.device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
            raise ValueError(f"precision {precision} needs a GPU: on a CPU, token2wav runs in fp32")
        if missing := missing_files(model_dir, TOKEN2WAV_FILES["cosyvoice2"]):
            raise ValueError(f"{model_dir}: not a CosyVoice2 folder: {describe(missing)} missing")
        modules = load_modules(self.model_dir)
        self.prompt_mel = modules["feat_extractor"]
        with torch.inference_mode(), tf32(self.fast):
            self.flow = Flow(self._with_weights(modules["flow"], "flow.pt"), PRECISIONS[precision])
            hift = self._with_weights(modules["hift"], "hift.pt", "generator.")
            self.vocoder = Vocoder(hift, PRECISIONS[precision])
        self.sessions, self.prompts = {}, {}

    def _with_weights(self, module: nn.Module, name: str, prefix: str = "") -> nn.Module:
        state = torch.load(self.model_dir / name, map_location="cpu", weights_only=True)
        try:
            module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
        except RuntimeError as error:
            raise ValueError(f"{self.model_dir / name}: {error}") from error
        for part in module.modules():
            if parametrize.is_parametrized(part, "weight"):  # weight normalisation, else computed at each call
                parametrize.remove_parametrizations(part, "weight")
        return module.float().eval().to(self.device)

    def _run(self, name: str, *inputs: np.ndarray) -> np.ndarray:
        """First output of one of the folder's ONNX networks."""
        import onnxruntime

        if name not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.sessions[name] = onnxruntime.InferenceSession(
                str(self.model_dir / name), options, providers=["CPUExecutionProvider"]
            )
        session = self.sessions[name]
        return session.run(None, {i.name: value for i, value in zip(session.get_inputs(), inputs, strict=True)})[0]

    def encode(self, recordings: Sequence[np.ndarray]) -> list[list[int]]:
        """Speech tokens of recordings, each float32 (T,) at 16 kHz and at most 30 s (the tokenizer's limit)."""
        from s3tokenizer import log_mel_spectrogram

        tokens = []
        for i, recording in enumerate(recordings):
            if not 0 < len(recording) <= 30 * ASR_HZ:
                raise ValueError(f"recording {i} has {len(recording) / ASR_HZ:.1f} s, not more than 0 and at most 30")
            mel = log_mel_spectrogram(torch.as_tensor(recording), n_mels=128)[None].numpy()
            ids = self._run("speech_tokenizer_v2.onnx", mel, np.array([mel.shape[2]], np.int32))
            tokens.append(ids.ravel().astype(int).tolist())
        return tokens

    def prompt_features(self, voice: PromptVoice) -> dict:
        """What :class:`Flow` takes of a voice: computed once, kept in memory and on disk."""
        speech = np.ascontiguousarray(voice.prompt_speech_16k, np.float32)
        digest = hashlib.sha256(speech.tobytes()).hexdigest()
        if digest not in self.prompts:
            path = self.cache_dir / f"prompt_{self.prompt_key}_{digest}.pt"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                tmp = path.with_name(f"{path.name}.{os.getpid()}.part")
                torch.save(self.compute_prompt_features(speech), tmp)
                tmp.replace(path)
            features = torch.load(path, weights_only=True)
            self.prompts[digest] = {
                "tokens": features["tokens"].tolist(), "mel": features["mel"].to(self.device),
                "speaker_embedding": features["speaker_embedding"].to(self.device),
            }  # fmt: skip
        return self.prompts[digest]

    @functools.cached_property
    def prompt_key(self) -> str:
        """Hash of what prompt features depend on beside the recording."""
        digest = hashlib.sha256()
        for name in ("cosyvoice2.yaml", "campplus.onnx", "speech_tokenizer_v2.onnx"):
            digest.update((self.model_dir / name).read_bytes())
        return digest.hexdigest()[:16]

    def compute_prompt_features(self, speech: np.ndarray) -> dict[str, torch.Tensor]:
        """Speech tokens (P,), mel (2P, 80) and speaker embedding (192,) of float32 (T,) at 16 kHz."""
        mel = self.prompt_mel(torch.from_numpy(resample(speech[None], ASR_HZ, self.sample_rate_hz)))[0].T
        tokens = torch.tensor(self.encode([speech])[0])
        count = min(len(mel) // MEL_PER_TOKEN, len(tokens))  # CosyVoiceFrontEnd.frontend_zero_shot
        return {
            "tokens": tokens[:count], "mel": mel[: MEL_PER_TOKEN * count].clone(),
            "speaker_embedding": self.speaker_embedding(speech),
        }  # fmt: skip

    def speaker_embedding(self, speech: np.ndarray) -> torch.Tensor:
        """CAM++ embedding (192,) of float32 (T,) at 16 kHz (``CosyVoiceFrontEnd._extract_spk_embedding``)."""
        from torchaudio.compliance import kaldi

        features = kaldi.fbank(torch.from_numpy(speech)[None], num_mel_bins=80, dither=0, sample_frequency=ASR_HZ)
        features = features - features.mean(dim=0, keepdim=True)
        return torch.from_numpy(self._run("campplus.onnx", features[None].numpy())).flatten()

    @torch.inference_mode()
    def __call__(self, speech_tokens, prompt_voices=None, seed=0):
        check_speech_tokens(speech_tokens)
        if not prompt_voices or None in prompt_voices:
            raise ValueError("CosyVoice2 needs a prompt voice: give prompt_audio and prompt_text")
        prompts = [self.prompt_features(voice) for voice in prompt_voices]
        lens = torch.tensor([len(tokens) for tokens in speech_tokens])
        order = lens.argsort().tolist()  # like lengths together: less padding
        size = MEL_PER_TOKEN * self.vocoder.samples_per_frame
        waveforms = torch.zeros(len(lens), size * int(lens.max()), device=self.device)
        with tf32(self.fast):
            decoded = self._decode([speech_tokens[i] for i in order], [prompts[i] for i in order], seed)
        for i, waveform in zip(order, decoded, strict=True):
            waveforms[i, : len(waveform)] = waveform
        return waveforms, lens * size

    def _decode(self, speech_tokens, prompts, seed) -> list[torch.Tensor]:
        """Waveforms of a batch; of its halves one after the other if the GPU has not the memory for all."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._vocode(self.flow(speech_tokens, prompts), list(map(len, speech_tokens)), seed)
        if len(speech_tokens) == 1:
            raise RuntimeError(
                f"{self.device} has not the memory for one utterance of {len(speech_tokens[0])} speech tokens"
            )
        torch.cuda.empty_cache()
        half = len(speech_tokens) // 2
        parts = (slice(half), slice(half, None))
        return [wave for part in parts for wave in self._decode(speech_tokens[part], prompts[part], seed)]

    def _vocode(self, mel: torch.Tensor, lens: list[int], seed: int) -> list[torch.Tensor]:
        """Waveforms of mels (B, 80, 2T) of ``lens`` tokens."""
        waveforms = []
        for rows in padded_parts(lens, most_padded_tokens(self.device)):
            frames = MEL_PER_TOKEN * torch.tensor(lens[rows])
            batch = self.vocoder(mel[rows, :, : int(frames.max())], frames, seed)
            ends = (frames * self.vocoder.samples_per_frame).tolist()
            waveforms += [waveform[:end] for waveform, end in zip(batch, ends, strict=True)]
        return waveforms

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the flow's kernels and capture its graphs; the vocoder's are compiled by its first batch."""
        if self.flow.packed:
            with tf32(True):
                self.flow.packed.warm_up()
