"""token2wav: speech tokens -> waveform. One interface for the tiny stack and for CosyVoice2.

A decoder is made by :func:`load_token2wav` and called with a batch of token sequences of different lengths and the
voice to speak in. Its result is deterministic for a seed and does not depend on what else is in the batch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file

from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.model_folders import TOKEN2WAV_FILES, token2wav_kind
from tts_grpo.speech.tiny.codec import SAMPLES_PER_TOKEN, FiniteScalarQuantiser, SpeechTokenizer, TokenDecoder
from tts_grpo.text.jsonl import read_jsonl
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS


@dataclasses.dataclass(frozen=True)
class PromptVoice:
    """A recording whose voice is continued.

    Attributes:
        prompt_text: its transcript.
        prompt_speech_16k: float32 (T,), 16 kHz.
        prompt_speech_tokens: its speech tokens.
    """

    prompt_text: str
    prompt_speech_16k: np.ndarray
    prompt_speech_tokens: tuple[int, ...]


class Token2Wav(Protocol):
    """What every decoder offers."""

    sample_rate_hz: int
    needs_voice: bool  # whether each utterance must have a prompt voice

    def encode(self, recordings: Sequence[np.ndarray]) -> list[list[int]]:
        """Speech tokens of recordings, each float32 (T,) at 16 kHz."""

    def warm_up(self) -> None:
        """Do what would make the first batches slow, such as compiling."""

    def __call__(
        self,
        speech_tokens: Sequence[Sequence[int]],
        prompt_voices: Sequence[PromptVoice | None] | None = None,
        seed: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode a batch.

        Args:
            speech_tokens: B sequences of ids in [0, 6561), none empty, lengths may differ.
            prompt_voices: B voices to speak in; None is the decoder's own default.
            seed: of whatever is random in the decoder; the same for each sequence, wherever it stands in the batch.

        Returns:
            waveforms, float32 (B, T) on the decoder's device, zero beyond each length, and their lengths in samples,
            int64 (B,) on the CPU.

        Raises:
            ValueError: a sequence is empty or has an id out of range; the message names the item.
        """


def check_speech_tokens(speech_tokens: Sequence[Sequence[int]]) -> None:
    """Raise a ValueError that names the first sequence a decoder cannot take."""
    for i, tokens in enumerate(speech_tokens):
        if len(tokens) == 0:
            raise ValueError(f"item {i}: no speech tokens")
        if min(tokens) < 0 or max(tokens) >= NUM_SPEECH_TOKENS:
            raise ValueError(f"item {i}: a speech token is not in [0, {NUM_SPEECH_TOKENS})")


