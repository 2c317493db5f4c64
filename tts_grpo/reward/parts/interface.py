"""What a part of the reward is given, what it returns, and how the parts of the setting ``rewards`` are loaded.

A part is a file with a class ``Reward``, for example::

    class Reward:
        def __init__(self, context, limit_s=10.0):
            self.limit_s = limit_s

        def __call__(self, batch):
            return [min(1.0, self.limit_s / seconds) for seconds in batch.seconds]

It is created once per process of the reward server, with a :class:`Context` and its options of the setting ``rewards``,
and called with each :class:`Batch`. It returns one score per rollout, in [0, 1] and independent of the rest of the
batch; or :class:`Scores`, if it can tell at which syllables a rollout lost. It raises an exception where it cannot
judge: a rollout that is bad in its sense, such as one without any voice, has the score 0.

It may have two further attributes:

- ``needs = ("voice",)``: every rollout must have a prompt voice.
- ``spoiled(batch)`` returns a batch that must have a lower mean score than ``batch``, real speech. The server checks
  this before it is ready (known-answer check).
"""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tts_grpo.reward.rewards import CLASS, RewardSpec
from tts_grpo.speech.asr.recogniser import Transcript
from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.speech.quality import silences
from tts_grpo.text.units import Sentence

logger = logging.getLogger(__name__)

MIN_DIFFERENCE = 0.05  # smallest difference of mean scores in a known-answer check


@dataclasses.dataclass(frozen=True)
class UnitErrors:
    """The recognition errors of a rollout.

    Attributes:
        error_rate: errors per unit of the text.
        errors: errors at each unit (syllable, word) of the text's usual reading.
        starts: index of the first speech token of each unit.
    """

    error_rate: float
    errors: tuple[int, ...]
    starts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """B rollouts with their speech.

    Attributes:
        speech_tokens: B sequences of speech token ids.
        references: the B texts, with their units.
        waveforms: float32 (B, T), 16 kHz, zeros after each end, on the server's device.
        lens: lengths of the waveforms in samples.
        transcripts: transcript of each waveform, with times, by the first recogniser.
        errors: recognition errors of each rollout, over all recognisers of the reward.
        voices: prompt voice of each rollout; None is the decoder's default voice.
        languages: language of each text, "zh" or "en".
    """

    speech_tokens: Sequence[Sequence[int]]
    references: Sequence[Sentence]
    waveforms: torch.Tensor
    lens: Sequence[int]
    transcripts: Sequence[Transcript]
    errors: Sequence[UnitErrors]
    voices: Sequence[PromptVoice | None]
    languages: Sequence[str]

    def __len__(self) -> int:
        return len(self.lens)

    @property
    def seconds(self) -> list[float]:
        """Duration of each waveform."""
        return [n / ASR_HZ for n in self.lens]

    @functools.cached_property
    def recordings(self) -> list[np.ndarray]:
        """Each waveform alone, float32 (T,), on the CPU."""
        return [row[:n] for row, n in zip(self.waveforms.cpu().numpy(), self.lens, strict=True)]

    @functools.cached_property
    def silences(self) -> list[tuple[float, float, float]]:
        """:func:`tts_grpo.speech.quality.silences` of each waveform."""
        return list(map(silences, self.recordings))

    def with_recordings(self, recordings: Sequence[np.ndarray]) -> "Batch":
        """Return this batch with other waveforms, each float32 (T,)."""
        waveforms = torch.zeros(len(recordings), max(map(len, recordings)))
        for row, recording in zip(waveforms, recordings, strict=True):
            row[: len(recording)] = torch.from_numpy(np.ascontiguousarray(recording))
        return dataclasses.replace(
            self, waveforms=waveforms.to(self.waveforms.device), lens=[len(recording) for recording in recordings]
        )


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a batch.

    Attributes:
        scores: B scores in [0, 1].
        errors: for each rollout, the number of errors at each unit of its text, which share 1 - score in proportion; or
            None if nothing is located. Tokens of other units are not blamed (credit=syllable).
    """

    scores: Sequence[float]
    errors: Sequence[Sequence[int] | None] | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part is created with.

    Attributes:
        device: torch device of the server's process.
        curve: the setting ``reward_curve``.
        asr: the first recogniser (``tts_grpo.speech.asr.sensevoice.SenseVoice``).
        token2wav_dir: folder of the token2wav model.
    """

    device: str = "cpu"
    curve: str = "tanh"
    asr: object = None
    token2wav_dir: Path | None = None


