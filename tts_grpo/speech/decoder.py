"""The interface of token2wav decoders, and the checks that they share.

A decoder is called with a batch of speech-token sequences of different lengths and one prompt voice per sequence. Its
result is deterministic for a seed and does not depend on the rest of the batch. The decoders are in
``tiny``, ``cosyvoice2`` and ``cosyvoice3``; ``token2wav.py`` loads the one that is in a model folder.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from tts_grpo.text.tokens import NUM_SPEECH_TOKENS


@dataclasses.dataclass(frozen=True)
class PromptVoice:
    """A recording whose voice the decoder continues.

    Attributes:
        prompt_text: transcript of the recording.
        prompt_speech_16k: float32 (T,), 16 kHz.
        prompt_speech_tokens: speech tokens of the recording.
    """

    prompt_text: str
    prompt_speech_16k: np.ndarray
    prompt_speech_tokens: tuple[int, ...]


class Token2Wav(Protocol):
    """The interface of all decoders."""

    sample_rate_hz: int
    needs_voice: bool  # whether every utterance must have a prompt voice

    def encode(self, recordings: Sequence[np.ndarray]) -> list[list[int]]:
        """Speech tokens of recordings, each float32 (T,) at 16 kHz."""

    def prepare_voice(self, voice: PromptVoice) -> None:
        """Do the work that decoding with a voice for the first time would do; threads may do it at the same time."""

    def warm_up(self) -> None:
        """Do one-time work that would slow down the first batches, such as compiling."""

    def exact(self) -> "Token2Wav":
        """The same decoder in fp32: itself, or loaded at the first call if this one uses half precision."""

    def __call__(
        self,
        speech_tokens: Sequence[Sequence[int]],
        prompt_voices: Sequence[PromptVoice | None] | None = None,
        seed: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode a batch.

        Args:
            speech_tokens: B sequences of ids in [0, 6561), none empty, lengths may differ.
            prompt_voices: B prompt voices; None means the decoder's default voice.
            seed: random seed of the decoder; it is used for each sequence, independently of its place in the batch.

        Returns:
            Waveforms, float32 (B, T) on the decoder's device, with zeros after each end, and their lengths in samples,
            int64 (B,) on the CPU.

        Raises:
            ValueError: a sequence is empty or has an id out of range; the message names the item.
            MemoryError: the device has too little free memory for one of the sequences, even alone.
        """


def check_speech_tokens(speech_tokens: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if a sequence is empty or has an id out of range; the message names the first such item."""
    for i, tokens in enumerate(speech_tokens):
        if len(tokens) == 0:
            raise ValueError(f"item {i}: no speech tokens")
        if min(tokens) < 0 or max(tokens) >= NUM_SPEECH_TOKENS:
            raise ValueError(f"item {i}: a speech token is not in [0, {NUM_SPEECH_TOKENS})")


def pad_speech_tokens(speech_tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences with 0 to int64 (B, T); also returns their lengths, int64 (B,).

    Raises:
        ValueError: a sequence is empty or has an id out of range; the message names the item.
    """
    check_speech_tokens(speech_tokens)
    lens = torch.tensor([len(tokens) for tokens in speech_tokens])
    padded = torch.zeros(len(lens), int(lens.max()), dtype=torch.int64)
    for row, sequence in zip(padded, speech_tokens, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence)
    return padded, lens


def decode_finite(
    token2wav: Token2Wav, speech_tokens: Sequence[Sequence[int]], prompt_voices=None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Decode a batch; sequences whose speech is not finite in half precision are decoded again in fp32.

    Args and the first two results are those of :class:`Token2Wav`; the third has the indices that were decoded again.

    Raises:
        ValueError: the speech of a sequence has NaN or infinite samples in fp32, too.
    """
    waveforms, lens = token2wav(speech_tokens, prompt_voices, seed)
    again = (~waveforms.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if not again:
        return waveforms, lens, again
    exact = token2wav.exact()
    waveforms = waveforms.clone()
    if exact is not token2wav:
        voices = prompt_voices and [prompt_voices[i] for i in again]
        decoded, _ = exact([speech_tokens[i] for i in again], voices, seed)
        waveforms[again] = 0.0
        waveforms[again, : decoded.shape[1]] = decoded
    if not (finite := waveforms[again].isfinite().all(dim=1)).all():
        raise ValueError(f"item {again[finite.tolist().index(False)]}: the decoded speech is not finite in fp32")
    return waveforms, lens, again


@contextlib.contextmanager
def tf32(allowed: bool):
    """Context that allows or forbids TF32 for products of float32 matrices."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
