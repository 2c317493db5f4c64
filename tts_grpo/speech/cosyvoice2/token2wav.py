"""CosyVoice2's token2wav: runs its flow and HiFT modules on batches, with the same results as for single utterances.

The modules come from https://github.com/FunAudioLLM/CosyVoice (or a package of it), which must be importable. In fp32
the upstream modules run unmodified; half precision uses reimplemented layers (packed_flow.py, kernels.py). Upstream
inference supports one utterance at a time. The effects of padding in a batch are removed as follows:

* flow: the input of the encoder's look-ahead convolution (``PreLookaheadLayer``) is set to zero after the end of each
  utterance; attention and the causal decoder use masks already. Classifier-free guidance runs conditional and
  unconditional halves of the whole batch (``ConditionalCFM.solve_euler`` has buffers for one utterance).
* HiFT: the input of each convolution is set to zero after the end of each utterance, like its own padding; the source
  signal is reflected at the end of each utterance for the short-time Fourier transform, and the inverse transform
  divides by the sum of the windows within the utterance.
* noise: HiFT's source module draws from the global random generator; here, noise is a fixed sequence that depends on
  the seed and is the same for each utterance, so that speech does not depend on the rest of the batch.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from tts_grpo.speech.audio import ASR_HZ, resample
from tts_grpo.speech.decoder import PromptVoice, check_speech_tokens, pad_speech_tokens, tf32
from tts_grpo.speech.model_folders import TOKEN2WAV_FILES, describe, missing_files
from tts_grpo.speech.nets.speaker import campplus_features

NUM_STEPS = 10  # steps of the solver, as in CausalMaskedDiffWithXvec.inference
MEL_PER_TOKEN = 2
# Limits for a batch of encoder and vocoder: utterances, and tokens after padding. A quarter of the tokens needs 2 GiB
# less memory and is 10% slower.
MAX_UTTERANCES = 32
# More than this many utterances are split if padding increases their tokens by more than this factor.
FEW_UTTERANCES, MAX_PADDING = 8, 1.25
PADDED_TOKENS, PADDED_TOKENS_SMALL_GPU = 16384, 4096
SMALL_GPU_GIB = 40
YAML_OBJECTS = ("flow", "hift", "feat_extractor")  # objects of the configuration that are built; plain values are kept
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_modules(model_dir: Path, config_file: str = "cosyvoice2.yaml") -> dict:
    """Build the official ``flow``, ``hift`` and ``feat_extractor`` of a model folder, with random weights.

    Raises:
        ImportError: CosyVoice's source cannot be imported.
    """
    from hyperpyyaml import load_hyperpyyaml

    text = (model_dir / config_file).read_text(encoding="utf-8")
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    kept = [e for e in entries if e.split(":", 1)[0] in YAML_OBJECTS or re.fullmatch(r"\w+:[^!\[{\n]*\n*", e)]
    try:
        return load_hyperpyyaml(io.StringIO("".join(kept)))
    except (ImportError, ModuleNotFoundError) as error:
        raise ImportError(
            f"CosyVoice's modules cannot be imported ({error}): put its source and its third_party/Matcha-TTS on "
            "PYTHONPATH (bash run.sh -1 -1 clones it and run.sh sets the path)"
        ) from error


@functools.cache
def max_padded_tokens(device: torch.device) -> int:
    """Maximum number of tokens in a padded batch on a device."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory >= SMALL_GPU_GIB * 2**30:
        return PADDED_TOKENS
    return PADDED_TOKENS_SMALL_GPU


def split_batch(lens: Sequence[int], max_tokens: int) -> list[slice]:
    """Slices of a batch with at most ``MAX_UTTERANCES`` utterances and ``max_tokens`` tokens after padding.

    A single utterance may be longer than ``max_tokens``. See ``MAX_PADDING``, too.
    """
    slices, first = [], 0
    for end in range(1, len(lens) + 1):
        some = lens[first : end + 1]
        padded = max(some) * (end + 1 - first)
        wasteful = len(some) > FEW_UTTERANCES and padded > MAX_PADDING * sum(some)
        if end in (len(lens), first + MAX_UTTERANCES) or padded > max_tokens or wasteful:
            slices.append(slice(first, end))
            first = end
    return slices


