"""F0 metrics: median, range and standard deviation."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional

from tts_grpo.speech.audio import ASR_HZ, batches_of_similar_length
from tts_grpo.speech.decoder import tf32

MIN_VOICED_FRAMES = 10  # frames of 16 ms; F0 statistics of fewer frames are meaningless
MIN_HZ, MAX_HZ = 60.0, 600.0  # range of the F0 of speech
BATCH = 32  # most recordings at once on a GPU

NETWORK_SHA256 = "6385e8c2ebc3872e82c9ff5946228de44cd3be77a750ea53698b7dbfe94b0a22"  # model.onnx of swift-f0 0.3.0
HOP = 256  # samples from frame to frame
# Names of constants in that graph: for each of the three spectrograms, the window, and the indices and values of the
# filter bank; the frequencies of the 95 candidates in Hz, and their logarithms.
SPECTROGRAMS = (("v41", "v123", "v124"), ("v161", "v241", "v242"), ("v262", "v342", "v343"))
CANDIDATES_HZ, LOG_CANDIDATES = "v438", "v455"
BANDS = 128
ROUNDED = 32  # frames; lengths of batches are multiples of it, because cuDNN plans each convolution anew for each shape
FLOOR = 1e-8  # added to the spectrograms before the logarithm
SILENCE_PEAK = 1e-3  # the package calls frames whose samples are all lower unvoiced


class SwiftF0Network:
    """The network of the package swift-f0 for a batch of recordings, on any device.

    The package runs it by onnxruntime on one recording at a time, on the CPU. This class takes the weights from the
    package's ``model.onnx``, and its results equal the package's up to rounding.

    Raises:
        RuntimeError: the package has another network.
    """

    def __init__(self, device: str = "cpu"):
        import onnx

        package = importlib.metadata.distribution("swift-f0")
        self.device = torch.device(device)
        content = package.locate_file("swift_f0/model.onnx").read_bytes()
        if hashlib.sha256(content).hexdigest() != NETWORK_SHA256:
            raise RuntimeError(
                f"swift-f0 {package.version} has another network than swift-f0 0.3.0, which this recipe is written "
                "for: install the version in requirements-cosyvoice.txt"
            )
        graph = onnx.load_from_string(content).graph
        values = {
            value.name: torch.from_numpy(onnx.numpy_helper.to_array(value).copy()).to(device)
            for value in graph.initializer
        }
        self.layers = []  # weight, bias, dilation of each convolution
        for node in graph.node:
            if node.op_type == "Conv":
                dilation = next(tuple(one.ints) for one in node.attribute if one.name == "dilations")
                self.layers.append((values[node.input[1]], values[node.input[2]], dilation))
        self.spectrograms = []  # window (N,), filter bank (N / 2 + 1, BANDS)
        for window, indices, weights in SPECTROGRAMS:
            bank = torch.zeros((len(values[window]) // 2 + 1) * BANDS, device=device)
            bank[values[indices].long()] = values[weights]
            self.spectrograms.append((values[window], bank.view(-1, BANDS)))
        self.log_candidates = values[LOG_CANDIDATES]
        self.allowed = (values[CANDIDATES_HZ] >= MIN_HZ) & (values[CANDIDATES_HZ] <= MAX_HZ)

    @torch.inference_mode()
    def __call__(self, waveforms: torch.Tensor, lens: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """F0 in Hz and confidence of each frame, both (frames,); a frame is voiced from a confidence of 0.5.

        Args:
            waveforms: float32 (B, T) at 16 kHz.
            lens: their lengths in samples; what lies beyond is ignored.

        Raises:
            ValueError: a waveform is empty or not finite.
        """
        results: list = [None] * len(lens)
        for rows in batches_of_similar_length(lens, BATCH):
            chosen = torch.tensor([lens[row] for row in rows], device=self.device)
            speech = waveforms[rows, : lens[rows[-1]]].to(self.device)
            speech = torch.where(torch.arange(speech.shape[1], device=self.device) < chosen[:, None], speech, 0)
            if not lens[rows[0]] or not speech.isfinite().all():
                raise ValueError("F0 cannot be measured: a waveform is empty or not finite")
            frames = (chosen // HOP).clamp(min=1)
            with tf32(False):
                found = self._network(speech, frames)
            found = zip(*(one.cpu().numpy() for one in (*found, frames)), strict=True)
            for row, (f0, confidence, count) in zip(rows, found, strict=True):
                results[row] = f0[:count], confidence[:count]
        return results

    def _network(self, speech: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """F0 and confidence (B, frames) of speech (B, T), zeros after the end; ``frames`` (B,) are the valid ones."""
        count = -(-int(frames.max()) // ROUNDED) * ROUNDED
        speech = functional.pad(speech, (0, max(0, HOP * count - speech.shape[1])))
        valid = (torch.arange(count, device=self.device) < frames[:, None])[:, None].float()

        def convolve(number: int, x: torch.Tensor) -> torch.Tensor:
            weight, bias, dilation = self.layers[number]
            if weight.shape[-1] > 1:  # a recording alone has zeros after its last frame
                x = x * (valid[:, None] if x.ndim == 4 else valid)
            padding = [d * (n - 1) // 2 for d, n in zip(dilation, weight.shape[2:], strict=True)]
            function = functional.conv2d if x.ndim == 4 else functional.conv1d
            return function(x, weight, bias, padding=padding, dilation=dilation)

        inputs = self._spectrograms(speech, count)
        x = convolve(0, inputs).relu_()
        for number in range(1, 13, 2):
            x = (x + convolve(number + 1, convolve(number, x).relu_())).relu_()
        candidates = len(self.log_candidates)
        x = convolve(13, x[:, :, : candidates + 1])[:, :, :candidates].relu_()
        logits = convolve(15, x)[:, 0].transpose(1, 2)
        voicing = torch.cat([convolve(14, x).amax(2), inputs.mean((1, 2))[:, None]], dim=1)
        voicing = convolve(17, convolve(16, voicing).relu_())[:, 0].sigmoid()
        voicing = torch.where(self.allowed[logits.argmax(-1)], voicing, 0)
        hops = functional.pad(speech, (0, HOP))[:, : HOP * count].view(-1, count, HOP)
        return self._f0(logits), torch.where(hops.abs().amax(-1) < SILENCE_PEAK, 0, voicing)

    def _spectrograms(self, speech: torch.Tensor, count: int) -> torch.Tensor:
        """Logarithmic spectrograms (B, 3, BANDS, count); a frame's window is centred at the start of its hop."""
        channels = []
        for window, bank in self.spectrograms:
            size = len(window)
            pieces = functional.pad(speech, (size // 2, size // 2 + HOP)).unfold(1, size, HOP)[:, :count]
            spectrum = torch.fft.rfft(pieces * window)
            magnitude = (spectrum.real.square() + spectrum.imag.square()).sqrt_()  # faster than abs()
            channels.append((magnitude @ bank + FLOOR).log_())
        return torch.stack(channels, 1).transpose(2, 3).contiguous()

    def _f0(self, logits: torch.Tensor) -> torch.Tensor:
        """F0 in Hz of logits (B, frames, 95): the mean of the best candidate and its neighbours in log Hz."""
        logits = torch.where(self.allowed, logits, -torch.inf)
        near = logits.argmax(-1, keepdim=True) + torch.tensor([-1, 0, 1], device=self.device)
        values = functional.pad(logits, (1, 1), value=-torch.inf).gather(-1, near + 1)
        near = near.clamp(0, len(self.log_candidates) - 1)
        return (values.double().softmax(-1) * self.log_candidates[near]).sum(-1).exp()


class F0Metrics:
    """F0 metrics by SwiftF0 (Nieradzik, arXiv:2508.18440), whose network is part of the package swift-f0.

    A GPU computes a batch at once (:class:`SwiftF0Network`). On the CPU the package analyses as many recordings at once
    as torch has threads, since onnxruntime, unlike torch, prepares nothing for each new length.
    """

    def __init__(self, device: str = "cpu"):
        self.name = f"SwiftF0 {importlib.metadata.version('swift-f0')}"
        if torch.device(device).type != "cpu":
            self._detect = SwiftF0Network(device)
            return
        from swift_f0 import SwiftF0

        self._detect, self._detector = self._detect_by_package, SwiftF0(threads=1, spin=False)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def measure(self, speech: np.ndarray) -> dict[str, float | None]:
        """F0 metrics of a recording, float32 (T,) at 16 kHz; None if it has too few voiced frames."""
        return self.measure_all(torch.from_numpy(speech)[None], [len(speech)])[0]

    def measure_all(self, waveforms: torch.Tensor, lens: Sequence[int]) -> list[dict[str, float | None]]:
        """:meth:`measure` for each of the waveforms, float32 (B, T), with these lengths in samples."""
        return [statistics(f0[confidence >= 0.5]) for f0, confidence in self._detect(waveforms, lens)]

    def _detect_by_package(self, waveforms, lens) -> list[tuple[np.ndarray, np.ndarray]]:
        recordings = [row[:n] for row, n in zip(waveforms.cpu().numpy(), lens, strict=True)]
        found = self._pool.map(lambda one: self._detector.detect(one, ASR_HZ, MIN_HZ, MAX_HZ), recordings)
        return [(one.pitch_hz, one.confidence) for one in found]


def statistics(f0: np.ndarray) -> dict[str, float | None]:
    """F0 metrics of the F0 of voiced frames in Hz."""
    if len(f0) < MIN_VOICED_FRAMES:
        return dict.fromkeys(("f0_median_hz", "f0_range_semitones", "f0_std_semitones"))
    low, median, high = np.percentile(f0, (5, 50, 95))
    return {
        "f0_median_hz": float(median),
        "f0_range_semitones": float(12 * np.log2(high / low)),
        "f0_std_semitones": float(np.std(12 * np.log2(f0))),
    }
