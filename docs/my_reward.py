"""Reward short rollouts: an example of a part of the reward (docs/rewards.md)."""


class Reward:
    """1 up to ``limit_s`` seconds, then falling."""

    def __init__(self, context, limit_s=10.0):
        self.limit_s = limit_s

    def __call__(self, batch):
        """Return a score in [0, 1] for each rollout."""
        return [min(1.0, self.limit_s / seconds) for seconds in batch.seconds]
