"""Utterances that the published and the spoken-form protocol score differently, with the reasons."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from tts_grpo.evaluation.report.experiment import MODELS, Utterance
from tts_grpo.text.clean import clean
from tts_grpo.text.spoken import spoken_form

SHOWN = 12  # utterances of the largest difference


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """One utterance, with its errors over all samples of both models.

    Attributes:
        spoken_text: the usual reading of the text, in words.
        language: language of the text.
        why: what the published protocol compares as it is written.
        published, spoken: errors by the published protocol and by the spoken one.
    """

    utt_id: str
    target_text: str
    spoken_text: str
    language: str
    why: str
    published: int
    spoken: int


def reason(target_text: str, hypotheses: Sequence[str], language: str) -> str:
    """What in a text or its transcripts the two protocols read differently."""
    spoken, causes = spoken_form(target_text, language), []
    causes += sorted({span.kind for span in spoken.read if span.kind != "sign"})
    if spoken.tags:
        causes.append("tags")
    if language == "zh" and clean(target_text) != clean(target_text, simplify=False):
        causes.append("traditional characters")
    if any(re.search(r"[0-9]", hypothesis) for hypothesis in hypotheses):
        causes.append("digits in the transcript")
    return ", ".join(causes) or "letters, spaces, erhua or fillers"


def find_disagreements(utterances: Sequence[Utterance]) -> tuple[list[Disagreement], dict[str, int]]:
    """Utterances that the protocols count differently, the largest difference first; how many there are by reason."""
    found = []
    for utterance in utterances:
        samples = [sample for model in MODELS for sample in utterance.samples[model].values()]
        published, spoken = sum(s.published for s in samples), sum(s.spoken for s in samples)
        if published != spoken:
            text, language = utterance.target_text, utterance.language
            why, reading = reason(text, [s.hypothesis for s in samples], language), spoken_form(text, language).text
            found.append(Disagreement(utterance.utt_id, text, reading, language, why, published, spoken))
    found.sort(key=lambda one: (-abs(one.published - one.spoken), one.utt_id))
    return found[:SHOWN], dict(Counter(one.why for one in found).most_common())
