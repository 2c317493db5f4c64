"""Whisper, with faster-whisper."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.asr.recogniser import MIN_SAMPLES
from tts_grpo.speech.audio import ASR_HZ

PROMPTS = {"zh": "以下是普通话的句子。"}  # without it, Whisper also writes traditional characters
TOKENS_PER_S = 16  # Chinese has about 5 syllables per second, and up to 3 tokens per character


class Whisper:
    """A Whisper model in CTranslate2's format, run by faster-whisper with greedy decoding and a fixed language.

    Args:
        model_dir: folder with model.bin, config.json, tokenizer.json and preprocessor_config.json.
        device: "cpu", "cuda" or "cuda:N".
        language: language of recordings without one of their own.

    Raises:
        ValueError: a file is missing (faster-whisper would download the tokenizer, or guess the number of mel bands),
            or the model knows English only and the language is another one.
        RuntimeError: weights do not match the model; CTranslate2's message names them.
    """

    def __init__(self, model_dir: str | Path, device: str = "cpu", language: str = "en"):
        from faster_whisper import WhisperModel

        folder = Path(model_dir)
        for name in ("model.bin", "config.json", "tokenizer.json", "preprocessor_config.json"):
            if not (folder / name).exists():
                raise ValueError(f"{folder}: not a faster-whisper model folder: {name} is missing")
        kind, _, index = device.partition(":")
        self.model_dir, self.language = folder, language
        self._model = WhisperModel(
            str(folder), device=kind, device_index=int(index or 0), cpu_threads=torch.get_num_threads(),
            compute_type="float16" if kind == "cuda" else "float32", local_files_only=True,
        )  # fmt: skip
        bands = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8")).get("feature_size", 80)
        if bands != self._model.model.n_mels:
            raise ValueError(
                f"{folder}: preprocessor_config.json has {bands} mel bands, but model.bin {self._model.model.n_mels}"
            )
        self._check(language)

    def _check(self, language: str) -> None:
        known = self._model.supported_languages
        if language not in known:  # faster-whisper would transcribe in English, with a warning
            raise ValueError(f"{self.model_dir}: no language {language!r}: this Whisper knows {', '.join(known)}")

    def transcribe(self, recordings: Sequence[np.ndarray], languages: Sequence[str] | None = None) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz; "" if shorter than one analysis frame."""
        languages = languages or [self.language] * len(recordings)
        for language in set(languages):
            self._check(language)
        return [
            self._transcribe(np.asarray(r, dtype=np.float32), language) if len(r) >= MIN_SAMPLES else ""
            for r, language in zip(recordings, languages, strict=True)
        ]

    def _transcribe(self, recording: np.ndarray, language: str) -> str:
        # A single temperature disables the fallback, which samples without a seed. The limit, above any speech rate,
        # ends loops of the same words early.
        segments, _ = self._model.transcribe(
            recording, language=language, beam_size=1, temperature=0.0, condition_on_previous_text=False,
            without_timestamps=True, initial_prompt=PROMPTS.get(language),
            max_new_tokens=min(200, 10 + int(TOKENS_PER_S * len(recording) / ASR_HZ)),
        )  # fmt: skip
        return "".join(segment.text for segment in segments).strip()
