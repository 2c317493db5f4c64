"""Remote: scores by another program, over HTTP.

For each rollout the program gets a POST request with the JSON object::

    {"version": 1, "text": "...", "language": "zh", "sample_rate_hz": 16000, "waveform": "..."}

where ``waveform`` has the samples as 16-bit little-endian integers in base64. It answers with status 200 and
``{"version": 1, "score": 0.7}``, the score in [0, 1].
"""

import base64
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tts_grpo.reward.parts.interface import Batch, Context
from tts_grpo.speech.audio import ASR_HZ

VERSION = 1


class Reward:
    """The scores of ``url``.

    A request that fails for a reason of the connection, or with status 429 or 5xx, is sent again for ``patience_s``
    seconds. Then the batch fails, and the client of the reward server sends its rollouts again later; no score is made
    up. An answer of another form is an error of its rollout.

    Args:
        url: address of the program, such as http://10.0.0.2:9000/score.
        timeout_s: longest wait for one answer.
        patience_s: time for which failed requests are repeated; keep it well below ``batch_timeout_s``.
        concurrency: largest number of requests in flight.
    """

    def __init__(self, context: Context, url: str, timeout_s: float = 30.0, patience_s: float = 60.0,
                 concurrency: float = 16):  # fmt: skip
        self.url, self.timeout_s, self.patience_s = url, timeout_s, patience_s
        self.pool = ThreadPoolExecutor(int(concurrency))
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an address of the own network

    def __call__(self, batch: Batch) -> list[float]:
        texts = [reference.raw for reference in batch.references]
        return list(self.pool.map(self._score, batch.recordings, texts, batch.languages))

    def _score(self, recording: np.ndarray, text: str, language: str) -> float:
        samples = np.round(np.clip(recording, -1, 1) * 32767).astype("<i2")
        body = {"version": VERSION, "text": text, "language": language, "sample_rate_hz": ASR_HZ,
                "waveform": base64.b64encode(samples.tobytes()).decode()}  # fmt: skip
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        end, wait_s = time.monotonic() + self.patience_s, 0.2
        while True:
            try:
                with self.opener.open(request, timeout=self.timeout_s) as response:
                    return self._parse(response.read())
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {error.read()[:200].decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"the scorer {self.url} refused a rollout with {failure}") from None
            except OSError as error:
                failure = f"{type(error).__name__}: {error}"
            if time.monotonic() + wait_s > end:
                raise OSError(
                    f"the scorer {self.url} gave no score in {self.patience_s:g} s: {failure}: is it running?"
                )
            time.sleep(wait_s)
            wait_s *= 2

    def _parse(self, answer: bytes) -> float:
        try:
            found = json.loads(answer)
            version, score = found.get("version"), found["score"]
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"the scorer {self.url} answered {answer[:80]!r} instead of a score") from None
        if version != VERSION:
            raise ValueError(f"the scorer {self.url} has version {version!r} of the protocol, this recipe {VERSION}")
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(f"the scorer {self.url} answered with the score {score!r}: expected a number from 0 to 1")
        return float(score)
