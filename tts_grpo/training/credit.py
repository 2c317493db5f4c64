"""Credit by syllable: GRPO's group-relative advantage for each syllable of the text instead of once per rollout.

All rollouts of a group have the same text, so syllable k of one can be compared with syllable k of the others. If a
rollout has the reward R, its loss 1 - R is divided among the syllables with errors, in proportion to their errors. The
advantage of a syllable's tokens is the group's mean loss at that syllable minus the rollout's own, so an error at the
end of a sentence does not penalise its beginning. The advantages of a rollout's syllables sum to GRPO's advantage
R - mean(R).

Process supervision in GRPO (arXiv 2402.03300, 4.1.3) also rewards parts of an answer, but compares each part with all
parts of the group.
"""

import json
from collections.abc import Sequence

import numpy as np

KEY = "syllable_errors"  # key in the reward function's result, in addition to the score

TOLERANCE = 1e-3  # tolerance of rewards, which veRL stores in float32 or less


def encode(unit_errors: Sequence[int], unit_starts: Sequence[int]) -> str:
    """Serialise the errors and first tokens of a rollout's syllables; both are empty for a bad rollout."""
    return json.dumps([list(unit_errors), list(unit_starts)])


def _losses(errors: list[list[int]], scores: np.ndarray) -> np.ndarray:
    """Return the loss of n rollouts at N syllables, shape (n, N); a bad rollout's loss is spread evenly.

    Raises:
        ValueError: the rollouts have different numbers of syllables, a reward is not in [0, 1], or a rollout without
            errors has a reward below 1.
    """
    sizes = {len(row) for row in errors if row}
    if len(sizes) != 1:
        raise ValueError(
            f"rollouts of one group have {sorted(sizes)} syllables: all rollouts of a group must have the same text"
        )
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
    encoded_errors: Sequence[str], scores: Sequence[float], num_tokens: Sequence[int], by_std: bool = False
) -> list[np.ndarray]:
    """Compute the advantages of the tokens of one group.

    Args:
        encoded_errors: for each of n rollouts, the result of :func:`encode`.
        scores: n rewards.
        num_tokens: n response lengths in tokens, including the end token, which belongs to the last syllable.
        by_std: divide by the standard deviation of the scores, as the original GRPO does.

    Returns:
        n float32 arrays of shape (T,), where T is the length of the response.

    Raises:
        ValueError: the rollouts have different numbers of syllables, a reward is not in [0, 1], or a rollout without
            errors has a reward below 1.
    """
    errors, starts = zip(*map(json.loads, encoded_errors), strict=True)
    scores = np.asarray(scores, dtype=float)
    scale = 1 / (scores.std(ddof=1) + 1e-6) if by_std and len(scores) > 1 else 1.0
    if not any(errors):  # all rollouts are bad and have the same reward
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