class FixedNoise(TorchFunctionMode):
    """Context in which ``torch.rand`` and ``torch.randn_like`` return the same numbers for each row of a batch.

    The numbers of a shorter row are a prefix of those of a longer one.
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
    """Speech tokens -> mel spectrograms, in batches; the parts that CosyVoice2 and CosyVoice3 have in common.

    Subclasses set ``packed`` to use packed batches, or have ``solve`` for padded ones; both have ``encode``. The padded
    batches of the solver have ``padded_share`` of the tokens that those of the vocoder have.

    Args:
        module: the networks, with ``input_embedding`` and ``spk_embed_affine_layer``.
        noise: float32 (1, 80, L), from which the solver starts.
    """

    packed, padded_share = None, 1.0

    def __init__(self, module: nn.Module, noise: torch.Tensor):
        self.module, self.noise = module, noise.to(module.input_embedding.weight.device)
        steps = torch.linspace(0, 1, NUM_STEPS + 1, device=self.device)
        self.times = 1 - torch.cos(steps * 0.5 * torch.pi)

    @property
    def device(self) -> torch.device:
        return self.module.input_embedding.weight.device

    def __call__(self, speech_tokens: Sequence[Sequence[int]], prompts: Sequence[dict]) -> torch.Tensor:
        """Mel spectrograms of utterances, each of which continues a prompt.

        Args:
            speech_tokens: B sequences of ids.
            prompts: B dictionaries with ``tokens`` (P ids), ``mel`` (2P, 80) and ``speaker_embedding`` (192,).

        Returns:
            float32 (B, 80, 2T), where T is the length of the longest sequence; undefined after each utterance's end.
        """
        tokens, lens = pad_speech_tokens(
            [[*prompt["tokens"], *row] for prompt, row in zip(prompts, speech_tokens, strict=True)]
        )
        mu = torch.cat([
            F.pad(encoded, (0, MEL_PER_TOKEN * tokens.shape[1] - encoded.shape[2]))
            for encoded in self.encode(tokens.to(self.device), lens)
        ])  # fmt: skip
        prompt_mel = pad_sequence([prompt["mel"] for prompt in prompts], batch_first=True).transpose(1, 2)
        condition = F.pad(prompt_mel, (0, mu.shape[2] - prompt_mel.shape[2]))
        embeddings = torch.stack([prompt["speaker_embedding"] for prompt in prompts])
        spks = self.module.spk_embed_affine_layer(F.normalize(embeddings, dim=1))
        if self.packed:
            mel = self.packed(mu, spks, condition, (MEL_PER_TOKEN * lens).tolist())
        else:
            mel = torch.zeros_like(mu)
            limit = int(self.padded_share * max_padded_tokens(self.device))
            for rows in split_batch(lens.tolist(), limit):
                frames = MEL_PER_TOKEN * lens[rows]
                part = (rows, slice(None), slice(int(frames.max())))  # without the padding of longer utterances
                mask = (torch.arange(int(frames.max())) < frames[:, None])[:, None].to(mu)
                mel[part] = self.solve(mu[part], mask, spks[rows], condition[part])
        starts = torch.tensor([len(prompt["mel"]) for prompt in prompts])
        size = MEL_PER_TOKEN * max(map(len, speech_tokens))
        positions = (starts[:, None] + torch.arange(size)).clamp(max=mel.shape[2] - 1).to(self.device)
        return mel.gather(2, positions[:, None].expand(-1, mel.shape[1], -1))

    def encode(self, tokens: torch.Tensor, lens: torch.Tensor) -> Iterable[torch.Tensor]:
        """Encode ids (B, T) with lengths (B,) on the CPU: yields (B', 80, 2T') for consecutive slices of the batch."""
        raise NotImplementedError

    def solve(self, mu, mask, spks, condition) -> torch.Tensor:
        """Mel (B, 80, L) from encoded tokens (B, 80, L), mask (B, 1, L), speakers (B, 80) and prompts (B, 80, L)."""
        raise NotImplementedError


class ConformerFlow(Flow):
    """CosyVoice2's flow.

    Args:
        module: CosyVoice's ``CausalMaskedDiffWithXvec``.
        dtype: data type of the estimator; float32 uses padded batches, float16 and bfloat16 use packed ones.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__(module, module.decoder.rand_noise)
        self.token_mask = None
        module.encoder.pre_lookahead_layer.register_forward_pre_hook(
            lambda _, args: (args[0] * self.token_mask[..., None], *args[1:])
        )
        if dtype != torch.float32:
            from tts_grpo.speech.cosyvoice2.packed_flow import (
                packed_solver,  # needs Triton, which only GPU builds of torch have
            )

            self.packed = packed_solver(module.decoder, self.times, dtype)

    def encode(self, tokens: torch.Tensor, lens: torch.Tensor) -> Iterable[torch.Tensor]:
        """Encode ids (B, T) with lengths (B,) in smaller batches, to limit the memory of attention.

        Yields:
            (B', 80, 2T') for consecutive slices of the batch.
        """
        module = self.module
        for rows in split_batch(lens.tolist(), max_padded_tokens(self.device)):
            slice_lens = lens[rows]
            ids = tokens[rows, : int(slice_lens.max())]
            self.token_mask = (torch.arange(ids.shape[1]) < slice_lens[:, None]).to(self.device)
            embedded = module.input_embedding(ids) * self.token_mask[..., None]
            encoded = module.encoder(embedded, slice_lens.to(self.device), streaming=False)[0]
            yield module.encoder_proj(encoded).transpose(1, 2)

    def solve(self, mu, mask, spks, condition) -> torch.Tensor:
        """Euler steps of conditional flow matching with classifier-free guidance (``ConditionalCFM.solve_euler``)."""
        decoder = self.module.decoder
        rate = decoder.inference_cfg_rate
        x = self.noise[:, :, : mu.shape[2]].expand_as(mu)
        with_zeros = lambda value: torch.cat([value, torch.zeros_like(value)])  # noqa: E731
        masks, mus = torch.cat([mask, mask]), with_zeros(mu)
        speakers, conditions = with_zeros(spks), with_zeros(condition)
        for t, dt in zip(self.times[:-1], self.times.diff(), strict=True):
            velocity = decoder.estimator(
                torch.cat([x, x]), masks, mus, t.expand(len(masks)), speakers, conditions, streaming=False
            )
            conditional, unconditional = velocity.chunk(2)
            x = x + dt * ((1 + rate) * conditional - rate * unconditional)
        return x


