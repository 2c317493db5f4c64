"""From speech tokens to reward: token2wav, 16 kHz, recogniser, error rate of spoken units, curve."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from tts_grpo.reward.curves import reward
from tts_grpo.reward.protocol import RolloutScore
from tts_grpo.speech.asr.recogniser import Heard
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, resample_batch
from tts_grpo.speech.decoder import PromptVoice, Token2Wav, check_finite
from tts_grpo.speech.voices import choose_voice
from tts_grpo.text.errors import align_sentences, locate_errors
from tts_grpo.text.tokens import TOKEN_HZ, format_speech_tokens
from tts_grpo.text.units import Sentence, sentence

ONSET_DELAY_S = 0.04  # from a syllable's first speech token to the frame at which a CTC recogniser names it


@dataclasses.dataclass(frozen=True)
class SampleSpeech:
    """One sample's speech, int16 (T,); ``error`` says why there is none, and is empty otherwise."""

    waveform: np.ndarray
    sample_rate_hz: int
    error: str = ""


class RewardScorer:
    """Scores batches of rollouts.

    Args:
        token2wav: speech tokens -> waveform.
        asr: recogniser.
        tones: whether tones count.
        curve: see :func:`tts_grpo.reward.curves.reward`.
        prompt_voices: what the rollouts are spoken in, one of them each.
        seed: of the choice of one.
        voice_per: "text" chooses by ground truth, so that the rollouts of a group, which are compared with each other,
            have the same voice; "rollout" by ground truth and speech tokens, so that each has its own, the same
            whenever it is scored.
        language: of the texts, see :func:`tts_grpo.text.spoken.spoken_form`.

    Attributes:
        seconds: time spent so far in ``token2wav``, ``asr`` and ``text``.
    """

    def __init__(self, token2wav: Token2Wav, asr: SenseVoice, tones: bool = True, curve: str = "tanh",
                 prompt_voices: Sequence[PromptVoice] = (), seed: int = 0, voice_per: str = "text",
                 language: str = "zh"):  # fmt: skip
        self.token2wav, self.asr, self.curve, self.language = token2wav, asr, curve, language
        self.match = "toned" if tones else "toneless"
        self.prompt_voices, self.seed, self.voice_per = prompt_voices, seed, voice_per
        self.seconds = {"token2wav": 0.0, "asr": 0.0, "text": 0.0}

    def score(self, speech_tokens: Sequence[Sequence[int]], ground_truths: Sequence[str]) -> list[RolloutScore]:
        """Score samples together; if that fails, one by one, so that one bad sample is one error.

        Args:
            speech_tokens: B sequences of ids.
            ground_truths: B texts.
        """
        try:
            return self._score(speech_tokens, ground_truths)
        except Exception as error:
            if len(speech_tokens) == 1:
                return [RolloutScore(error=f"{type(error).__name__}: {error}")]
            pairs = zip(speech_tokens, ground_truths, strict=True)
            return [self.score([tokens], [text])[0] for tokens, text in pairs]

    def _score(self, speech_tokens, ground_truths) -> list[RolloutScore]:
        references = [sentence(text, self.language) for text in ground_truths]
        for reference in references:
            if not reference.units:
                raise ValueError(f"the ground truth {reference.raw!r} has no word")
        voices = [self._voice(*pair) for pair in zip(ground_truths, speech_tokens, strict=True)]
        heard = self.hear(speech_tokens, voices)
        start = time.perf_counter()
        scores = [
            self._compare(reference, one, len(tokens) / TOKEN_HZ)
            for reference, one, tokens in zip(references, heard, speech_tokens, strict=True)
        ]
        self.seconds["text"] += time.perf_counter() - start
        return scores

    def _voice(self, ground_truth: str, speech_tokens: Sequence[int]) -> PromptVoice | None:
        key = ground_truth if self.voice_per == "text" else f"{ground_truth}/{format_speech_tokens(speech_tokens)}"
        return choose_voice(self.prompt_voices, key, self.seed)

    def _compare(self, reference: Sentence, heard: Heard, duration_s: float) -> RolloutScore:
        alignment = align_sentences(reference, sentence(heard.text, self.language), self.match)
        errors, onsets_s = locate_errors(alignment, heard.onsets_s, duration_s)
        starts = tuple(max(0, round((onset_s - ONSET_DELAY_S) * TOKEN_HZ)) for onset_s in onsets_s)
        error_rate = sum(errors) / len(errors)
        return RolloutScore(reward(error_rate, self.curve), error_rate, heard.text, tuple(errors), starts)

    def speak(self, speech_tokens: Sequence[Sequence[int]]) -> list[SampleSpeech]:
        """The speech that samples are scored by, one by one: for listening, where no speed is needed."""
        said, rate = [], self.token2wav.sample_rate_hz
        voice = choose_voice(self.prompt_voices, "", self.seed)
        for tokens in speech_tokens:
            try:
                waveforms, lens = self.token2wav([tokens], [voice])
                check_finite(waveforms)
                samples = np.round(np.clip(waveforms[0, : lens[0]].cpu().numpy(), -1, 1) * 32767).astype(np.int16)
                said.append(SampleSpeech(samples, rate))
            except Exception as error:
                said.append(SampleSpeech(np.zeros(0, np.int16), rate, f"{type(error).__name__}: {error}"))
        return said

    def hear(self, speech_tokens: Sequence[Sequence[int]], voices=None) -> list[Heard]:
        """What the recogniser hears of speech tokens, each spoken in its voice."""
        start = time.perf_counter()
        waveforms, lens = self.token2wav(speech_tokens, voices)
        waveforms = resample_batch(waveforms, self.token2wav.sample_rate_hz, ASR_HZ)
        lens = (lens * ASR_HZ // self.token2wav.sample_rate_hz).tolist()
        check_finite(waveforms)  # waits for the decoder too, so that its time is not counted as the other's
        decoded = time.perf_counter()
        heard = self.asr.hear([wave[:n] for wave, n in zip(waveforms, lens, strict=True)])
        self.seconds["token2wav"] += decoded - start
        self.seconds["asr"] += time.perf_counter() - decoded
        return heard