class Part:
    """A loaded part: its specification and its instance of the class ``Reward``.

    Raises:
        ValueError: the file cannot be imported, or its class cannot be created; the message names it.
    """

    def __init__(self, spec: RewardSpec, context: Context):
        self.spec = spec
        try:
            module_spec = importlib.util.spec_from_file_location(f"tts_grpo_reward_{spec.name}", spec.path)
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
            self.reward = getattr(module, CLASS)(context, **spec.options)
        except Exception as error:
            raise ValueError(f"the reward part {spec.path}: {type(error).__name__}: {error}") from error

    def __call__(self, batch: Batch) -> Scores:
        """Return the scores of a batch; those of a part that is not required are -1 where it failed.

        Raises:
            Exception: the part failed and is required, or the GPU had too little memory for several rollouts at once:
                alone, each of them may have a score.
            ValueError: a score is not in [0, 1], or there is not one for each rollout.
        """
        try:
            return self._checked(self.reward(batch), batch)
        except Exception as error:
            if self.spec.required or (isinstance(error, torch.cuda.OutOfMemoryError) and len(batch) > 1):
                raise
            logger.exception("the reward part %s failed on %d rollouts", self.spec.name, len(batch))
            return Scores([-1.0] * len(batch))

    def _checked(self, result, batch: Batch) -> Scores:
        scored = result if isinstance(result, Scores) else Scores(result)
        scores = [float(score) for score in scored.scores]
        if len(scores) != len(batch) or not all(0.0 <= score <= 1.0 for score in scores):
            raise ValueError(
                f"the reward part {self.spec.name} gave the scores {scores[:4]} for {len(batch)} rollouts: expected "
                "one in [0, 1] for each"
            )
        return Scores(scores, scored.errors)

    def check(self, batch: Batch) -> str:
        """Run the known-answer check on real speech.

        Returns:
            Why it failed, or "" if it passed or the part has none.
        """
        if not hasattr(self.reward, "spoiled"):
            return ""
        good, bad = (float(np.mean(self(one).scores)) for one in (batch, self.reward.spoiled(batch)))
        if good - bad >= MIN_DIFFERENCE:
            return ""
        return (
            f"the reward part {self.spec.name} gives real speech a mean score of {good:.3f} and spoiled speech "
            f"{bad:.3f}: expected a difference of at least {MIN_DIFFERENCE}"
        )


def load_parts(specs: Sequence[RewardSpec], context: Context) -> list[Part]:
    """Load parts; see :class:`Part`."""
    return [Part(spec, context) for spec in specs]


def combine(parts: Sequence[Part], scored: Sequence[Scores], row: int) -> tuple[float, list[float]]:
    """Return a rollout's reward, and its loss at each unit of its text (empty if no part locates errors).

    The reward is the weighted mean of the scores that there are, or 0 if a part's score lies below its floor. The
    losses sum to at most 1 - reward; the rest belongs to no unit.

    Raises:
        ValueError: no part has a score.
    """
    present = [(part.spec, one) for part, one in zip(parts, scored, strict=True) if one.scores[row] >= 0]
    if not present:
        raise ValueError("no part of the reward has a score")
    total = sum(spec.weight for spec, _ in present)
    reward = sum(spec.weight * one.scores[row] for spec, one in present) / total
    losses: list[float] = []
    for spec, one in present:
        errors = one.errors[row] if one.errors else None
        if errors is None:
            continue
        losses = losses or [0.0] * len(errors)
        if any(errors):
            share = spec.weight / total * (1 - one.scores[row]) / sum(errors)
            losses = [loss + share * n for loss, n in zip(losses, errors, strict=True)]
    if any(one.scores[row] < spec.floor for spec, one in present):
        reward = 0.0
    return min(1.0, max(0.0, reward)), losses
