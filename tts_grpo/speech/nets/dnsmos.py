"""DNSMOS: estimated mean opinion scores of sound quality."""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.quality import COSTLY


class DnsMos:
    """DNSMOS P.835 (Reddy, Gopal and Cutler, ICASSP 2022): the network and the polynomials of the package speechmos.

    The package's own function also runs a second network, for P.808, and takes all cores for each recording.
    """

    def __init__(self):
        import onnxruntime
        from speechmos import dnsmos

        self.name = f"DNSMOS P.835 (speechmos {importlib.metadata.version('speechmos')})"
        self._package = dnsmos
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves idle cores to others
        path = Path(dnsmos.__file__).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        self._network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def measure(self, speech: np.ndarray) -> dict[str, float]:
        """Scores of a recording, float32 (T,) at 16 kHz; not below 1, where the scale begins.

        The network hears 9.01 s: shorter recordings are doubled until they suffice, of longer ones every second's
        window is heard and the scores are averaged.
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
        return {name: max(COSTLY[name].worst, float(value)) for name, value in means.items()}
