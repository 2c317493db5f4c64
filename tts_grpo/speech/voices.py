"""Load prompt voices from recordings, and choose one for an utterance."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tts_grpo.speech.audio import load_audio
from tts_grpo.speech.decoder import PromptVoice, Token2Wav
from tts_grpo.text.jsonl import read_jsonl


def load_prompt_voice(token2wav: Token2Wav, audio_path: str | Path, prompt_text: str) -> PromptVoice:
    """Load a recording and encode it as a prompt voice."""
    speech = load_audio(audio_path)
    return PromptVoice(prompt_text, speech, tuple(token2wav.encode([speech])[0]))


def load_prompt_voices(token2wav: Token2Wav, path: str | Path) -> list[PromptVoice]:
    """Load the voices of a JSONL file with ``prompt_text`` and ``prompt_audio`` (a path relative to the file's folder).

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
    """A voice that is determined by ``key`` and ``seed``; None if ``voices`` is empty."""
    if not voices:
        return None
    return voices[int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big") % len(voices)]
