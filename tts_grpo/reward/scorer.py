"""Compute rewards from speech tokens: token2wav, resampling to 16 kHz, ASR, error rate, reward curve."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch

from tts_grpo.reward.curves import reward
from tts_grpo.reward.protocol import RolloutScore
from tts_grpo.speech.asr.recogniser import Transcript
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, resample_batch
from tts_grpo.speech.decoder import PromptVoice, Token2Wav, decode_finite
from tts_grpo.speech.voices import choose_voice
from tts_grpo.text.errors import align_sentences, locate_errors
from tts_grpo.text.tokens import TOKEN_HZ, format_speech_tokens
from tts_grpo.text.units import Sentence, sentence

# Faults of the machine, which other programs may have caused, and not of a sample: too little memory (of a GPU, too: it
# is a RuntimeError), and torch's errors of CUDA, cuBLAS and cuDNN. A wrong sample raises ValueError.
MACHINE_FAULTS = (MemoryError, OSError, RuntimeError)
ONSET_DELAY_S = 0.04  # delay from a syllable's first speech token to the frame of its CTC label


@dataclasses.dataclass(frozen=True)
class SampleSpeech:
    """One sample's waveform, int16 (T,); ``error`` is empty, or says why the sample has no speech."""

    waveform: np.ndarray
    sample_rate_hz: int
    error: str = ""


class RewardScorer:
    """Scores batches of rollouts.

    Args:
        token2wav: decoder from speech tokens to waveforms.
        asr: speech recogniser.
        tones: whether a wrong tone is an error.
        curve: name of a reward curve, see :func:`tts_grpo.reward.curves.reward`.
        prompt_voices: voice prompts; each rollout is synthesised with one of them.
        seed: random seed for the choice of the voice prompt.
        voice_per: "text" chooses a voice prompt per reference text, so that all rollouts of a GRPO group have the same
            voice. "rollout" chooses one per text and speech tokens; the same rollout always gets the same voice.
        language: language of the texts, see :func:`tts_grpo.text.spoken.spoken_form`.

    Attributes:
        seconds: total time so far in ``token2wav``, ``asr`` and ``text``, in seconds.
    """

    def __init__(self, token2wav: Token2Wav, asr: SenseVoice, tones: bool = True, curve: str = "tanh",
                 prompt_voices: Sequence[PromptVoice] = (), seed: int = 0, voice_per: str = "text",
                 language: str = "zh"):  # fmt: skip
        self.token2wav, self.asr, self.curve, self.language = token2wav, asr, curve, language
        self.match = "toned" if tones else "toneless"
        self.prompt_voices, self.seed, self.voice_per = prompt_voices, seed, voice_per
        self.seconds = {"token2wav": 0.0, "asr": 0.0, "text": 0.0}

    def score(self, speech_tokens: Sequence[Sequence[int]], ground_truths: Sequence[str]) -> list[RolloutScore]:
        """Score samples as one batch; if that fails, one by one, so that a bad sample gives an error for itself only.

        Args:
            speech_tokens: B sequences of speech token ids.
            ground_truths: B reference texts.

        Raises:
            Exception: one of ``MACHINE_FAULTS``, for a sample alone.
        """
        try:
            return self._score(speech_tokens, ground_truths)
        except Exception as error:
            if len(speech_tokens) == 1 and isinstance(error, MACHINE_FAULTS):
                raise
            if len(speech_tokens) == 1:
                return [RolloutScore(error=f"{type(error).__name__}: {error}")]
        torch.cuda.empty_cache()  # after the except clause, in which the traceback holds the tensors of the batch
        return [self.score([tokens], [text])[0] for tokens, text in zip(speech_tokens, ground_truths, strict=True)]

    def _score(self, speech_tokens, ground_truths) -> list[RolloutScore]:
        references = [sentence(text, self.language) for text in ground_truths]
        for reference in references:
            if not reference.units:
                raise ValueError(f"the ground truth {reference.raw!r} has no word")
        voices = [self._voice(*pair) for pair in zip(ground_truths, speech_tokens, strict=True)]
        transcripts, rescored = self.synthesise_and_transcribe(speech_tokens, voices)
        start = time.perf_counter()
        scores = [
            dataclasses.replace(self._compare(reference, transcript, len(tokens) / TOKEN_HZ), rescored=i in rescored)
            for i, (reference, transcript, tokens) in enumerate(
                zip(references, transcripts, speech_tokens, strict=True)
            )
        ]
        self.seconds["text"] += time.perf_counter() - start
        return scores

    def _voice(self, ground_truth: str, speech_tokens: Sequence[int]) -> PromptVoice | None:
        key = ground_truth if self.voice_per == "text" else f"{ground_truth}/{format_speech_tokens(speech_tokens)}"
        return choose_voice(self.prompt_voices, key, self.seed)

    def _compare(self, reference: Sentence, transcript: Transcript, duration_s: float) -> RolloutScore:
        alignment = align_sentences(reference, sentence(transcript.text, self.language), self.match)
        errors, onsets_s = locate_errors(alignment, transcript.onsets_s, duration_s)
        starts = tuple(max(0, round((onset_s - ONSET_DELAY_S) * TOKEN_HZ)) for onset_s in onsets_s)
        error_rate = sum(errors) / len(errors)
        return RolloutScore(reward(error_rate, self.curve), error_rate, transcript.text, tuple(errors), starts)

    def synthesise(self, speech_tokens: Sequence[Sequence[int]]) -> list[SampleSpeech]:
        """Synthesise samples one by one, for listening; the voice prompt depends on the seed only.

        Raises:
            Exception: one of ``MACHINE_FAULTS``.
        """
        results, rate = [], self.token2wav.sample_rate_hz
        voice = choose_voice(self.prompt_voices, "", self.seed)
        for tokens in speech_tokens:
            try:
                waveforms, lens, _ = decode_finite(self.token2wav, [tokens], [voice])
                samples = np.round(np.clip(waveforms[0, : lens[0]].cpu().numpy(), -1, 1) * 32767).astype(np.int16)
                results.append(SampleSpeech(samples, rate))
            except MACHINE_FAULTS:
                raise
            except Exception as error:
                results.append(SampleSpeech(np.zeros(0, np.int16), rate, f"{type(error).__name__}: {error}"))
        return results

    def synthesise_and_transcribe(
        self, speech_tokens: Sequence[Sequence[int]], voices=None
    ) -> tuple[list[Transcript], list[int]]:
        """Synthesise speech tokens, each with its voice prompt, and transcribe the waveforms.

        Returns:
            The transcripts, and the indices of samples that overflowed in half precision and were decoded in fp32.
        """
        start = time.perf_counter()
        waveforms, lens, rescored = decode_finite(self.token2wav, speech_tokens, voices)
        waveforms = resample_batch(waveforms, self.token2wav.sample_rate_hz, ASR_HZ)
        lens = (lens * ASR_HZ // self.token2wav.sample_rate_hz).tolist()
        decoded = time.perf_counter()
        transcripts = self.asr.transcribe_with_onsets([wave[:n] for wave, n in zip(waveforms, lens, strict=True)])
        self.seconds["token2wav"] += decoded - start
        self.seconds["asr"] += time.perf_counter() - decoded
        return transcripts, rescored
