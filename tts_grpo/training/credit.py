"""Credit by syllable: GRPO's group-relative advantage for each syllable of the text instead of once per rollout.

All rollouts of a group have the same text, so syllable k of one can be compared with syllable k of the others. A
rollout with the reward R has lost 1 - R. The reward server says which part of that it lost at which syllable, because
the recogniser did not understand it there. What it cannot locate (the pace of the speech, say) is shared evenly among
the syllables. The advantage of a syllable's tokens is the group's mean loss at that syllable minus the rollout's own,
so an error at the end of a sentence does not penalise its beginning. The advantages of a rollout's syllables sum to
GRPO's advantage R - mean(R).

A rollout whose syllables are unknown (a bad one, or one with another number of syllables than the others) has shared
its whole loss evenly, and its tokens have the mean of the advantages over the syllables: GRPO's advantage R - mean(R)
divided by the number of syllables, which is how much a token of the other rollouts counts, too.

Process supervision in GRPO (arXiv 2402.03300, 4.1.3) also rewards parts of an answer, but compares each part with all
parts of the group.
"""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

KEY = "syllable_losses"  # key in the reward function's result, in addition to the score

TOLERANCE = 1e-3  # tolerance of rewards and losses, which are stored in float32 or less


def encode(unit_losses: Sequence[float], unit_starts: Sequence[int]) -> str:
    """Serialise the losses and first tokens of a rollout's syllables; both are empty if the syllables are unknown."""
    return json.dumps([[round(loss, 7) for loss in unit_losses], list(unit_starts)])


def _num_syllables(losses: Sequence[Sequence[float]]) -> int:
    """Return the most frequent number of syllables in a group, the largest of several; 0 if none is known."""
    sizes = Counter(len(row) for row in losses if row)
    return max(sizes, key=lambda size: (sizes[size], size), default=0)


def mismatched(encoded: Sequence[str]) -> int:
    """Return how many rollouts of a group have another number of syllables than most."""
    losses = [json.loads(one)[0] for one in encoded]
    return sum(len(row) not in (0, _num_syllables(losses)) for row in losses)


def _losses(located: Sequence[Sequence[float]], scores: np.ndarray, size: int) -> np.ndarray:
    """Return the loss of n rollouts at N syllables, shape (n, N), with what belongs to no syllable shared evenly.

    Raises:
        ValueError: a reward is not in [0, 1], or more is located than was lost.
    """
    for row, score in zip(located, scores, strict=True):
        if not -TOLERANCE <= score <= 1 + TOLERANCE or sum(row) > 1 - score + TOLERANCE:
            raise ValueError(
                f"a rollout with the reward {score:g} has a loss of {sum(row):g} at its syllables: credit=syllable "
                "shares 1 - reward among the syllables. Return a reward in [0, 1] and losses that sum to at most 1 - "
                "reward, or set credit=utterance"
            )
    losses = np.array([row if len(row) == size else [0.0] * size for row in located], dtype=float)
    rest = np.maximum(0.0, 1 - scores - losses.sum(1))
    return losses + rest[:, None] / size


def syllable_advantages(
    encoded_losses: Sequence[str], scores: Sequence[float], num_tokens: Sequence[int], by_std: bool = False
) -> list[np.ndarray]:
    """Compute the advantages of the tokens of one group.

    Args:
        encoded_losses: for each of n rollouts, the result of :func:`encode`.
        scores: n rewards.
        num_tokens: n response lengths in tokens, including the end token, which belongs to the last syllable.
        by_std: divide by the standard deviation of the scores, as the original GRPO does.

    Returns:
        n float32 arrays of shape (T,), where T is the length of the response.

    Raises:
        ValueError: a reward is not in [0, 1], or more is located than was lost.
    """
    located, starts = zip(*map(json.loads, encoded_losses), strict=True)
    scores = np.asarray(scores, dtype=float)
    scale = 1 / (scores.std(ddof=1) + 1e-6) if by_std and len(scores) > 1 else 1.0
    size = _num_syllables(located) or 1
    losses = _losses(located, scores, size)
    advantages = []
    for loss, begins, tokens in zip(losses.mean(0) - losses, starts, num_tokens, strict=True):
        if len(begins) == size:
            unit = np.searchsorted(begins, np.arange(tokens), side="right") - 1
            advantage = loss[np.maximum(0, unit)]
        else:
            advantage = np.full(tokens, loss.mean())
        advantages.append((advantage * scale).astype(np.float32))
    return advantages
