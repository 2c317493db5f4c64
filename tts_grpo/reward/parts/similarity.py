"""Similarity: the cosine of the speaker embeddings of a rollout and of its prompt voice."""

from pathlib import Path

import numpy as np

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.audio import resample
from tts_grpo.speech.nets.speaker import CamPlus, Resemblyzer, WavLm

CAMPPLUS = "campplus.onnx"  # in the folder of CosyVoice2-0.5B


class Reward:
    """Cosine similarity, from 0 at ``worst`` to 1 at ``best``. The score of a rollout without speech is 0.

    Args:
        encoder: campplus (CAM++, of the CosyVoice2 folder), resemblyzer, or a WavLM folder with an x-vector head.
            By default campplus if the token2wav folder has it, else resemblyzer.
        worst, best: limits of the scale.
    """

    needs = ("voice",)

    def __init__(self, context: Context, encoder: str = "", worst: float = 0.0, best: float = 1.0):
        network = Path(context.token2wav_dir or "", CAMPPLUS)
        encoder = encoder or ("campplus" if network.is_file() else "resemblyzer")
        if encoder == "campplus":
            self.encoder = CamPlus(network, context.device)
        elif encoder == "resemblyzer":
            self.encoder = Resemblyzer(context.device)
        else:
            self.encoder = WavLm(Path(encoder), context.device)
        self.worst, self.best, self.voices = worst, best, {}

    def _voice(self, voice) -> np.ndarray:
        if id(voice) not in self.voices:
            (embedding,) = self.encoder.embed_all([voice.prompt_speech_16k])
            if embedding is None:
                raise RuntimeError(f"no speech is detected in the prompt voice {voice.prompt_text!r}: use another one")
            self.voices[id(voice)] = (voice, embedding)  # the voice is kept, so that its id stays its own
        return self.voices[id(voice)][1]

    def __call__(self, batch: Batch) -> list[float]:
        scores = []
        for voice, embedding in zip(batch.voices, self.encoder.embed_all(batch.recordings), strict=True):
            cosine = -1.0 if embedding is None else float(embedding @ self._voice(voice))
            scores.append(min(1.0, max(0.0, (cosine - self.worst) / (self.best - self.worst))))
        return scores

    def spoiled(self, batch: Batch) -> Batch:
        """Play the recordings a third faster, which changes pitch and formants."""
        return batch.with_recordings([resample(one, 4, 3) for one in batch.recordings])
