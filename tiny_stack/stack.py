"""The tiny stack as a whole: sentences to speech to transcripts, for its check, its headroom and its export."""

import dataclasses
from collections.abc import Sequence

from tqdm import tqdm

from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.decoder import Token2Wav
from tts_grpo.speech.generation import Sampling, generate_speech_tokens
from tts_grpo.speech.token2wav import decode
from tts_grpo.text.errors import pinyin_error_rate, pinyin_errors
from tts_grpo.text.prompts import render_prompt

MAX_NEW_TOKENS = 300
CHUNK = 64  # texts whose samples are in memory at once


@dataclasses.dataclass(frozen=True)
class Spoken:
    """One sentence as the language model said it and a recogniser heard it."""

    text: str
    speech_tokens: list[int]
    finish_reason: str
    transcript: str

    @property
    def error_rate(self) -> float:
        """Toneless pinyin error rate."""
        return pinyin_errors(self.text, self.transcript, tones=False).rate


def speak(
    lm,
    token2wav: Token2Wav,
    asr: SenseVoice,
    texts: Sequence[str],
    temperature: float,
    first_seed: int,
    batch: int = 64,
) -> list[Spoken]:
    """Say each text with a seed of its own (``first_seed`` and up) and write down what is heard."""
    model, tokenizer = lm
    prompts = [render_prompt(tokenizer, text) for text in texts]
    seeds = range(first_seed, first_seed + len(texts))
    sampling = Sampling(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
    said = generate_speech_tokens(model, tokenizer, prompts, seeds, sampling, batch)
    heard = asr.transcribe(decode(token2wav, [utterance.speech_tokens for utterance in said]))
    return [Spoken(t, u.speech_tokens, u.finish_reason, h) for t, u, h in zip(texts, said, heard, strict=True)]


def speak_groups(
    lm, token2wav: Token2Wav, asr: SenseVoice, texts: Sequence[str], num_samples: int, temperature: float, seed: int
) -> list[list[Spoken]]:
    """``num_samples`` samples of each text, as GRPO draws them; ``seed`` is that of the first, the others follow."""
    groups = []
    for first in tqdm(range(0, len(texts), CHUNK), unit=f"{CHUNK} texts", disable=len(texts) <= CHUNK):
        repeated = [text for text in texts[first : first + CHUNK] for _ in range(num_samples)]
        spoken = speak(lm, token2wav, asr, repeated, temperature, seed + first * num_samples, batch=256)
        groups += [spoken[i : i + num_samples] for i in range(0, len(spoken), num_samples)]
    return groups


def overall_error(spoken: Sequence[Spoken]) -> float:
    """Total toneless syllable errors over total syllables."""
    return pinyin_error_rate([s.text for s in spoken], [s.transcript for s in spoken], tones=False)
