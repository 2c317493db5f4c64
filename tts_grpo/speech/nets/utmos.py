"""UTMOS: estimated mean opinion scores of naturalness."""

import math
from pathlib import Path

import torch

SOURCE = "https://huggingface.co/Blinorot/UTMOS-PyTorch"  # has the file utmos_scripted.pt


class Utmos:
    """UTMOS22 (Saeki et al., Interspeech 2022) in a TorchScript file.

    The file's method ``score`` takes waveforms (B, 1, T) at 16 kHz and returns their scores (B,). Its authors advise
    against padded batches, which change the scores.

    Raises:
        ValueError: this is no such file.
    """

    def __init__(self, path: Path, device: str = "cpu"):
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; utmos_scripted.pt is published at {SOURCE}")
        try:
            network = torch.jit.load(str(path), map_location=device)
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file: {error}") from error
        if not hasattr(network, "score"):
            raise ValueError(f"{path} has no method score: expected utmos_scripted.pt of {SOURCE}")
        self.device, self._score = device, network.eval().score

    @torch.inference_mode()
    def measure(self, speech: torch.Tensor) -> float:
        """MOS of a recording, float32 (T,) at 16 kHz, between about 1 and 5.

        Raises:
            RuntimeError: the score is not finite.
        """
        score = float(self._score(speech.to(self.device)[None, None])[0])
        if not math.isfinite(score):
            raise RuntimeError(f"UTMOS gave {score} for a recording of {len(speech)} samples")
        return score