class Vocoder:
    """Mel spectrograms -> waveforms with HiFT, in batches.

    Args:
        module: CosyVoice's ``HiFTGenerator``.
        dtype: data type of products in the residual blocks; with float32 the module runs unmodified.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32):
        self.module, self.masks = module, {}
        self.n_fft, self.hop = module.istft_params["n_fft"], module.istft_params["hop_len"]
        self.ups = [up.stride[0] for up in module.ups]
        self.samples_per_frame = int(np.prod(self.ups)) * self.hop
        self.noise = None
        for layer in module.modules():
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                layer.register_forward_pre_hook(lambda _, args: (args[0] * self.masks[args[0].shape[-1]],))
        if dtype != torch.float32:
            from tts_grpo.speech.cosyvoice2.kernels import SnakeResBlock

            for blocks in (module.resblocks, module.source_resblocks):
                for i, block in enumerate(blocks):
                    blocks[i] = SnakeResBlock(block, self.masks, dtype)
        self.stft = module._stft
        module._stft, module._istft = self.source_spectrum, self.waveform

    def __call__(self, mel: torch.Tensor, lens: torch.Tensor, seed: int) -> torch.Tensor:
        """Mel (B, 80, T), lengths int64 (B,) in frames -> float32 (B, T * samples_per_frame), zero after each end."""
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
        """Set masks (B, 1, L) for all time scales of HiFT, by length L."""
        scales = [int(n) for n in np.cumprod([1, *self.ups])]
        shapes = [(scale, 0) for scale in scales] + [(scales[-1], 1)]  # plus one frame for the centred STFT
        self.masks.clear()
        for scale, extra in shapes:
            position = torch.arange(size * scale + extra, device=lens.device)
            self.masks[len(position)] = (position < (lens * scale + extra)[:, None]).float()[:, None]
        self.ends, self.frames = lens * self.samples_per_frame, self.masks[size * scales[-1] + 1]

    def fixed_noise(self, seed: int, length: int) -> FixedNoise:
        """Noise for the source module; cached until a longer one or another seed is needed."""
        if self.noise is None or self.noise[0] != seed or len(self.noise[1].normal) < length:
            device = self.module.conv_post.bias.device
            self.noise = (seed, FixedNoise(seed, 2 * length, self.module.nb_harmonics + 1, device))
        return self.noise[1]

    def source_spectrum(self, source: torch.Tensor):
        """STFT of (B, L) as real and imaginary part; each row is reflected at its own end, as by ``center=True``."""
        return self.stft(reflect(source, self.ends))

    def waveform(self, magnitude: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        return inverse_stft(magnitude, phase, self.frames, self.module.stft_window, self.hop)


def reflect(source: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Continue each row of (B, L) after its end, int64 (B,), with its mirror image, as ``torch.stft`` does."""
    position, ends = torch.arange(source.shape[1], device=source.device), ends[:, None]
    return source.gather(1, torch.where(position < ends, position, 2 * (ends - 1) - position).clamp(min=0))


