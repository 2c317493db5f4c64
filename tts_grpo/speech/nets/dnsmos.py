"""DNSMOS: estimated mean opinion scores of sound quality."""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.quality import NETWORK_METRICS

# Of the network: the spectrogram (1, 1, 900, 161), and the output of the convolutions at full resolution and of the
# pooling after them, (1, 32, 450, 80), which take 95% of the time
SPECTROGRAM, POOLED = "adjusted_input6", "mos_estimator_logpow/conv2d_3/Relu:0_pooling0"
HOP = 100  # frames of the spectrogram between windows
EDGE = 4  # frames at each end of a window that the padding of four 3x3 convolutions reaches
GROUP = 16  # windows that are computed together, which limits the memory


def part_of(model, start: str, end: str, shape: list | None = None):
    """The part of an ONNX model that computes the tensor ``end`` from ``start``, whose shape is ``shape``."""
    from onnx import TensorProto, helper

    made_by = {name: node for node in model.graph.node for name in node.output}
    needed, todo = set(), [end]
    while todo:
        name = todo.pop()
        if name != start and name in made_by and name not in needed:
            needed.add(name)
            todo += made_by[name].input
    nodes = [node for node in model.graph.node if node.output[0] in needed]
    used = {name for node in nodes for name in node.input}
    given = [helper.make_tensor_value_info(start, TensorProto.FLOAT, shape)] if shape else model.graph.input
    found = [helper.make_tensor_value_info(end, TensorProto.FLOAT, None)]
    weights = [weight for weight in model.graph.initializer if weight.name in used]
    graph = helper.make_graph(nodes, "part", given, found, weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


class DnsMos:
    """DNSMOS P.835 (Reddy, Gopal and Cutler, ICASSP 2022), with network and polynomials of the package speechmos.

    The package's own function also runs a second network, for P.808, and uses all cores for each recording. It computes
    each window of a recording by itself. Windows overlap by 8 of their 9 s, so the convolutions at full resolution are
    computed once here for all windows of a recording, with the same results to the last bit.
    """

    def __init__(self):
        import onnx
        import onnxruntime
        from speechmos import dnsmos

        self.name = f"DNSMOS P.835 (speechmos {importlib.metadata.version('speechmos')})"
        self._package = dnsmos
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # do not occupy cores while waiting
        model = onnx.load(str(Path(dnsmos.__file__).parent / "dnsmos_models" / "sig_bak_ovr.onnx"))
        parts = (
            part_of(model, "input_1", SPECTROGRAM),
            part_of(model, SPECTROGRAM, POOLED, ["N", 1, "T", 161]),
            part_of(model, POOLED, model.graph.output[0].name, ["N", 32, "T", 80]),
        )
        self._spectrogram, self._convolutions, self._scores = (
            onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
            for part in parts
        )

    def raw_scores(self, windows: list[np.ndarray]) -> np.ndarray:
        """The network's outputs (W, 3) for W windows of 9.01 s with a hop of 1 s, float32 (144160,) each."""
        spectrograms = [_run(self._spectrogram, window[None]) for window in windows]
        joined = np.concatenate([spectrograms[0], *(part[:, :, -HOP:] for part in spectrograms[1:])], axis=2)
        pooled, size, edge = _run(self._convolutions, joined), spectrograms[0].shape[2] // 2, EDGE // 2
        scores = []
        for i, part in enumerate(spectrograms):
            own = pooled[:, :, i * HOP // 2 : i * HOP // 2 + size].copy()
            if i > 0:  # the ends of a window are padded, those of the joined windows are not
                own[:, :, :edge] = _run(self._convolutions, part[:, :, : 2 * EDGE])[:, :, :edge]
            if i < len(spectrograms) - 1:
                own[:, :, -edge:] = _run(self._convolutions, part[:, :, -2 * EDGE :])[:, :, -edge:]
            scores.append(_run(self._scores, own))
        return np.concatenate(scores)

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
        windows = [window for window in windows if len(window) == size]
        groups = [windows[first : first + GROUP] for first in range(0, len(windows), GROUP)]
        raw = np.concatenate([self.raw_scores(group) for group in groups])
        scores = [self._package.DNSMOS.get_polyfit_val(None, *window, False) for window in raw]
        signal, background, overall = np.mean(scores, axis=0)
        means = {"dnsmos_ovrl": overall, "dnsmos_sig": signal, "dnsmos_bak": background}
        return {name: max(NETWORK_METRICS[name].worst, float(value)) for name, value in means.items()}


def _run(network, values: np.ndarray) -> np.ndarray:
    return network.run(None, {network.get_inputs()[0].name: values})[0]
