"""DNSMOS: estimated mean opinion scores of sound quality."""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.quality import NETWORK_METRICS


class DnsMos:
    """DNSMOS P.835 (Reddy, Gopal and Cutler, ICASSP 2022), with network and polynomials of the package speechmos.

    The package's own function also runs a second network, for P.808, and uses all cores for each recording.
    """

    def __init__(self):
        import onnxruntime
        from speechmos import dnsmos

        self.name = f"DNSMOS P.835 (speechmos {importlib.metadata.version('speechmos')})"
        self._package = dnsmos
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # do not occupy cores while waiting
        path = Path(dnsmos.__file__).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        self._network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def measure(self, speech: np.ndarray) -> dict[str, float]:
        """Scores of a recording, float32 (T,) at 16 kHz; at least 1, the minimum of the scale.

        The network's input is 9.01 s long. Shorter recordings are repeated; for longer ones, the scores of windows with
        a hop of 1 s are averaged.
        """
        size = int(self._package.INPUT_LENGTH * ASR_HZ)
        while len(speech) < size:
            speech = np.concatenate([speech, speech])
        hops = int(len(speech) // ASR_HZ - self._package.INPUT_LENGTH) + 1
        windows = [speech[i * ASR_HZ : i * ASR_HZ + size] for i in range(hops)]
        raw = np.concatenate([self._network.run(None, {"input_1": w[None]})[0] for w in windows if len(w) == size])
        scores = [self._package.DNSMOS.get_polyfit_val(None, *window, False) for window in raw]
        signal, background, overall = np.mean(scores, axis=0)
        means = {"dnsmos_ovrl": overall, "dnsmos_sig": signal, "dnsmos_bak": background}
        return {name: max(NETWORK_METRICS[name].worst, float(value)) for name, value in means.items()}
