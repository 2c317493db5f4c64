"""Synthesise sentences with the tiny stack and transcribe the speech, for its check, headroom and export scripts."""

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
CHUNK = 64  # texts per chunk: limits the audio that is in memory at once


@dataclasses.dataclass(frozen=True)
class TranscribedSample:
    """One sample of the language model for a sentence, with the recogniser's transcript of its speech."""

    text: str
    speech_tokens: list[int]
    finish_reason: str
    transcript: str

    @property
    def error_rate(self) -> float:
        """Toneless pinyin error rate."""
        return pinyin_errors(self.text, self.transcript, tones=False).rate


def synthesise_and_transcribe(
    lm,
    token2wav: Token2Wav,
    asr: SenseVoice,
    texts: Sequence[str],
    temperature: float,
    first_seed: int,
    batch: int = 64,
) -> list[TranscribedSample]:
    """Synthesise and transcribe each text, the i-th with the seed ``first_seed + i``."""
    model, tokenizer = lm
    prompts = [render_prompt(tokenizer, text) for text in texts]
    seeds = range(first_seed, first_seed + len(texts))
    sampling = Sampling(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
    utterances = generate_speech_tokens(model, tokenizer, prompts, seeds, sampling, batch)
    transcripts = asr.transcribe(decode(token2wav, [utterance.speech_tokens for utterance in utterances]))
    return [
        TranscribedSample(text, utterance.speech_tokens, utterance.finish_reason, transcript)
        for text, utterance, transcript in zip(texts, utterances, transcripts, strict=True)
    ]


def sample_groups(
    lm, token2wav: Token2Wav, asr: SenseVoice, texts: Sequence[str], num_samples: int, temperature: float, seed: int
) -> list[list[TranscribedSample]]:
    """``num_samples`` samples of each text, as in a GRPO group; seeds count up from ``seed``."""
    groups = []
    for first in tqdm(range(0, len(texts), CHUNK), unit=f"{CHUNK} texts", disable=len(texts) <= CHUNK):
        repeated = [text for text in texts[first : first + CHUNK] for _ in range(num_samples)]
        samples = synthesise_and_transcribe(
            lm, token2wav, asr, repeated, temperature, seed + first * num_samples, batch=256
        )
        groups += [samples[i : i + num_samples] for i in range(0, len(samples), num_samples)]
    return groups


def corpus_error_rate(samples: Sequence[TranscribedSample]) -> float:
    """Toneless pinyin error rate: total syllable errors over total syllables."""
    return pinyin_error_rate([s.text for s in samples], [s.transcript for s in samples], tones=False)
