"""Load prompt voices from recordings, and choose one for an utterance."""

from collections.abc import Sequence
from pathlib import Path

from tts_grpo.speech.audio import load_audio
from tts_grpo.speech.decoder import PromptVoice, Token2Wav
from tts_grpo.text.input_files import read_voices
from tts_grpo.text.prompts import choose


def load_prompt_voice(token2wav: Token2Wav, audio_path: str | Path, prompt_text: str) -> PromptVoice:
    """Load a recording and encode it as a prompt voice.

    Raises:
        ValueError: the file is no audio, or its speech tokens cannot be computed: it is empty, or longer than the
            tokenizer accepts. The message names the file.
    """
    speech = load_audio(audio_path)
    try:
        return PromptVoice(prompt_text, speech, tuple(token2wav.encode([speech])[0]))
    except ValueError as error:
        raise ValueError(f"{audio_path}: {error}") from error


def load_prompt_voices(token2wav: Token2Wav, path: str | Path) -> list[PromptVoice]:
    """Load the voices of a JSONL file with ``prompt_text`` and ``prompt_audio`` (a path relative to the file's folder).

    Raises:
        ValueError: a line lacks one of them, a recording is missing or no audio, or there is no line.
        OSError: the list cannot be opened.
    """
    rows = read_voices(path)
    return [load_prompt_voice(token2wav, Path(path).parent / r["prompt_audio"], r["prompt_text"]) for r in rows]


def choose_voice(voices: Sequence[PromptVoice], key: str, seed: int = 0) -> PromptVoice | None:
    """A voice that is determined by ``key`` and ``seed``; None if ``voices`` is empty."""
    return choose(voices, key, seed)
