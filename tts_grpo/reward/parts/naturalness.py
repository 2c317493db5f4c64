"""Naturalness: DNSMOS, an estimate of how good people would find the sound."""

import numpy as np

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.nets.dnsmos import DnsMos

WINDOW = int(9.01 * ASR_HZ)


class Reward:
    """DNSMOS P.835, from 0 at ``worst`` MOS to 1 at ``best``.

    Args:
        metric: dnsmos_ovrl (overall), dnsmos_sig (signal) or dnsmos_bak (background).
        worst, best: limits of the scale, in MOS. The whole scale is 1 to 5, but clean speech has about 3.5.
    """

    def __init__(self, context: Context, metric: str = "dnsmos_ovrl", worst: float = 1.0, best: float = 4.0):
        if metric not in ("dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak"):
            raise ValueError(f"metric={metric}: expected dnsmos_ovrl, dnsmos_sig or dnsmos_bak")
        self.metric, self.worst, self.best, self.dnsmos = metric, worst, best, DnsMos()

    def __call__(self, batch: Batch) -> list[float]:
        # Repeated to the length of the network's window (9.01 s), a short recording needs it once; DnsMos.measure,
        # which follows the published program, would need it several times.
        windows = [np.resize(one, max(len(one), WINDOW)) for one in batch.recordings]
        values = [self.dnsmos.measure(window)[self.metric] for window in windows]
        return [min(1.0, max(0.0, (value - self.worst) / (self.best - self.worst))) for value in values]

    def spoiled(self, batch: Batch) -> Batch:
        """Add white noise as loud as the speech."""
        rng = np.random.default_rng(0)
        levels = [np.sqrt(np.mean(one**2)) + 1e-4 for one in batch.recordings]
        noises = [rng.normal(0, level, n).astype(np.float32) for level, n in zip(levels, batch.lens, strict=True)]
        return batch.with_recordings([one + noise for one, noise in zip(batch.recordings, noises, strict=True)])
