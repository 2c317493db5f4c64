"""Select the utterances whose audio is in the report: the largest changes, the worst, and some drawn at random."""

import dataclasses
import random

from tts_grpo.evaluation.report.experiment import Utterance


@dataclasses.dataclass(frozen=True)
class Group:
    """Utterances selected by one rule, each with the seed whose audio is included."""

    title: str
    rule: str
    chosen: list[tuple[Utterance, str]]


def _seed_with_most(utterance: Utterance, key) -> str:
    """The seed whose pair of samples (SFT, GRPO) has the highest ``key``; the first of equal ones."""
    sft, grpo = utterance.samples["sft"], utterance.samples["grpo"]
    return max(sft, key=lambda seed: key(sft[seed], grpo[seed]))


def select(utterances: list[Utterance], count: int = 5) -> list[Group]:
    """Groups of at most ``count`` utterances (twice as many in "Worst after GRPO"), disjoint and not empty."""
    by_change = sorted(utterances, key=lambda u: (u.change, u.utt_id))
    better = [u for u in by_change if u.change < 0][:count]
    worse = [u for u in reversed(by_change) if u.change > 0][:count]
    selected = {u.utt_id for u in better + worse}
    by_rate = sorted(utterances, key=lambda u: (-u.errors("grpo") / max(1, u.length), u.utt_id))
    worst = [u for u in by_rate if u.utt_id not in selected and u.errors("grpo")][: 2 * count]
    selected |= {u.utt_id for u in worst}
    rest = [u for u in utterances if u.utt_id not in selected]
    drawn = random.Random(0).sample(rest, min(count, len(rest)))
    groups = [
        Group("Most improved", "Largest decrease of errors over all seeds. Audio: the seed with the largest decrease.",
              [(u, _seed_with_most(u, lambda a, b: a.errors - b.errors)) for u in better]),
        Group("Most worsened", "Largest increase of errors over all seeds. Audio: the seed with the largest increase.",
              [(u, _seed_with_most(u, lambda a, b: b.errors - a.errors)) for u in worse]),
        Group("Worst after GRPO", "Highest error rate of GRPO over all seeds. Audio: the seed with the most errors.",
              [(u, _seed_with_most(u, lambda a, b: b.errors)) for u in worst]),
        Group("Drawn at random", "From all other utterances, as typical examples. Audio: the first seed.",
              [(u, next(iter(u.samples["sft"]))) for u in drawn]),
    ]  # fmt: skip
    return [group for group in groups if group.chosen]
