"""What every token2wav decoder offers and takes, and the checks that decoders share.

A decoder is called with a batch of speech-token sequences of different lengths and the voices to speak in. Its result
is deterministic for a seed and does not depend on what else is in the batch. The decoders are in ``tiny/token2wav.py``
and ``cosyvoice2/token2wav.py``; ``token2wav.py`` loads the one that a folder holds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

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


def check_finite(waveforms: torch.Tensor) -> None:
    """Raises ValueError if decoded speech is no sound."""
    if not waveforms.isfinite().all():
        raise ValueError("the decoded speech is not finite: half precision may be too narrow, use bf16 or fp32")
