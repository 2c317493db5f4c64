"""Compute rewards from speech tokens: token2wav, resampling to 16 kHz, ASR, error rate, and the parts of the reward."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tts_grpo.reward.parts.interface import Batch, Context, Part, UnitErrors, combine, load_parts
from tts_grpo.reward.protocol import RolloutScore
from tts_grpo.reward.rewards import DEFAULT, parse_rewards
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
# What further recognisers of the reward are given: gain, noise (signal to noise in dB), speed. Each has its own, so
# that a policy cannot please all of them by the same trick.
VARIATIONS = ((0.7, 30.0, 1.03), (1.3, 33.0, 0.97), (0.85, 27.0, 1.0))


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
        language: language of texts without one of their own, see :func:`tts_grpo.text.spoken.spoken_form`.
        parts: parts of the reward; by default its intelligibility alone.
        more_asrs: further recognisers. Each is given the waveforms in a variation of its own (``VARIATIONS``).
        pool: error rate of several recognisers: their "mean", or the "worst" one.

    Attributes:
        seconds: total time so far in ``token2wav``, ``asr``, ``text`` and each part, in seconds.

    Raises:
        ValueError: a part needs a voice prompt, and there is none.
    """

    def __init__(self, token2wav: Token2Wav, asr: SenseVoice, tones: bool = True, curve: str = "tanh",
                 prompt_voices: Sequence[PromptVoice] = (), seed: int = 0, voice_per: str = "text",
                 language: str = "zh", parts: Sequence[Part] = (), more_asrs: Sequence[SenseVoice] = (),
                 pool: str = "mean"):  # fmt: skip
        self.token2wav, self.asr, self.language = token2wav, asr, language
        self.match = "toned" if tones else "toneless"
        self.prompt_voices, self.seed, self.voice_per = prompt_voices, seed, voice_per
        self.parts = parts or load_parts(parse_rewards(DEFAULT), Context(curve=curve, asr=asr))
        self.more_asrs, self.pool = more_asrs, pool
        self.seconds = dict.fromkeys(("token2wav", "asr", "text", *(part.spec.name for part in self.parts)), 0.0)
        for part in self.parts:
            if "voice" in getattr(part.reward, "needs", ()) and not prompt_voices:
                raise ValueError(
                    f"the reward part {part.spec.name} needs a prompt voice: set prompt_audio and prompt_text, or "
                    "prompt_list"
                )

    def score(
        self, speech_tokens: Sequence[Sequence[int]], ground_truths: Sequence[str],
        languages: Sequence[str] | None = None,
    ) -> list[RolloutScore]:  # fmt: skip
        """Score samples as one batch; if that fails, one by one, so that a bad sample gives an error for itself only.

        Args:
            speech_tokens: B sequences of speech token ids.
            ground_truths: B reference texts.
            languages: language of each text; by default, that of this object.

        Raises:
            Exception: one of ``MACHINE_FAULTS``, for a sample alone.
        """
        languages = languages or [self.language] * len(ground_truths)
        try:
            return self._score(speech_tokens, ground_truths, languages)
        except Exception as error:
            if len(speech_tokens) == 1 and isinstance(error, MACHINE_FAULTS):
                raise
            if len(speech_tokens) == 1:
                return [RolloutScore(error=f"{type(error).__name__}: {error}")]
        torch.cuda.empty_cache()  # after the except clause, in which the traceback holds the tensors of the batch
        samples = zip(speech_tokens, ground_truths, languages, strict=True)
        return [self.score([tokens], [text], [language])[0] for tokens, text, language in samples]

    def _score(self, speech_tokens, ground_truths, languages) -> list[RolloutScore]:
        batch, rescored = self._batch(speech_tokens, ground_truths, languages)
        scored = [self._timed(part.spec.name, part, batch) for part in self.parts]
        scores = []
        for i, errors in enumerate(batch.errors):
            reward, losses = combine(self.parts, scored, i)
            parts = {part.spec.name: one.scores[i] for part, one in zip(self.parts, scored, strict=True)}
            starts = errors.starts if losses else ()
            scores.append(
                RolloutScore(reward, errors.error_rate, batch.transcripts[i].text, tuple(losses), starts, parts,
                             rescored=i in rescored)
            )  # fmt: skip
        return scores

    def check(
        self, speech_tokens: Sequence[Sequence[int]], ground_truths: Sequence[str],
        languages: Sequence[str] | None = None,
    ) -> list[str]:  # fmt: skip
        """Run the known-answer checks of the parts on real speech, as :meth:`score` is given it.

        Returns:
            Why parts failed; empty if all of them passed.
        """
        batch, _ = self._batch(speech_tokens, ground_truths, languages or [self.language] * len(ground_truths))
        return [fault for part in self.parts if (fault := part.check(batch))]

    def _timed(self, name: str, function: Callable, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        self.seconds[name] += time.perf_counter() - start
        return result

    def _batch(self, speech_tokens, ground_truths, languages) -> tuple[Batch, list[int]]:
        """Return what the parts are given, and the indices of samples that were decoded in fp32."""
        references = list(map(sentence, ground_truths, languages))
        for reference in references:
            if not reference.units:
                raise ValueError(f"the ground truth {reference.raw!r} has no word")
        voices = [self._voice(*pair) for pair in zip(ground_truths, speech_tokens, strict=True)]
        waveforms, lens, rescored = self._timed("token2wav", self._waveforms, speech_tokens, voices)
        heard = self._timed("asr", self._transcribe, waveforms, lens, languages)
        durations_s = [len(tokens) / TOKEN_HZ for tokens in speech_tokens]
        errors = self._timed("text", self._errors, references, heard, durations_s, languages)
        return Batch(speech_tokens, references, waveforms, lens, heard[0], errors, voices, languages), rescored

    def _voice(self, ground_truth: str, speech_tokens: Sequence[int]) -> PromptVoice | None:
        key = ground_truth if self.voice_per == "text" else f"{ground_truth}/{format_speech_tokens(speech_tokens)}"
        return choose_voice(self.prompt_voices, key, self.seed)

    def _errors(self, references, transcripts, durations_s, languages) -> list[UnitErrors]:
        """Errors of each sample over all recognisers; with pool="mean", those at a unit are summed."""
        found = []
        for i, sample in enumerate(zip(references, durations_s, languages, strict=True)):
            of_recognisers = [self._compare(one[i], *sample) for one in transcripts]
            if self.pool == "worst" or len(of_recognisers) == 1:
                found.append(max(of_recognisers, key=lambda errors: errors.error_rate))
                continue
            rate = sum(errors.error_rate for errors in of_recognisers) / len(of_recognisers)
            sums = tuple(map(sum, zip(*(errors.errors for errors in of_recognisers), strict=True)))
            found.append(UnitErrors(rate, sums, of_recognisers[0].starts))
        return found

    def _compare(
        self, transcript: Transcript, reference: Sentence, duration_s: float, language: str
    ) -> UnitErrors:  # fmt: skip
        alignment = align_sentences(reference, sentence(transcript.text, language), self.match)
        errors, onsets_s = locate_errors(alignment, transcript.onsets_s, duration_s)
        starts = tuple(max(0, round((onset_s - ONSET_DELAY_S) * TOKEN_HZ)) for onset_s in onsets_s)
        return UnitErrors(sum(errors) / len(errors), tuple(errors), starts)

    def synthesise(self, speech_tokens: Sequence[Sequence[int]], ground_truths: Sequence[str]) -> list[SampleSpeech]:
        """Synthesise samples one by one, for listening, each with the voice prompt with which it is scored.

        Raises:
            Exception: one of ``MACHINE_FAULTS``.
        """
        results, rate = [], self.token2wav.sample_rate_hz
        for tokens, ground_truth in zip(speech_tokens, ground_truths, strict=True):
            try:
                voice = self._voice(ground_truth, tokens)
                waveforms, lens, _ = decode_finite(self.token2wav, [tokens], [voice])
                samples = np.round(np.clip(waveforms[0, : lens[0]].cpu().numpy(), -1, 1) * 32767).astype(np.int16)
                results.append(SampleSpeech(samples, rate))
            except MACHINE_FAULTS:
                raise
            except Exception as error:
                results.append(SampleSpeech(np.zeros(0, np.int16), rate, f"{type(error).__name__}: {error}"))
        return results

    def _waveforms(self, speech_tokens, voices) -> tuple[torch.Tensor, list[int], list[int]]:
        """Synthesise speech tokens: waveforms (B, T) at 16 kHz, their lengths, and the indices decoded in fp32."""
        waveforms, lens, rescored = decode_finite(self.token2wav, speech_tokens, voices)
        waveforms = resample_batch(waveforms, self.token2wav.sample_rate_hz, ASR_HZ)
        return waveforms, (lens * ASR_HZ // self.token2wav.sample_rate_hz).tolist(), rescored

    def _transcribe(
        self, waveforms: torch.Tensor, lens: Sequence[int], languages: Sequence[str]
    ) -> list[list[Transcript]]:
        """Transcripts of each recogniser, with the times of the waveforms as they are."""
        recordings = [wave[:n] for wave, n in zip(waveforms, lens, strict=True)]
        results = [self.asr.transcribe_with_onsets(recordings, languages)]
        for asr, variation in zip(self.more_asrs, itertools.cycle(VARIATIONS)):
            speed = variation[2]
            varied = [vary(recording, *variation) for recording in recordings]
            transcripts = asr.transcribe_with_onsets(varied, languages)
            results.append([
                dataclasses.replace(one, onsets_s=tuple(onset_s * speed for onset_s in one.onsets_s))
                for one in transcripts
            ])  # fmt: skip
        return results

    def synthesise_and_transcribe(self, speech_tokens: Sequence[Sequence[int]], voices=None) -> list[Transcript]:
        """Synthesise speech tokens, each with its voice prompt, and transcribe them with the first recogniser."""
        waveforms, lens, _ = self._timed("token2wav", self._waveforms, speech_tokens, voices)
        return self._timed("asr", self._transcribe, waveforms, lens, [self.language] * len(lens))[0]


def vary(recording: torch.Tensor, gain: float, signal_to_noise_db: float, speed: float) -> torch.Tensor:
    """Change a recording, float32 (T,), as little as another room and another player would.

    Args:
        gain: factor of the amplitude.
        signal_to_noise_db: level of the speech over added white noise, the same noise at each call.
        speed: factor of the speed, which changes the pitch, too.
    """
    size = max(1, round(len(recording) / speed))
    changed = torch.nn.functional.interpolate(recording[None, None], size=size, mode="linear")[0, 0] * gain
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(changed.device)
    return changed + noise * changed.square().mean().sqrt() * 10 ** (-signal_to_noise_db / 20)
