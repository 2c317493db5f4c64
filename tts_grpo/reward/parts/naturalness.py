"""Naturalness: an estimate of how good people would find the sound, by DNSMOS or UTMOS."""

from pathlib import Path

import numpy as np

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.nets.dnsmos import DnsMos
from tts_grpo.speech.nets.utmos import Utmos

WINDOW = int(9.01 * ASR_HZ)
BEST = {"dnsmos_ovrl": 4.0, "dnsmos_sig": 4.0, "dnsmos_bak": 4.0, "utmos": 4.5}  # about that of clean speech


class Reward:
    """Mean opinion score of DNSMOS P.835 or UTMOS, from 0 at ``worst`` to 1 at ``best``.

    Args:
        metric: dnsmos_ovrl (overall), dnsmos_sig (signal), dnsmos_bak (background) or utmos.
        model: the file utmos_scripted.pt, with utmos.
        worst, best: limits of the scale, in MOS. The whole scale is 1 to 5; by default ``best`` is about that of clean
            speech.
    """

    def __init__(
        self, context: Context, metric: str = "dnsmos_ovrl", model: str = "", worst: float = 1.0,
        best: float | None = None,
    ):  # fmt: skip
        if metric not in BEST:
            raise ValueError(f"metric={metric}: expected one of {', '.join(BEST)}")
        if bool(model) != (metric == "utmos"):
            raise ValueError("metric=utmos needs model, the file utmos_scripted.pt; no other metric has a model")
        self.metric, self.worst, self.best = metric, worst, BEST[metric] if best is None else best
        if metric == "utmos":
            self.utmos = Utmos(Path(model), context.device)
        else:
            self.dnsmos = DnsMos()

    def __call__(self, batch: Batch) -> list[float]:
        if self.metric == "utmos":
            values = [self.utmos.measure(row[:n]) for row, n in zip(batch.waveforms, batch.lens, strict=True)]
        else:
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
