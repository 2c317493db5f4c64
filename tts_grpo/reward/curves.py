"""Reward curves, which map an error rate to a reward from 1 (no errors) down to 0."""

import math

REWARD_CURVES = {
    # The curve of the original recipe (DESIGN: 1 - tanh(3 e)).
    "tanh": lambda error_rate: 1.0 - math.tanh(3.0 * error_rate),
    # The curve of its successor, which is flat near 0: exp(-12 e^1.5).
    "exp": lambda error_rate: math.exp(-12.0 * error_rate**1.5),
}


def reward(error_rate: float, curve: str = "tanh") -> float:
    """Return the reward in [0, 1] for an error rate; it is 1 without errors and decreases with the error rate.

    Args:
        error_rate: pinyin error rate, 0 or more.
        curve: name in ``REWARD_CURVES``.
    """
    return min(1.0, max(0.0, REWARD_CURVES[curve](error_rate)))
