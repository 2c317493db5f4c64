"""token2wav: decode speech tokens to waveforms with the decoder of a model folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tts_grpo.speech.cosyvoice2.token2wav import CosyVoice2Token2Wav
from tts_grpo.speech.cosyvoice3.token2wav import CosyVoice3Token2Wav
from tts_grpo.speech.decoder import PromptVoice, Token2Wav, decode_finite
from tts_grpo.speech.model_folders import TOKEN2WAV_FILES, token2wav_kind
from tts_grpo.speech.tiny.token2wav import TinyToken2Wav

DECODERS = {"tiny": TinyToken2Wav, "cosyvoice2": CosyVoice2Token2Wav, "cosyvoice3": CosyVoice3Token2Wav}


def load_token2wav(model_dir: str | Path, device: str = "cpu", precision: str = "fp32") -> Token2Wav:
    """Load the decoder of a model folder.

    Args:
        model_dir: the model folder.
        device: torch device.
        precision: fp32, fp16 or bf16, see :class:`tts_grpo.speech.cosyvoice2.token2wav.CosyVoice2Token2Wav`; the tiny
            decoder supports fp32 only.

    Raises:
        ValueError: the folder has no supported decoder, or the decoder does not support the precision.
    """
    kind = token2wav_kind(model_dir)
    if kind is None:
        expected = " or ".join(files[0] for files in TOKEN2WAV_FILES.values())
        raise ValueError(f"{model_dir}: no token2wav model found: expected {expected}")
    return DECODERS[kind](model_dir, device, precision)


def decode(
    token2wav: Token2Wav,
    speech_tokens: Sequence[Sequence[int]],
    voices: Sequence[PromptVoice | None] | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Decode any number of sequences to waveforms, each float32 (T,), in batches of similar length.

    Args:
        speech_tokens: B sequences of ids; an empty one gives an empty waveform.
        voices: a prompt voice, or None, for each sequence.
        seed: random seed of the decoder.

    Raises:
        ValueError: a waveform is not finite, not even in fp32.
    """
    voices = voices or [None] * len(speech_tokens)
    waveforms = [np.zeros(0, np.float32)] * len(speech_tokens)
    order = sorted((i for i, tokens in enumerate(speech_tokens) if tokens), key=lambda i: len(speech_tokens[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        waves, lens, _ = decode_finite(token2wav, [speech_tokens[i] for i in batch], [voices[i] for i in batch], seed)
        for i, wave, length in zip(batch, waves.cpu(), lens, strict=True):
            waveforms[i] = wave[:length].numpy()
    return waveforms
