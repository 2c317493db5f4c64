"""Speaker embeddings, and speaker similarity to the prompt."""

import importlib.metadata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.quality import NETWORK_METRICS

BATCH = 32  # recordings that WavLM embeds at once
BATCH_S = 4  # length to which it cuts or repeats them


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


class CamPlus:
    """Speaker embedding of CAM++ (Wang et al., INTERSPEECH 2023), ``campplus.onnx`` of the CosyVoice2 folder.

    It runs on the CPU, one recording at a time and as many at once as torch has threads.
    """

    def __init__(self, path: Path):
        import onnxruntime

        self.name = "CAM++"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # do not occupy cores while waiting
        self._network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def embed(self, speech: np.ndarray) -> np.ndarray | None:
        """Unit vector (192,) of a recording, float32 (T,) at 16 kHz; None if it is shorter than 0.25 s or all zeros.

        The features are those of CosyVoice's front end: 80 mel bands without dither, minus their mean over time.
        """
        from torchaudio.compliance import kaldi

        if len(speech) < ASR_HZ // 4 or not np.any(speech):
            return None
        features = kaldi.fbank(torch.from_numpy(speech)[None], num_mel_bins=80, dither=0, sample_frequency=ASR_HZ)
        features = features - features.mean(dim=0, keepdim=True)
        (embedding,) = self._network.run(None, {self._network.get_inputs()[0].name: features[None].numpy()})
        return embedding[0] / np.linalg.norm(embedding[0])

    def embed_all(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """:meth:`embed` for several recordings."""
        return list(self._pool.map(self.embed, recordings))


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
