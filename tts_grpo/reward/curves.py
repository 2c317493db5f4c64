"""The reward that an error rate gives: a curve from 1 at no error down to 0."""

import math

REWARD_CURVES = {
    # The original recipe's (DESIGN: 1 - tanh(3 e)).
    "tanh": lambda error_rate: 1.0 - math.tanh(3.0 * error_rate),
    # Its successor's, flat near 0: exp(-12 e^1.5).
    "exp": lambda error_rate: math.exp(-12.0 * error_rate**1.5),
}


def reward(error_rate: float, curve: str = "tanh") -> float:
    """Reward in [0, 1] of an error rate, falling from 1 at no error.

    Args:
        error_rate: pinyin error rate, 0 or more.
        curve: name in ``REWARD_CURVES``.
    """
    return min(1.0, max(0.0, REWARD_CURVES[curve](error_rate)))
