"""Speaker embeddings, and speaker similarity to the prompt."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.quality import NETWORK_METRICS


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

    @torch.inference_mode()
    def embed(self, speech: np.ndarray) -> np.ndarray | None:
        """Unit vector of a recording, float32 (T,) at 16 kHz; None if it is shorter than 0.25 s or all zeros."""
        if len(speech) < ASR_HZ // 4 or not np.any(speech):
            return None
        inputs = self._features(speech, sampling_rate=ASR_HZ, return_tensors="pt").to(self._model.device)
        return torch.nn.functional.normalize(self._model(**inputs).embeddings, dim=-1)[0].cpu().numpy()


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
