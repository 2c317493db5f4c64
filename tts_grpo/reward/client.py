"""Client for the reward servers, with concurrent requests, round robin over servers, and bounded retries.

A request that fails raises an error; it never gives a default reward.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import re
import time
from collections.abc import Sequence

import aiohttp

from tts_grpo.reward.protocol import (
    MODEL_NAME,
    VERSION,
    RolloutScore,
    SampleError,
    decode_response,
    encode_request,
    secret_headers,
)

logger = logging.getLogger(__name__)

RETRIED_STATUS = (429, 500, 502, 503, 504)


def cause(answer: str) -> str:
    """Return what Triton's answer to a failed request says; of a traceback of the server, its last exception."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        answer = str(json.loads(answer)["error"])
    exceptions = re.findall(r"^[\w.]*(?:Error|Exception): .*", answer, re.MULTILINE)
    return (exceptions[-1] if exceptions else answer.strip())[:500]


class RewardServerError(RuntimeError):
    """No reward could be computed, and the cause is not the rollout: training must stop."""


class UnscoredRolloutError(RewardServerError):
    """Servers that score other rollouts could not score this one."""


class RewardClient:
    """Scores rollouts on one or several reward servers, in round robin.

    A client belongs to one event loop and opens its connections with the first request.

    Args:
        server_urls: base URLs of the servers, such as "http://127.0.0.1:8000".
        max_in_flight: largest number of unanswered requests; further requests wait in the client.
        timeout_s: timeout of one request in seconds, including the time in the server's queue.
        patience_s: time in seconds, from its first failure, for which a request is retried, each time at the next
            server. It should be longer than a server takes to restart; 0 means one attempt.
        backoff_s: wait in seconds after the first failed attempt; it doubles with each further one.
        max_backoff_s: longest wait in seconds between two attempts.
    """

    def __init__(self, server_urls: Sequence[str], max_in_flight: int = 256, timeout_s: float = 300.0,
                 patience_s: float = 180.0, backoff_s: float = 0.5, max_backoff_s: float = 15.0):  # fmt: skip
        if not server_urls:
            raise ValueError("no reward server is given")
        self.server_urls = [url.rstrip("/") for url in server_urls]
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.backoff_s, self.max_backoff_s = backoff_s, max_backoff_s
        self._request_numbers, self._identity = itertools.count(), None
        self._slots = asyncio.Semaphore(max_in_flight)
        self._session: aiohttp.ClientSession | None = None

    async def score(self, speech_tokens: Sequence[int], ground_truth: str, language: str = "zh") -> RolloutScore:
        """Score one rollout against its reference text, which is in the given language.

        Raises:
            RewardServerError: no server returned a reward in time, or a server refused the request.
            UnscoredRolloutError: a server could not score this rollout, nor could the next one (or the same one again).
        """
        request = (speech_tokens, ground_truth, language)
        body = json.dumps(encode_request(*request), ensure_ascii=False).encode()
        async with self._slots:
            first, failed_at, sample_error = next(self._request_numbers), None, None
            for attempt in itertools.count():
                url = self.server_urls[(first + attempt) % len(self.server_urls)]
                try:
                    answer = await self._request(url, body, *request)
                    score = dataclasses.replace(answer, attempts=attempt + 1)
                    self._check_identity(score.server, url)
                    return score
                except SampleError as error:
                    if sample_error:
                        raise UnscoredRolloutError(f"{url}: {error}; before that, {sample_error}") from error
                    sample_error = f"{url}: {error}"
                    continue
                except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
                    failure = f"{url}: {type(error).__name__}: {error}"
                failed_at = failed_at or time.monotonic()
                wait_s, waited_s = min(self.max_backoff_s, self.backoff_s * 2**attempt), time.monotonic() - failed_at
                if waited_s + wait_s > self.patience_s:
                    break
                logger.warning("reward request failed (%s), retrying in %.1f s", failure, wait_s)
                await asyncio.sleep(wait_s)
            raise RewardServerError(
                f"no reward after {attempt + 1} attempts, {waited_s:.0f} s after the first failure; the last failed "
                f"with {failure}. Is the reward server running? Start it with: bash run.sh 1 1; then start training "
                "again: it resumes from its last checkpoint"
            )

    def _check_identity(self, server: str, url: str) -> None:
        """Raise RewardServerError if a server differs from the first one that answered this client."""
        first, first_url = self._identity = self._identity or (server, url)
        if server != first:
            before = f"{first_url} does" if first_url != url else "it did before"
            raise RewardServerError(
                f"{url} computes other rewards than {before}: its models, voices, curve, tones or precision "
                "differ. Start the same server everywhere; training resumes from its last checkpoint"
            )

    async def _request(self, url: str, body: bytes, *request) -> RolloutScore:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=secret_headers(),
                timeout=aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=10.0),
                connector=aiohttp.TCPConnector(limit=0),
            )
        path = f"/v2/models/{MODEL_NAME}/versions/{VERSION}/infer"
        async with self._session.post(url + path, data=body) as response:
            answer = await response.text()
            if response.status in RETRIED_STATUS:
                raise aiohttp.ClientError(f"status {response.status}: {cause(answer)}")
            if response.status != 200:
                await self._check_version(url)
                if cause(answer).startswith("Request for unknown model"):  # Triton has started, the model has not
                    raise aiohttp.ClientError(f"status {response.status}: {cause(answer)}")
                raise RewardServerError(f"{url} refused a request with status {response.status}: {cause(answer)}")
        try:
            return decode_response(json.loads(answer), *request)
        except SampleError:
            raise
        except (KeyError, ValueError) as error:
            raise RewardServerError(f"{url}: {type(error).__name__}: {error}") from error

    async def _check_version(self, url: str) -> None:
        """Raise RewardServerError if a server has the reward model, but in other versions of the protocol."""
        async with self._session.get(f"{url}/v2/models/{MODEL_NAME}") as response:
            versions = (await response.json(content_type=None)).get("versions", []) if response.status == 200 else []
        if versions and str(VERSION) not in versions:
            raise RewardServerError(
                f"{url} has version {', '.join(versions)} of the reward protocol, this program version {VERSION}: "
                "start the server from the same release as the training"
            )

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None
