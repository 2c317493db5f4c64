"""Which utterances a report lets one hear: the extremes, and some drawn by chance beside them."""

import dataclasses
import random

from tts_grpo.evaluation.report.experiment import Utterance


@dataclasses.dataclass(frozen=True)
class Group:
    """Utterances chosen by one rule, each with the seed whose takes are played."""

    title: str
    rule: str
    chosen: list[tuple[Utterance, str]]


def _seed_with_most(utterance: Utterance, key) -> str:
    """The seed whose pair of takes (SFT, GRPO) has the highest ``key``; the first of equals."""
    sft, grpo = utterance.takes["sft"], utterance.takes["grpo"]
    return max(sft, key=lambda seed: key(sft[seed], grpo[seed]))


def select(utterances: list[Utterance], count: int = 5) -> list[Group]:
    """Groups of at most ``count`` utterances; the worst, of twice as many. None is in two groups, none is empty."""
    by_change = sorted(utterances, key=lambda u: (u.change, u.utt_id))
    better = [u for u in by_change if u.change < 0][:count]
    worse = [u for u in reversed(by_change) if u.change > 0][:count]
    taken = {u.utt_id for u in better + worse}
    by_rate = sorted(utterances, key=lambda u: (-u.errors("grpo") / max(1, u.length), u.utt_id))
    worst = [u for u in by_rate if u.utt_id not in taken and u.errors("grpo")][: 2 * count]
    taken |= {u.utt_id for u in worst}
    rest = [u for u in utterances if u.utt_id not in taken]
    chance = random.Random(0).sample(rest, min(count, len(rest)))
    groups = [
        Group("Most improved", "Most errors fewer over all seeds. Played: the seed that shows it most.",
              [(u, _seed_with_most(u, lambda a, b: a.errors - b.errors)) for u in better]),
        Group("Most worsened", "Most errors more over all seeds. Played: the seed that shows it most.",
              [(u, _seed_with_most(u, lambda a, b: b.errors - a.errors)) for u in worse]),
        Group("Worst after GRPO", "Highest error rate of GRPO over all seeds. Played: the seed with most of them.",
              [(u, _seed_with_most(u, lambda a, b: b.errors)) for u in worst]),
        Group("Drawn by chance", "From all others, for an ear of the ordinary. Played: the first seed.",
              [(u, next(iter(u.takes["sft"]))) for u in chance]),
    ]  # fmt: skip
    return [group for group in groups if group.chosen]