def pad_speech_tokens(speech_tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as a decoder computes on them: int64 (B, T), padded with 0, and their lengths, int64 (B,).

    Raises:
        ValueError: a sequence is empty or has an id out of range; the message names the item.
    """
    check_speech_tokens(speech_tokens)
    lens = torch.tensor([len(tokens) for tokens in speech_tokens])
    padded = torch.zeros(len(lens), int(lens.max()), dtype=torch.int64)
    for row, sequence in zip(padded, speech_tokens, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence)
    return padded, lens


class TinyToken2Wav:
    """The tiny stack's decoder: feed-forward, of one speaker, at 16 kHz.

    Nothing in it is random, and its training data has one voice, which every prompt of the stack shares: ``seed``
    and ``prompt_voices`` do not change its result.
    """

    sample_rate_hz = ASR_HZ
    needs_voice = False

    def __init__(self, model_dir: str | Path, device: str = "cpu"):
        self.device = torch.device(device)
        config = json.loads((Path(model_dir) / "config.json").read_text())
        self.tokenizer = SpeechTokenizer(**config["speech_tokenizer"])
        self.decoder = TokenDecoder(**config["token_decoder"])
        for name, module in (("speech_tokenizer", self.tokenizer), ("token_decoder", self.decoder)):
            module.load_state_dict(load_file(Path(model_dir) / f"{name}.safetensors"))
            module.float().eval().to(self.device)

    @torch.inference_mode()
    def encode(self, recordings: Sequence[np.ndarray]) -> list[list[int]]:
        lens = torch.tensor([len(recording) for recording in recordings])
        speech = torch.zeros(len(recordings), int(lens.max()))
        for row, recording in zip(speech, recordings, strict=True):
            row[: len(recording)] = torch.as_tensor(recording)
        with torch.backends.cudnn.flags(allow_tf32=False):
            tokens, token_lens = self.tokenizer.encode(speech.to(self.device), lens.to(self.device))
        return [row[:n].tolist() for row, n in zip(tokens, token_lens, strict=True)]

    @torch.inference_mode()
    def __call__(self, speech_tokens, prompt_voices=None, seed=0):
        tokens, lens = pad_speech_tokens(speech_tokens)
        with torch.backends.cudnn.flags(allow_tf32=False):
            digits = FiniteScalarQuantiser.to_digits(tokens.to(self.device))
            waveforms = self.decoder(digits, lens.to(self.device))
        return waveforms, lens * SAMPLES_PER_TOKEN

    def warm_up(self) -> None:
        """Nothing is compiled here."""


def load_token2wav(model_dir: str | Path, device: str = "cpu", precision: str = "fp32") -> Token2Wav:
    """The decoder that a folder holds.

    Args:
        model_dir: the folder.
        device: torch device.
        precision: fp32, fp16 or bf16, see :class:`tts_grpo.speech.cosyvoice2.token2wav.CosyVoice2Token2Wav`; the tiny one is fp32.

    Raises:
        ValueError: the folder holds none that is known.
    """
    kind = token2wav_kind(model_dir)
    if kind == "tiny":
        if precision != "fp32":
            raise ValueError(f"{model_dir}: the tiny token2wav has no precision {precision}: use fp32")
        return TinyToken2Wav(model_dir, device)
    if kind == "cosyvoice2":
        from tts_grpo.speech.cosyvoice2.token2wav import CosyVoice2Token2Wav

        return CosyVoice2Token2Wav(model_dir, device, precision)
    marks = " or ".join(files[0] for files in TOKEN2WAV_FILES.values())
    raise ValueError(f"{model_dir}: no token2wav here (expected {marks})")


def check_finite(waveforms: torch.Tensor) -> None:
    """Raises ValueError if decoded speech is no sound."""
    if not waveforms.isfinite().all():
        raise ValueError("the decoded speech is not finite: half precision may be too narrow, use bf16 or fp32")


def decode(
    token2wav: Token2Wav,
    speech_tokens: Sequence[Sequence[int]],
    voices: Sequence[PromptVoice | None] | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Waveforms of any number of sequences, each float32 (T,), decoded in batches of like lengths.

    Args:
        speech_tokens: B sequences of ids; an empty one gives an empty waveform.
        voices: a prompt voice, or None, for each sequence.
        seed: of the decoder.

    Raises:
        ValueError: a waveform is not finite.
    """
    voices = voices or [None] * len(speech_tokens)
    waveforms = [np.zeros(0, np.float32)] * len(speech_tokens)
    chosen = sorted((i for i, tokens in enumerate(speech_tokens) if tokens), key=lambda i: len(speech_tokens[i]))
    for first in range(0, len(chosen), batch_size):
        batch = chosen[first : first + batch_size]
        waves, lens = token2wav([speech_tokens[i] for i in batch], [voices[i] for i in batch], seed)
        check_finite(waves)
        for i, wave, length in zip(batch, waves.cpu(), lens, strict=True):
            waveforms[i] = wave[:length].numpy()
    return waveforms


def load_prompt_voice(token2wav: Token2Wav, audio_path: str | Path, prompt_text: str) -> PromptVoice:
    """The voice of a recording, with its speech tokens."""
    speech = load_audio(audio_path)
    return PromptVoice(prompt_text, speech, tuple(token2wav.encode([speech])[0]))


def load_prompt_voices(token2wav: Token2Wav, path: str | Path) -> list[PromptVoice]:
    """The voices of a JSONL of ``prompt_text`` and ``prompt_audio`` (a path, relative to the list's folder).

    Raises:
        ValueError: a line lacks one of them, or there is no line.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not row.get("prompt_text") or not row.get("prompt_audio"):
            raise ValueError(f"{path}, line {number}: needs prompt_text and prompt_audio")
    if not rows:
        raise ValueError(f"{path}: no voice")
    return [load_prompt_voice(token2wav, Path(path).parent / r["prompt_audio"], r["prompt_text"]) for r in rows]


def choose_voice(voices: Sequence[PromptVoice], key: str, seed: int = 0) -> PromptVoice | None:
    """One of the voices, always the same for a key and a seed; None if there are none."""
    if not voices:
        return None
    return voices[int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big") % len(voices)]
