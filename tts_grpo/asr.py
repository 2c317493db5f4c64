"""Speech recognition with a SenseVoiceSmall folder, through funasr: the tiny recognisers and the full-size one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

MIN_SAMPLES = 400  # one analysis frame: funasr fails on less


class SenseVoice:
    """A recogniser of 16 kHz speech.

    Args:
        model_dir: folder with config.yaml, model.pt, am.mvn and the SentencePiece model.
        device: torch device.
        batch_size: recordings decoded at once.

    Raises:
        ValueError: the folder lacks a file, or a weight of the network is not in ``model.pt`` in its shape. (funasr
            itself would leave such a weight at its random start, without an error.)
    """

    def __init__(self, model_dir: str | Path, device: str = "cpu", batch_size: int = 32):
        from funasr import AutoModel

        folder = Path(model_dir)
        for name in ("config.yaml", "model.pt", "am.mvn"):
            if not (folder / name).exists():
                raise ValueError(f"{folder}: no {name} here: not a SenseVoiceSmall folder")
        self.batch_size = batch_size
        self._model = AutoModel(
            model=str(folder), device=device, disable_update=True, disable_pbar=True, ncpu=torch.get_num_threads()
        )
        self._check_weights(folder)

    def _check_weights(self, folder: Path) -> None:
        saved = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        saved = saved.get("state_dict", saved)
        for name, value in self._model.model.state_dict().items():
            if name not in saved or saved[name].shape != value.shape:
                raise ValueError(
                    f"{folder}/model.pt: weight {name} {tuple(value.shape)} is missing or of another shape"
                )
            if not torch.equal(saved[name].float(), value.cpu().float()):
                raise ValueError(f"{folder}/model.pt: weight {name} was not loaded")

    def transcribe(self, recordings: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz, without SenseVoice's tags.

        One shorter than an analysis frame has the transcript "".
        """
        from funasr.utils.postprocess_utils import rich_transcription_postprocess

        transcripts = [""] * len(recordings)
        # Like lengths together: less padding, and the same result.
        order = sorted((i for i, r in enumerate(recordings) if len(r) >= MIN_SAMPLES), key=lambda i: len(recordings[i]))
        if order:
            results = self._model.generate(
                input=[np.asarray(recordings[i], dtype=np.float32) for i in order],
                language="zh", use_itn=False, batch_size=self.batch_size, cache={},
            )  # fmt: skip
            for i, result in zip(order, results, strict=True):
                transcripts[i] = rich_transcription_postprocess(result["text"])
        return transcripts
