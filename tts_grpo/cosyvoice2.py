"""CosyVoice2's token2wav: its own flow and HiFT modules, run on whole batches with the result of one by one.

The modules are those of https://github.com/FunAudioLLM/CosyVoice (or of a packaging of it), which must be importable;
nothing of the networks is written again here. Their inference takes one utterance. What padding would change in a
batch is undone at the borders of the modules:

* flow: the encoder's look-ahead convolution gets zeros behind the end of each utterance, not the embedding's bias
  (``PreLookaheadLayer``); attention and the causal decoder respect masks already. The solver's classifier-free
  guidance runs both halves for the whole batch (``ConditionalCFM.solve_euler`` has buffers for one utterance).
* HiFT: each convolution gets zeros behind the end, as its own padding would give; the source's short-time transform is
  reflected at each utterance's end, and the inverse transform divides by the windows that are there.
* noise: HiFT's source draws from the global generator; here it is a fixed sequence of the seed, the same for each
  utterance, so that speech does not depend on what else is in the batch.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from tts_grpo.audio import ASR_HZ, resample
from tts_grpo.token2wav import PromptVoice, pad_speech_tokens

NUM_STEPS = 10  # of the solver, as in CausalMaskedDiffWithXvec.inference
MEL_PER_TOKEN = 2
YAML_PARTS = ("flow", "hift", "feat_extractor")  # entries of cosyvoice2.yaml that are made, beside plain values
FILES = ("cosyvoice2.yaml", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx")


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
    """Speech tokens -> mel, in batches."""

    def __init__(self, module: nn.Module):
        self.module, self.token_mask = module, None
        module.encoder.pre_lookahead_layer.register_forward_pre_hook(
            lambda _, args: (args[0] * self.token_mask[..., None], *args[1:])
        )

    def __call__(self, tokens: torch.Tensor, lens: torch.Tensor, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mel of utterances that continue a prompt.

        Args:
            tokens: int64 (B, T).
            lens: int64 (B,), their lengths.
            prompt: ``tokens`` int64 (P,), ``mel`` (2P, 80) and ``speaker_embedding`` (192,).

        Returns:
            float32 (B, 80, 2T), undefined behind 2 * lens.
        """
        module, batch = self.module, len(tokens)
        spks = module.spk_embed_affine_layer(F.normalize(prompt["speaker_embedding"][None], dim=1))
        tokens = torch.cat([prompt["tokens"].expand(batch, -1), tokens], dim=1)
        lens = lens + len(prompt["tokens"])
        self.token_mask = torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]
        embedded = module.input_embedding(tokens.clamp(min=0)) * self.token_mask[..., None]
        encoded = module.encoder_proj(module.encoder(embedded, lens, streaming=False)[0]).transpose(1, 2)
        given = len(prompt["mel"])
        condition = torch.zeros_like(encoded)
        condition[:, :, :given] = prompt["mel"].T
        mask = self.token_mask.repeat_interleave(MEL_PER_TOKEN, dim=1)[:, None].to(encoded)
        return self.solve(encoded, mask, spks.expand(batch, -1), condition)[:, :, given:].float()

    def solve(self, mu, mask, spks, condition) -> torch.Tensor:
        """Euler steps of conditional flow matching with classifier-free guidance (``ConditionalCFM.solve_euler``)."""
        decoder = self.module.decoder
        rate = decoder.inference_cfg_rate
        x = decoder.rand_noise[:, :, : mu.shape[2]].to(mu).expand_as(mu)
        times = 1 - torch.cos(torch.linspace(0, 1, NUM_STEPS + 1, device=mu.device, dtype=mu.dtype) * 0.5 * torch.pi)
        both = lambda value: torch.cat([value, torch.zeros_like(value)])  # noqa: E731
        masks, mus, speakers, conditions = torch.cat([mask, mask]), both(mu), both(spks), both(condition)
        for t, dt in zip(times[:-1], times.diff(), strict=True):
            change = decoder.estimator(
                torch.cat([x, x]), masks, mus, t.expand(len(masks)), speakers, conditions, streaming=False
            )
            guided, free = change.chunk(2)
            x = x + dt * ((1 + rate) * guided - rate * free)
        return x


