"""Speaker embeddings, and speaker similarity to the prompt."""

import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ, batches_of_similar_length, load_audio
from tts_grpo.speech.decoder import tf32
from tts_grpo.speech.quality import NETWORK_METRICS

logger = logging.getLogger(__name__)

BATCH = 32  # most recordings that WavLM and CAM++ embed at once
BATCH_S = 4  # length to which WavLM cuts or repeats them
FBANK_WINDOW, FBANK_HOP = 400, 160  # samples, of CAM++
MAX_ERROR = 1e-3  # largest tolerated difference of CAM++ on a GPU from onnxruntime, relative


class Resemblyzer:
    """Speaker embedding of the package Resemblyzer (GE2E; Wan et al., ICASSP 2018), which contains the weights."""

    def __init__(self, device: str = "cpu"):
        from resemblyzer import VoiceEncoder

        self.name = f"Resemblyzer {importlib.metadata.version('Resemblyzer')}"
        self._encoder = VoiceEncoder(device, verbose=False)

    def embed(self, speech: np.ndarray) -> np.ndarray | None:
        """Unit vector (256,) of a recording, float32 (T,) at 16 kHz; None if no speech is detected in it."""
        from resemblyzer import preprocess_wav

        if not np.any(speech):
            return None
        speech = preprocess_wav(speech)
        embedding = self._encoder.embed_utterance(speech) if len(speech) else np.array([np.nan])
        return embedding if np.isfinite(embedding).all() else None  # the network's normalisation may divide 0 by 0

    def embed_all(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """:meth:`embed` for several recordings."""
        return [self.embed(recording) for recording in recordings]


class WavLm:
    """Speaker embedding of a WavLM with an x-vector head in a Hugging Face folder, such as wavlm-base-plus-sv.

    Raises:
        ValueError: the folder is that of another model, or its weights do not match.
    """

    def __init__(self, model_dir: Path, device: str = "cpu"):
        from transformers import AutoConfig, AutoFeatureExtractor, WavLMForXVector

        kinds = AutoConfig.from_pretrained(model_dir).architectures
        if kinds != ["WavLMForXVector"]:
            raise ValueError(f"{model_dir}: config.json has the architectures {kinds}: not a WavLMForXVector")
        self._model, report = WavLMForXVector.from_pretrained(model_dir, output_loading_info=True)
        wrong = [*report["missing_keys"], *report["mismatched_keys"]]
        if wrong:
            raise ValueError(f"{model_dir}: weights are missing or of another shape: {wrong[:3]}")
        self._model.to(device).eval()
        self._features = AutoFeatureExtractor.from_pretrained(model_dir)
        self.name = f"WavLM {Path(model_dir).name}"

    def embed(self, speech: np.ndarray) -> np.ndarray | None:
        """Unit vector of a recording, float32 (T,) at 16 kHz; None if it is shorter than 0.25 s or all zeros."""
        if len(speech) < ASR_HZ // 4 or not np.any(speech):
            return None
        return self._embed_equal([speech])[0]

    @torch.inference_mode()
    def _embed_equal(self, recordings: Sequence[np.ndarray]) -> np.ndarray:
        inputs = self._features(list(recordings), sampling_rate=ASR_HZ, return_tensors="pt").to(self._model.device)
        return torch.nn.functional.normalize(self._model(**inputs).embeddings, dim=-1).cpu().numpy()

    def embed_all(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """Embed recordings in batches, each by the four seconds in its middle; shorter ones are repeated.

        All have the same length then, so that no padding changes an embedding.
        """
        size, results = BATCH_S * ASR_HZ, [None] * len(recordings)
        usable = [i for i, one in enumerate(recordings) if len(one) >= ASR_HZ // 4 and np.any(one)]
        for first in range(0, len(usable), BATCH):
            chosen = usable[first : first + BATCH]
            middles = [max(0, (len(recordings[i]) - size) // 2) for i in chosen]
            pieces = [np.resize(recordings[i][at : at + size], size) for i, at in zip(chosen, middles, strict=True)]
            for i, embedding in zip(chosen, self._embed_equal(pieces), strict=True):
                results[i] = embedding
        return results


def campplus_features(waveforms: torch.Tensor, lens: Sequence[int]) -> list[torch.Tensor]:
    """Features (frames, 80) of each waveform: 80 mel bands without dither, minus their mean over time.

    As in CosyVoice's front end (``CosyVoiceFrontEnd._extract_spk_embedding``), but for a batch: the bands of a frame
    depend on its own 25 ms, so that they are computed on the waveforms one after another, each from a frame's start.

    Args:
        waveforms: float32 (B, T), 16 kHz.
        lens: their lengths in samples, at least 25 ms.
    """
    from torchaudio.compliance import kaldi

    frames = -(-waveforms.shape[1] // FBANK_HOP)
    speech = torch.nn.functional.pad(waveforms, (0, frames * FBANK_HOP - waveforms.shape[1])).flatten()
    speech = torch.nn.functional.pad(speech, (0, FBANK_WINDOW))[None]
    bands = kaldi.fbank(speech, num_mel_bins=80, dither=0, sample_frequency=ASR_HZ)
    bands = bands[: len(waveforms) * frames].view(len(waveforms), frames, 80)
    bands = [row[: 1 + (n - FBANK_WINDOW) // FBANK_HOP] for row, n in zip(bands, lens, strict=True)]
    return [one - one.mean(dim=0, keepdim=True) for one in bands]


class CamPlusNetwork:
    """The network of CAM++ for a batch of recordings, on any device, with the weights of ``campplus.onnx``.

    Architecture: https://github.com/modelscope/3D-Speaker (``speakerlab/models/campplus``). In the exported graph batch
    normalisation is part of the convolution before it where there is one. The input of each convolution over time is
    set to zero after the end of each recording, and means over time are those of the recording.

    cuDNN plans each convolution anew for each shape, which takes longer than the convolution. Most of them are matrix
    products here, therefore, and lengths are rounded up.

    Raises:
        ValueError: the graph has other convolutions.
    """

    BLOCKS = (12, 24, 16)  # layers
    CONVOLUTIONS, NORMALISATIONS = 225, 56
    SEGMENT = 100  # frames
    ROUNDED = 64  # frames; the length of a batch is a multiple of it

    def __init__(self, path: Path, device: str = "cpu"):
        import onnx

        graph = onnx.load(str(path)).graph
        values = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
            elif node.op_type == "Identity" and node.input[0] in values:
                values[node.output[0]] = values[node.input[0]]
        self.device, self.convolutions, self.normalisations = device, [], []
        for node in graph.node:
            if node.op_type not in ("Conv", "BatchNormalization"):
                continue
            weights = [torch.from_numpy(values[name].copy()).to(device) for name in node.input[1:]]
            attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
            if node.op_type == "Conv":
                bias = weights[1] if len(weights) > 1 else None
                self.convolutions.append((weights[0], bias, attributes["strides"], attributes["dilations"]))
            else:
                weight, bias, mean, variance = weights
                scale = weight / (variance + attributes.get("epsilon", 1e-5)).sqrt()
                self.normalisations.append((scale, bias - mean * scale))
        found = len(self.convolutions), len(self.normalisations)
        if found != (self.CONVOLUTIONS, self.NORMALISATIONS):
            raise ValueError(f"{path}: {found[0]} convolutions and {found[1]} batch normalisations: not CAM++ as known")

    @torch.inference_mode()
    def __call__(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embeddings (B, 192) of features, each (frames, 80)."""
        relu = torch.relu
        x = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True).to(self.device)
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.ROUNDED)).transpose(1, 2)[:, None]
        lens = torch.tensor(list(map(len, features)), device=self.device)
        convolutions, normalisations = iter(self.convolutions), iter(self.normalisations)

        def mask(x):
            return torch.arange(x.shape[-1], device=self.device) < lens.view(-1, *[1] * (x.ndim - 1))

        def convolve(x):
            weight, bias, stride, dilation = next(convolutions)
            if weight.shape[-1] > 1:
                x = x * mask(x)
            if x.ndim == 3 and stride == [1]:
                return product(x, weight, bias, dilation[0])
            padding = [d * (n - 1) // 2 for d, n in zip(dilation, weight.shape[2:], strict=True)]
            function = torch.nn.functional.conv2d if x.ndim == 4 else torch.nn.functional.conv1d
            return function(x, weight, bias, stride=stride, padding=padding, dilation=dilation)

        def product(x, weight, bias, dilation):
            """The convolution over time as one matrix product."""
            size, frames = weight.shape[-1], x.shape[-1]
            if size > 1:
                x = torch.nn.functional.pad(x, [dilation * (size - 1) // 2] * 2)
                x = torch.cat([x[..., dilation * i : dilation * i + frames] for i in range(size)], dim=1)
            y = weight.transpose(1, 2).flatten(1) @ x
            return y if bias is None else y + bias[:, None]

        def normalise(x):
            scale, shift = (one[:, None] for one in next(normalisations))
            return x * scale + shift

        x = relu(convolve(x))
        for changes_shape in (True, False, True, False):
            y = convolve(relu(convolve(x)))
            x = relu(y + (convolve(x) if changes_shape else x))
        x = relu(convolve(x)).flatten(1, 2)
        x = relu(convolve(x))
        lens = (lens - 1) // 2 + 1  # that convolution has a stride of 2
        for layers in self.BLOCKS:
            for _ in range(layers):
                y = relu(convolve(relu(normalise(x))))
                local, context = convolve(y), self._context(y * mask(y), lens)
                x = torch.cat([x, local * convolve(relu(convolve(context))).sigmoid()], dim=1)
            x = convolve(relu(normalise(x)))
        x, inside, n = relu(x), mask(x), lens[:, None]
        mean = (x * inside).sum(-1) / n
        deviation = (((x - mean[..., None]) * inside).square().sum(-1) / (n - 1)).sqrt()
        return normalise(convolve(torch.cat([mean, deviation], dim=1)[..., None]))[..., 0]

    def _context(self, x: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """Mean over the recording plus mean over each segment of (B, C, T), which is zero after each end."""
        frames = x.shape[-1]
        segments = torch.nn.functional.pad(x, (0, -frames % self.SEGMENT)).unflatten(-1, (-1, self.SEGMENT)).sum(-1)
        starts = torch.arange(segments.shape[-1], device=self.device) * self.SEGMENT
        counts = (lens[:, None] - starts).clamp(1, self.SEGMENT)[:, None]
        segments = (segments / counts).repeat_interleave(self.SEGMENT, dim=-1)[..., :frames]
        return segments + x.sum(-1, keepdim=True) / lens[:, None, None]


class CamPlus:
    """Speaker embedding of CAM++ (Wang et al., INTERSPEECH 2023), ``campplus.onnx`` of the CosyVoice2 folder.

    On a GPU it runs in batches (:class:`CamPlusNetwork`), if that agrees with onnxruntime on the file. Otherwise
    onnxruntime runs it on the CPU, one recording at a time and as many at once as torch has threads.
    """

    def __init__(self, path: Path, device: str = "cpu"):
        import onnxruntime

        self.name, self.device = "CAM++", torch.device(device)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # do not occupy cores while waiting
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        self._run = self._run_onnx if self.device.type == "cpu" else self._batched(path)

    def _run_onnx(self, features: Sequence[torch.Tensor]) -> np.ndarray:
        """Embeddings (B, 192) of features, each (frames, 80)."""
        name = self._session.get_inputs()[0].name
        rows = [one[None].cpu().numpy() for one in features]
        return np.concatenate(list(self._pool.map(lambda row: self._session.run(None, {name: row})[0], rows)))

    def _batched(self, path: Path) -> Callable[[Sequence[torch.Tensor]], np.ndarray]:
        """The network on the device; if it does not agree with onnxruntime, onnxruntime, which takes longer."""
        generator = torch.Generator().manual_seed(0)
        features = [torch.randn(frames, 80, generator=generator) for frames in (467, 93)]
        expected = self._run_onnx(features)
        try:
            network = CamPlusNetwork(path, self.device)

            def run(features: Sequence[torch.Tensor]) -> np.ndarray:
                with tf32(False):
                    return network(features).cpu().numpy()

            error = np.linalg.norm(run(features) - expected) / np.linalg.norm(expected)
            if not error < MAX_ERROR:
                raise ValueError(f"the network differs from onnxruntime by {error:.2g} (relative)")
            return run
        except torch.cuda.OutOfMemoryError:  # a fault of the machine, and not of the file
            raise
        except (ValueError, KeyError, StopIteration, RuntimeError) as fault:
            logger.warning("CAM++ runs on the CPU by onnxruntime and slows the reward server down: %s", fault)
            return self._run_onnx

    def embed(self, speech: np.ndarray) -> np.ndarray | None:
        """Unit vector (192,) of a recording, float32 (T,) at 16 kHz; None if it is shorter than 0.25 s or all zeros."""
        return self.embed_all([speech])[0]

    def embed_all(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """:meth:`embed` for several recordings.

        Raises:
            RuntimeError: an embedding is not finite.
        """
        results: list = [None] * len(recordings)
        usable = [i for i, one in enumerate(recordings) if len(one) >= ASR_HZ // 4 and np.any(one)]
        for batch in batches_of_similar_length([len(recordings[i]) for i in usable], BATCH):
            chosen = [usable[i] for i in batch]
            speech = [torch.from_numpy(np.ascontiguousarray(recordings[i])) for i in chosen]
            waveforms = torch.nn.utils.rnn.pad_sequence(speech, batch_first=True).to(self.device)
            embeddings = self._run(campplus_features(waveforms, list(map(len, speech))))
            if not np.isfinite(embeddings).all():
                raise RuntimeError("CAM++ gave an embedding that is not finite")
            for i, embedding in zip(chosen, embeddings, strict=True):
                results[i] = embedding / np.linalg.norm(embedding)
        return results


class SpeakerSimilarity:
    """Cosine similarity of the speaker embeddings of an utterance and of its prompt.

    Args:
        encoder: speaker encoder.
        reference: recordings of the voice to compare with utterances without a prompt; their embeddings are averaged.
    """

    def __init__(self, encoder: Resemblyzer | WavLm, reference: Sequence[Path] = ()):
        self.name, self._embed, self._cache = encoder.name, encoder.embed, {}
        self.reference = tuple(reference)

    def _voice(self, paths: tuple[Path, ...]) -> np.ndarray:
        if paths not in self._cache:
            embeddings = [self._embed(load_audio(path)) for path in paths]
            if any(e is None for e in embeddings):
                raise ValueError(
                    f"no speech detected in {', '.join(map(str, paths))}: speaker similarity needs another recording"
                )
            mean = np.mean(embeddings, axis=0)
            self._cache[paths] = mean / np.linalg.norm(mean)
        return self._cache[paths]

    def measure(self, speech: np.ndarray, prompt_audio: str | None) -> dict[str, float]:
        """``speaker_similarity``; empty if there is neither a prompt nor a reference recording."""
        paths = (Path(prompt_audio),) if prompt_audio else self.reference
        if not paths:
            return {}
        embedding = self._embed(speech)
        worst = NETWORK_METRICS["speaker_similarity"].worst
        return {"speaker_similarity": worst if embedding is None else float(embedding @ self._voice(paths))}
