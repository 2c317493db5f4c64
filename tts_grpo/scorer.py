"""From speech tokens to reward: token2wav, 16 kHz, recogniser, pinyin error rate, curve."""

import dataclasses
import functools
import time
from collections.abc import Sequence

import numpy as np

from tts_grpo.asr import SenseVoice
from tts_grpo.audio import ASR_HZ, resample
from tts_grpo.metrics import count_errors, reward
from tts_grpo.text import pinyin
from tts_grpo.token2wav import PromptVoice, Token2Wav


@dataclasses.dataclass(frozen=True)
class SampleScore:
    """One sample's score; ``error`` says why there is none, and is empty otherwise."""

    reward: float = float("nan")
    error_rate: float = float("nan")
    transcript: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class SampleSpeech:
    """One sample's speech, int16 (T,); ``error`` says why there is none, and is empty otherwise."""

    waveform: np.ndarray
    sample_rate_hz: int
    error: str = ""


@functools.lru_cache(maxsize=65536)
def reference_pinyin(ground_truth: str, tones: bool) -> tuple[str, ...]:
    """Pinyin of a ground truth: the same one comes once a rollout of its group and once an epoch."""
    return tuple(pinyin(ground_truth, tones))


class RewardScorer:
    """Scores batches of rollouts.

    Attributes:
        seconds: time spent so far in ``token2wav``, ``asr`` and ``text``.
    """

    def __init__(self, token2wav: Token2Wav, asr: SenseVoice, tones: bool = True, curve: str = "tanh",
                 prompt_voice: PromptVoice | None = None):  # fmt: skip
        self.token2wav, self.asr, self.tones, self.curve = token2wav, asr, tones, curve
        self.prompt_voice = prompt_voice
        self.seconds = {"token2wav": 0.0, "asr": 0.0, "text": 0.0}

    def score(self, speech_tokens: Sequence[Sequence[int]], ground_truths: Sequence[str]) -> list[SampleScore]:
        """Score samples together; if that fails, one by one, so that one bad sample is one error.

        Args:
            speech_tokens: B sequences of ids.
            ground_truths: B texts.
        """
        try:
            return self._score(speech_tokens, ground_truths)
        except Exception as error:
            if len(speech_tokens) == 1:
                return [SampleScore(error=f"{type(error).__name__}: {error}")]
            pairs = zip(speech_tokens, ground_truths, strict=True)
            return [self.score([tokens], [text])[0] for tokens, text in pairs]

    def _score(self, speech_tokens, ground_truths) -> list[SampleScore]:
        references = [reference_pinyin(text, self.tones) for text in ground_truths]
        for text, reference in zip(ground_truths, references, strict=True):
            if not reference:
                raise ValueError(f"the ground truth {text!r} has no word")
        transcripts = self.transcribe(speech_tokens)
        start = time.perf_counter()
        scores = []
        for reference, transcript in zip(references, transcripts, strict=True):
            error_rate = count_errors(reference, pinyin(transcript, self.tones)).rate
            scores.append(SampleScore(reward(error_rate, self.curve), error_rate, transcript))
        self.seconds["text"] += time.perf_counter() - start
        return scores

    def speak(self, speech_tokens: Sequence[Sequence[int]]) -> list[SampleSpeech]:
        """The speech that samples are scored by, one by one: for listening, where no speed is needed."""
        said, rate = [], self.token2wav.sample_rate_hz
        for tokens in speech_tokens:
            try:
                waveforms, lens = self.token2wav([tokens], self.prompt_voice)
                samples = np.round(np.clip(waveforms[0, : lens[0]].numpy(), -1, 1) * 32767).astype(np.int16)
                said.append(SampleSpeech(samples, rate))
            except Exception as error:
                said.append(SampleSpeech(np.zeros(0, np.int16), rate, f"{type(error).__name__}: {error}"))
        return said

    def transcribe(self, speech_tokens: Sequence[Sequence[int]]) -> list[str]:
        """What the recogniser hears of speech tokens."""
        start = time.perf_counter()
        waveforms, lens = self.token2wav(speech_tokens, self.prompt_voice)
        waveforms = resample(waveforms.numpy(), self.token2wav.sample_rate_hz, ASR_HZ)
        lens = (lens * ASR_HZ // self.token2wav.sample_rate_hz).tolist()
        decoded = time.perf_counter()
        recordings: list[np.ndarray] = [wave[:n] for wave, n in zip(waveforms, lens, strict=True)]
        transcripts = self.asr.transcribe(recordings)
        self.seconds["token2wav"] += decoded - start
        self.seconds["asr"] += time.perf_counter() - decoded
        return transcripts