def inverse_stft(magnitude, phase, used: torch.Tensor, window: torch.Tensor, hop: int) -> torch.Tensor:
    """``HiFTGenerator._istft`` for rows of different lengths: frames after the end are excluded from both sums.

    Args:
        magnitude, phase: (B, n_fft / 2 + 1, F).
        used: float32 (B, 1, F), 0 after the end of each row.
        window: (n_fft,).
        hop: samples per frame.

    Returns:
        float32 (B, (F - 1) * hop).
    """
    window, n_fft = window.to(magnitude.device), len(window)
    spectrum = torch.polar(magnitude.clip(max=1e2).float(), phase.float())
    frames = torch.fft.irfft(spectrum, n_fft, dim=1) * window[:, None] * used
    length = (magnitude.shape[2] - 1) * hop + n_fft
    summed, weight = (
        F.fold(value, (1, length), kernel_size=(1, n_fft), stride=(1, hop))[:, 0, 0]
        for value in (frames, (window**2)[:, None] * used)
    )
    return (summed / weight.clamp(min=1e-11))[:, n_fft // 2 : -(n_fft // 2)]


class CosyVoice2Token2Wav:
    """Decoder and speech tokenizer of a CosyVoice2 model folder (``iic/CosyVoice2-0.5B``), 24 kHz.

    Args:
        model_dir: the model folder.
        device: torch device of flow and vocoder; the networks for prompt features run on the CPU, once per voice.
        precision: "fp32" is equal to the official code in fp32. "fp16" and "bf16" need a GPU: the flow's estimator (on
            packed batches) and the vocoder's residual blocks use half precision, all other layers TF32.
        cache_dir: folder for cached speech tokens and features of recordings; None means ``tts_grpo`` in the user's
            cache folder.

    Raises:
        ValueError: a file is missing, its weights do not match the modules, or half precision is used without a GPU.
        ImportError: CosyVoice's source cannot be imported.
    """

    sample_rate_hz = 24_000
    needs_voice = True
    name, kind = "CosyVoice2", "cosyvoice2"
    config_file, tokenizer_file = "cosyvoice2.yaml", "speech_tokenizer_v2.onnx"

    def __init__(
        self, model_dir: str | Path, device: str = "cpu", precision: str = "fp32", cache_dir: Path | None = None
    ):
        self.model_dir, self.device, self.fast = Path(model_dir), torch.device(device), precision != "fp32"
        self.cache_dir = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tts_grpo"
        if self.fast and self.device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
            raise ValueError(f"precision {precision} needs a GPU: on a CPU, token2wav runs in fp32")
        if missing := missing_files(model_dir, TOKEN2WAV_FILES[self.kind]):
            raise ValueError(f"{model_dir}: not a {self.name} model folder: {describe(missing)} missing")
        with torch.inference_mode(), tf32(self.fast):
            self.prompt_mel, self.flow, self.vocoder = self._load_networks(PRECISIONS[precision])
        self.sessions, self.sessions_lock, self.prompts = {}, threading.Lock(), {}

    def _load_networks(self, dtype: torch.dtype) -> tuple[Callable, Flow, Vocoder]:
        """The function from waveforms (1, T) to mel (1, 80, L) of prompts, the flow and the vocoder."""
        modules = load_modules(self.model_dir)
        flow = ConformerFlow(self._load_weights(modules["flow"], "flow.pt"), dtype)
        vocoder = Vocoder(self._load_weights(modules["hift"], "hift.pt", "generator."), dtype)
        return modules["feat_extractor"], flow, vocoder

    def _load_weights(self, module: nn.Module, name: str, prefix: str = "") -> nn.Module:
        state = torch.load(self.model_dir / name, map_location="cpu", weights_only=True)
        try:
            module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{self.model_dir / name}: {error}") from error
        for layer in module.modules():
            if parametrize.is_parametrized(layer, "weight"):  # else weight normalisation is computed at each call
                parametrize.remove_parametrizations(layer, "weight")
        return module.float().eval().to(self.device)

    def _run_onnx(self, name: str, *inputs: np.ndarray) -> np.ndarray:
        """First output of an ONNX network of the folder."""
        import onnxruntime

        with self.sessions_lock:
            if name not in self.sessions:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = torch.get_num_threads()
                self.sessions[name] = onnxruntime.InferenceSession(
                    str(self.model_dir / name), options, providers=["CPUExecutionProvider"]
                )
        session = self.sessions[name]
        return session.run(None, {i.name: value for i, value in zip(session.get_inputs(), inputs, strict=True)})[0]

    def encode(self, recordings: Sequence[np.ndarray]) -> list[list[int]]:
        """Speech tokens of recordings, each float32 (T,) at 16 kHz and at most 30 s long (the tokenizer's limit).

        They are cached on disk: on a CPU core, the tokenizer of the full size takes seconds per recording.
        """
        from s3tokenizer import log_mel_spectrogram

        def compute(recording: np.ndarray) -> torch.Tensor:
            mel = log_mel_spectrogram(torch.from_numpy(recording), n_mels=128)[None].numpy()
            ids = self._run_onnx(self.tokenizer_file, mel, np.array([mel.shape[2]], np.int32))
            return torch.from_numpy(ids.ravel().astype(int))

        for i, recording in enumerate(recordings):
            if not 0 < len(recording) <= 30 * ASR_HZ:
                seconds = len(recording) / ASR_HZ
                raise ValueError(f"item {i} has {seconds:.1f} s; the speech tokenizer accepts recordings up to 30 s")
        return [self._cached("tokens", recording, compute).tolist() for recording in recordings]

    def prompt_features(self, voice: PromptVoice) -> dict:
        """Prompt features for :class:`Flow`: computed once per voice, cached in memory and on disk."""
        digest = hashlib.sha256(np.ascontiguousarray(voice.prompt_speech_16k, np.float32).tobytes()).hexdigest()
        if digest not in self.prompts:
            features = self._cached("prompt", voice.prompt_speech_16k, self.compute_prompt_features)
            self.prompts[digest] = {
                "tokens": features["tokens"].tolist(), "mel": features["mel"].to(self.device),
                "speaker_embedding": features["speaker_embedding"].to(self.device),
            }  # fmt: skip
        return self.prompts[digest]

    def prepare_voice(self, voice: PromptVoice) -> None:
        self.prompt_features(voice)

    def _cached(self, kind: str, recording: np.ndarray, compute: Callable):
        """``compute(recording)``, from the disk if it is there; ``kind`` is part of the file's name."""
        recording = np.ascontiguousarray(recording, np.float32)
        path = self.cache_dir / f"{kind}_{self.prompt_key}_{hashlib.sha256(recording.tobytes()).hexdigest()}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
            torch.save(compute(recording), tmp)
            tmp.replace(path)
        return torch.load(path, weights_only=True)

    @functools.cached_property
    def prompt_key(self) -> str:
        """Hash of the model files that tokens and features of recordings depend on."""
        digest = hashlib.sha256()
        for name in (self.config_file, "campplus.onnx", self.tokenizer_file):
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
        (features,) = campplus_features(torch.from_numpy(speech)[None], [len(speech)])
        return torch.from_numpy(self._run_onnx("campplus.onnx", features[None].numpy())).flatten()

    def exact(self) -> "CosyVoice2Token2Wav":
        """This decoder in fp32; in half precision another one, which takes 0.5 GiB and is loaded at the first call."""
        return self._exact if self.fast else self

    @functools.cached_property
    def _exact(self) -> "CosyVoice2Token2Wav":
        return type(self)(self.model_dir, str(self.device), "fp32", self.cache_dir)

    @torch.inference_mode()
    def __call__(self, speech_tokens, prompt_voices=None, seed=0):
        check_speech_tokens(speech_tokens)
        if not prompt_voices or None in prompt_voices:
            raise ValueError(f"{self.name} needs a prompt voice for each utterance: pass prompt_audio and prompt_text")
        prompts = [self.prompt_features(voice) for voice in prompt_voices]
        lens = torch.tensor([len(tokens) for tokens in speech_tokens])
        order = lens.argsort().tolist()  # batching similar lengths reduces padding
        size = MEL_PER_TOKEN * self.vocoder.samples_per_frame
        waveforms = torch.zeros(len(lens), size * int(lens.max()), device=self.device)
        with tf32(self.fast):
            decoded = self._decode([speech_tokens[i] for i in order], [prompts[i] for i in order], seed)
        for i, waveform in zip(order, decoded, strict=True):
            waveforms[i, : len(waveform)] = waveform
        return waveforms, lens * size

    def _decode(self, speech_tokens, prompts, seed) -> list[torch.Tensor]:
        """Waveforms of a batch; if the GPU runs out of memory, of its halves one after the other."""
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._vocode(self.flow(speech_tokens, prompts), list(map(len, speech_tokens)), seed)
        if len(speech_tokens) == 1:
            raise MemoryError(
                f"{self.device} is out of memory for a single utterance of {len(speech_tokens[0])} speech tokens: "
                "free GPU memory or lower the maximum response length"
            )
        torch.cuda.empty_cache()
        half = len(speech_tokens) // 2
        halves = (slice(half), slice(half, None))
        return [wave for rows in halves for wave in self._decode(speech_tokens[rows], prompts[rows], seed)]

    def _vocode(self, mel: torch.Tensor, lens: list[int], seed: int) -> list[torch.Tensor]:
        """Waveforms of mel spectrograms (B, 80, 2T) with ``lens`` tokens."""
        waveforms = []
        for rows in split_batch(lens, max_padded_tokens(self.device)):
            frames = MEL_PER_TOKEN * torch.tensor(lens[rows])
            batch = self.vocoder(mel[rows, :, : int(frames.max())], frames, seed)
            ends = (frames * self.vocoder.samples_per_frame).tolist()
            waveforms += [waveform[:end] for waveform, end in zip(batch, ends, strict=True)]
        return waveforms

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the flow's kernels and capture its CUDA graphs. The first batch compiles the vocoder's kernels."""
        if self.flow.packed:
            with tf32(True):
                self.flow.packed.warm_up()
