"""Credit by syllable: GRPO's comparison within a group, made for each syllable of the text instead of once a rollout.

All rollouts of a group say the same text, so syllable k of one can be compared with syllable k of the others. A rollout
whose reward is R has lost 1 - R; the loss is shared out among the syllables at which the recogniser heard an error, in
proportion to the errors. The tokens of a syllable get the group's mean loss there less the rollout's own, so that a
slip at the end of a sentence says nothing against its beginning. Over the syllables of a rollout this adds up to GRPO's
advantage R - mean(R).

Compare process supervision in GRPO (arXiv 2402.03300, 4.1.3), which also rewards parts of an answer, but compares them
with all parts of the group.
"""

import json
from collections.abc import Sequence

import numpy as np

KEY = "syllable_errors"  # of what the reward notes of a rollout, beside its score

TOLERANCE = 1e-3  # of rewards, which veRL keeps in float32 or less


def encode(unit_errors: Sequence[int], unit_starts: Sequence[int]) -> str:
    """Errors and starts of a rollout's syllables, as the reward notes them; both empty for a bad rollout."""
    return json.dumps([list(unit_errors), list(unit_starts)])


def _losses(errors: list[list[int]], scores: np.ndarray) -> np.ndarray:
    """(n, N) reward that each rollout lost at each syllable; a bad one lost its part at every syllable alike.

    Raises:
        ValueError: the rollouts have different numbers of syllables, or a reward lost something that is no syllable's
            error.
    """
    sizes = {len(row) for row in errors if row}
    if len(sizes) != 1:
        raise ValueError(f"rollouts of one group have {sorted(sizes)} syllables: they were not asked to say the same")
    for row, score in zip(errors, scores, strict=True):
        if not -TOLERANCE <= score <= 1 + TOLERANCE or (row and not any(row) and score < 1 - TOLERANCE):
            raise ValueError(
                f"a rollout with {sum(row)} syllable errors has the reward {score:g}: credit=syllable shares 1 - reward"
                " among the errors and would drop what the reward takes off for anything else. Return a reward in "
                "[0, 1] that is 1 without errors, or set credit=utterance"
            )
    counts = np.array([row or [1] * max(sizes) for row in errors], dtype=float)
    return (1 - scores[:, None]) * counts / np.maximum(1, counts.sum(1, keepdims=True))


def syllable_advantages(
    notes: Sequence[str], scores: Sequence[float], num_tokens: Sequence[int], by_std: bool = False
) -> list[np.ndarray]:
    """Advantages of a group's tokens.

    Args:
        notes: of each of n rollouts, what :func:`encode` made.
        scores: their rewards.
        num_tokens: tokens of their responses, the end token included; it counts to the last syllable.
        by_std: divide by the standard deviation of the scores, as GRPO's first form does.

    Returns:
        n arrays float32 (T,).

    Raises:
        ValueError: the rollouts have different numbers of syllables, or a reward lost something that is no syllable's
            error.
    """
    errors, starts = zip(*map(json.loads, notes), strict=True)
    scores = np.asarray(scores, dtype=float)
    scale = 1 / (scores.std(ddof=1) + 1e-6) if by_std and len(scores) > 1 else 1.0
    if not any(errors):  # all of them bad, and thus alike
        return [np.zeros(size, np.float32) for size in num_tokens]
    losses = _losses(errors, scores)
    advantages = []
    for loss, begins, size in zip(losses.mean(0) - losses, starts, num_tokens, strict=True):
        if begins:
            unit = np.searchsorted(begins, np.arange(size), side="right") - 1
            advantage = loss[np.maximum(0, unit)]
        else:
            advantage = np.full(size, loss.sum())
        advantages.append((advantage * scale).astype(np.float32))
    return advantages
