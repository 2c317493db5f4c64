"""The tiny stack's token2wav, with the weights that ``tiny_stack/`` trains."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.decoder import pad_speech_tokens
from tts_grpo.speech.tiny.codec import SAMPLES_PER_TOKEN, FiniteScalarQuantiser, SpeechTokenizer, TokenDecoder


class TinyToken2Wav:
    """The tiny stack's decoder: feed-forward, one speaker, 16 kHz.

    It is deterministic, and its training data has one voice, which is also that of all prompts of the tiny stack.
    Therefore ``seed`` and ``prompt_voices`` have no effect.

    Raises:
        ValueError: ``precision`` is not fp32.
    """

    sample_rate_hz = ASR_HZ
    needs_voice = False

    def __init__(self, model_dir: str | Path, device: str = "cpu", precision: str = "fp32"):
        if precision != "fp32":
            raise ValueError(f"{model_dir}: the tiny token2wav does not support the precision {precision}: use fp32")
        self.device = torch.device(device)
        config = json.loads((Path(model_dir) / "config.json").read_text())
        self.tokenizer = SpeechTokenizer(**config["speech_tokenizer"])
        self.decoder = TokenDecoder(**config["token_decoder"])
        for name, module in (("speech_tokenizer", self.tokenizer), ("token_decoder", self.decoder)):
            module.load_state_dict(load_file(Path(model_dir) / f"{name}.safetensors"))
            module.float().eval().to(self.device)

    def exact(self) -> "TinyToken2Wav":
        return self

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

    def prepare_voice(self, voice) -> None:
        """Nothing to do: this decoder ignores the voice."""

    def warm_up(self) -> None:
        """Nothing to do: this decoder is not compiled."""