class Vocoder:
    """Mel -> waveform with HiFT, in batches."""

    def __init__(self, module: nn.Module):
        self.module, self.masks = module, {}
        self.n_fft, self.hop = module.istft_params["n_fft"], module.istft_params["hop_len"]
        self.ups = [up.stride[0] for up in module.ups]
        self.samples_per_frame = int(np.prod(self.ups)) * self.hop
        self.noise = None
        for part in module.modules():
            if isinstance(part, nn.Conv1d | nn.ConvTranspose1d):
                part.register_forward_pre_hook(lambda _, args: (args[0] * self.masks[args[0].shape[-1]],))
        self.stft = module._stft
        module._stft, module._istft = self.source_spectrum, self.waveform

    def __call__(self, mel: torch.Tensor, lens: torch.Tensor, seed: int) -> torch.Tensor:
        """float32 (B, 80, T) and int64 (B,) frames -> float32 (B, T * samples_per_frame), zeros behind the ends."""
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
        self.masks = {
            size * scale + more: (
                torch.arange(size * scale + more, device=lens.device) < (lens * scale + more)[:, None]
            ).float()[:, None]
            for scale, more in shapes
        }
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

    Raises:
        ValueError: a file is missing, or its weights are not the modules'.
        ImportError: CosyVoice's source is not importable.
    """

    sample_rate_hz = 24_000

    def __init__(self, model_dir: str | Path, device: str = "cpu"):
        self.model_dir, self.device = Path(model_dir), torch.device(device)
        for name in FILES:
            if not (self.model_dir / name).exists():
                raise ValueError(f"{model_dir}: no {name} here: not a CosyVoice2 folder")
        modules = load_modules(self.model_dir)
        self.prompt_mel = modules["feat_extractor"]
        self.flow = Flow(self._with_weights(modules["flow"], "flow.pt"))
        self.vocoder = Vocoder(self._with_weights(modules["hift"], "hift.pt", "generator."))
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

    def prompt_features(self, voice: PromptVoice) -> dict[str, torch.Tensor]:
        """What :class:`Flow` takes of a voice; computed once, then kept."""
        speech = np.ascontiguousarray(voice.prompt_speech_16k, np.float32)
        key = hashlib.sha256(speech.tobytes()).hexdigest()
        if key not in self.prompts:
            mel = self.prompt_mel(torch.from_numpy(resample(speech[None], ASR_HZ, self.sample_rate_hz)))[0].T
            tokens = torch.tensor(voice.prompt_speech_tokens or self.encode([speech])[0])
            count = min(len(mel) // MEL_PER_TOKEN, len(tokens))  # CosyVoiceFrontEnd.frontend_zero_shot
            features = {
                "tokens": tokens[:count], "mel": mel[: MEL_PER_TOKEN * count],
                "speaker_embedding": self.speaker_embedding(speech),
            }  # fmt: skip
            self.prompts[key] = {name: value.to(self.device) for name, value in features.items()}
        return self.prompts[key]

    def speaker_embedding(self, speech: np.ndarray) -> torch.Tensor:
        """CAM++ embedding (192,) of float32 (T,) at 16 kHz (``CosyVoiceFrontEnd._extract_spk_embedding``)."""
        from torchaudio.compliance import kaldi

        features = kaldi.fbank(torch.from_numpy(speech)[None], num_mel_bins=80, dither=0, sample_frequency=ASR_HZ)
        features = features - features.mean(dim=0, keepdim=True)
        return torch.from_numpy(self._run("campplus.onnx", features[None].numpy())).flatten()

    @torch.inference_mode()
    def __call__(self, speech_tokens, prompt_voice=None, seed=0):
        if prompt_voice is None:
            raise ValueError("CosyVoice2 needs a prompt voice: give prompt_audio and prompt_text")
        tokens, lens = pad_speech_tokens(speech_tokens)
        prompt = self.prompt_features(prompt_voice)
        waveforms = self._decode(tokens.to(self.device), lens.to(self.device), prompt, seed)
        return waveforms.cpu(), lens * MEL_PER_TOKEN * self.vocoder.samples_per_frame

    def _decode(self, tokens, lens, prompt, seed) -> torch.Tensor:
        """Waveforms of a batch; of its halves one after the other if the GPU has not the memory for all."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            mel = self.flow(tokens, lens, prompt)
            return self.vocoder(mel, lens * MEL_PER_TOKEN, seed)
        if len(tokens) == 1:
            raise RuntimeError(f"{self.device} has not the memory for one utterance of {int(lens[0])} speech tokens")
        torch.cuda.empty_cache()
        half = len(tokens) // 2
        parts = [self._decode(tokens[part], lens[part], prompt, seed) for part in (slice(half), slice(half, None))]
        return torch.cat(parts)
