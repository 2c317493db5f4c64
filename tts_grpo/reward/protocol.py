"""Protocol between reward server and client: tensor names, shapes and length buckets of the Triton models.

The model ``token2wav_asr`` scores rollouts. The model ``token2wav`` only synthesises them, for listening (see below).

A request has one rollout, or several of one bucket, in Triton's HTTP/JSON inference protocol (KServe v2). The version
of this protocol is the version of the Triton models, which is part of a request's address: a server of another version
refuses the request. The first four tensors are inputs of ``token2wav_asr``, the others are its outputs:

============== ======= ====== ============================================================
TOKENS         int32   [B, T] speech tokens, padded with 0 to a bucket (Triton batches only
                              requests of equal shape)
TOKEN_LENS     int32   [B, 1] number of speech tokens
GT_TEXT        bytes   [B, 1] reference text, UTF-8
LANGUAGE       bytes   [B, 1] its language, zh or en: the recognisers are told it, and numbers are
                              read in it
-------------- ------- ------ ------------------------------------------------------------
REWARDS        float32 [B, 1] in [0, 1]; NaN where ERRORS is not empty
ERROR_RATES    float32 [B, 1] pinyin error rate of the transcripts; NaN where ERRORS is not empty
TRANSCRIPTS    bytes   [B, 1] transcript by the first ASR model
PART_NAMES     bytes   [B, P] names of the parts of the reward
PARTS          float32 [B, P] scores of these parts in [0, 1]; -1 for a part that has none (only
                              parts that are not required)
UNIT_LOSSES    float32 [B, N] what the reward lost at each unit (syllable, word) of GT_TEXT,
                              padded with -1; at most 1 - REWARDS in all
UNIT_STARTS    int32   [B, N] index of the first speech token of each unit, padded with -1
SERVER         bytes   [B, 1] what the reward depends on besides the request, as a hash: content
                              of the models, voices, parts of the reward and their weights,
                              curve, tones, precision, and this protocol's version
RESCORED       int32   [B, 1] 1 if half precision overflowed and fp32 was used, else 0
ERRORS         bytes   [B, 1] empty, or the reason why this sample could not be scored
CHECKS         bytes   [B, 1] hash of the sample's request and answer, as the instance had them,
                              see :func:`answer_hash`
============== ======= ====== ============================================================

The inputs of ``token2wav`` are TOKENS, TOKEN_LENS and GT_TEXT as above; its outputs are:

============== ======= ====== ============================================================
WAVEFORM       int16   [B, S] speech with the voice prompt of this rollout's reward, padded with 0
WAVEFORM_LENS  int32   [B, 1] length of the waveform in samples
SAMPLE_RATE    int32   [B, 1] sample rate in Hz
ERRORS         bytes   [B, 1] empty, or the reason why this sample has no speech
============== ======= ====== ============================================================

A bad rollout (no speech tokens, or an id out of range) is never sent to the server; reward_tts.py gives it a reward of
0. An error of the server therefore never appears as a reward.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scripts/check.py imports the names before any environment exists
    import numpy as np

# Numbers that reward_tts.py returns for each rollout besides the score: 1 if so, else 0
ROLLOUT_COUNTS = ("bad_rollout", "unscored_rollout", "retried_rollout", "rescored_rollout", "empty_transcript")
SERVER_KEY = "reward_server"  # key of the server's hash beside these numbers
VERSION = (
    5  # of this protocol; 4 had no LANGUAGE, 3 had no CHECKS, and 2 had UNIT_ERRORS instead of UNIT_LOSSES and PARTS
)
MODEL_NAME = "token2wav_asr"
SPEECH_MODEL_NAME = "token2wav"
SPEECH_OUTPUT_NAMES = ("WAVEFORM", "WAVEFORM_LENS", "SAMPLE_RATE", "ERRORS")
OUTPUT_NAMES = (
    "REWARDS", "ERROR_RATES", "TRANSCRIPTS", "PART_NAMES", "PARTS", "UNIT_LOSSES", "UNIT_STARTS", "SERVER", "RESCORED",
    "ERRORS", "CHECKS",
)  # fmt: skip
PART_KEY = "reward_parts/"  # reward_tts.py returns each part's score under this key and the part's name
SECRET_FILE = "TTS_GRPO_SECRET_FILE"  # environment variable with the path of the file that holds a server's secret
SECRET_HEADER = "triton-access-token"  # PyTriton's name
# Only two buckets, so that batches fill: padding costs little to transfer, and the server sorts batches by length.
BUCKETS = (512, 2048)
MAX_TEXT_BYTES = 16_384  # longest GT_TEXT; a text that a rollout of 2048 speech tokens can speak has about 1000 bytes


def read_secret(path: str | Path) -> str:
    """Return the secret in a file, without white space around it.

    Raises:
        ValueError: it is shorter than 16 characters, or has other characters than letters, digits and + / = . _ -
    """
    secret = Path(path).read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[A-Za-z0-9+/=._-]{16,}", secret):
        raise ValueError(
            f"{path}: a secret has at least 16 letters, digits or + / = . _ -, as of: head -c 24 /dev/urandom | base64"
        )
    return secret


def secret_headers() -> dict[str, str]:
    """Return the HTTP headers of requests: the secret of ``TTS_GRPO_SECRET_FILE``, if that is set."""
    path = os.environ.get(SECRET_FILE)
    return {SECRET_HEADER: read_secret(path)} if path else {}


class AnswerError(ConnectionError):
    """An answer belongs to another request, or it or the request was changed on the way: the request is sent again."""


class SampleError(ValueError):
    """A server could not score a sample, although it scored others."""


@dataclass(frozen=True)
class RolloutScore:
    """The score of a rollout, in the server and in the client.

    Attributes:
        reward: reward in [0, 1]; NaN if ``error`` is not empty.
        error_rate: error rate against the reference text; NaN if ``error`` is not empty.
        transcript: transcript of the synthesised speech.
        unit_losses: what the reward lost at each unit (syllable or word) of the reference's usual reading, 0 or more;
            the rest of 1 - reward belongs to no unit. If another reading is aligned, its errors are mapped to these
            units. Empty if no part of the reward locates errors.
        unit_starts: index of the first speech token of each unit.
        parts: score of each part of the reward; -1 if a part that is not required has none.
        rescored: whether half precision overflowed, so that the speech was decoded again in fp32.
        error: why there is no score; empty if there is one.
        attempts: number of requests of the client until a server answered.
        server: what the reward depends on besides the request, as a hash.
    """

    reward: float = float("nan")
    error_rate: float = float("nan")
    transcript: str = ""
    unit_losses: tuple[float, ...] = ()
    unit_starts: tuple[int, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    rescored: bool = False
    error: str = ""
    attempts: int = field(default=1, compare=False)
    server: str = field(default="", compare=False)


def answer_hash(speech_tokens: Sequence[int], ground_truth: str, score: RolloutScore, language: str = "zh") -> str:
    """Return a hash of a request and its answer, with numbers as float32 and without the hash of the server.

    Triton and PyTriton pass tensors through several processes and shared memory. With this hash, the client notices
    answers to other requests, and tensors that were changed on the way in either direction.
    """
    names = sorted(score.parts)
    numbers = (score.reward, score.error_rate, *score.unit_losses, *(score.parts[name] for name in names))
    if score.error:
        numbers = ()
    content = (
        list(speech_tokens), struct.pack(f"<{len(numbers)}f", *numbers), score.unit_starts, names, score.rescored,
        *(text.rstrip("\0") for text in (ground_truth, language, score.transcript, score.error)),  # as numpy's bytes
    )  # fmt: skip
    return hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def bucket(num_tokens: int) -> int:
    """Return the length to which ``num_tokens`` speech tokens are padded.

    Raises:
        ValueError: there are more tokens than the largest bucket holds.
    """
    for size in BUCKETS:
        if num_tokens <= size:
            return size
    raise ValueError(f"{num_tokens} speech tokens: the reward server takes at most {BUCKETS[-1]}")


def encode_request(speech_tokens: Sequence[int], ground_truth: str, language: str = "zh") -> dict:
    """Return the JSON body of a request to score one rollout.

    Raises:
        ValueError: there are more speech tokens or more text than the server takes.
    """
    return _request(speech_tokens, {"GT_TEXT": ground_truth, "LANGUAGE": language}, OUTPUT_NAMES)


def encode_speech_request(speech_tokens: Sequence[int], ground_truth: str) -> dict:
    """Return the JSON body of a request to synthesise one rollout with the voice prompt with which it is scored.

    Raises:
        ValueError: as :func:`encode_request`.
    """
    return _request(speech_tokens, {"GT_TEXT": ground_truth}, SPEECH_OUTPUT_NAMES)


def _request(speech_tokens: Sequence[int], texts: Mapping[str, str], outputs: Sequence[str]) -> dict:
    if (length := len(texts["GT_TEXT"].encode("utf-8"))) > MAX_TEXT_BYTES:
        raise ValueError(f"a text of {length} bytes: the reward server takes at most {MAX_TEXT_BYTES}")
    size = bucket(len(speech_tokens))
    inputs = [
        {"name": "TOKENS", "shape": [1, size], "datatype": "INT32",
         "data": [*speech_tokens, *[0] * (size - len(speech_tokens))]},
        {"name": "TOKEN_LENS", "shape": [1, 1], "datatype": "INT32", "data": [len(speech_tokens)]},
        *({"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [text]} for name, text in texts.items()),
    ]  # fmt: skip
    return {"inputs": inputs, "outputs": [{"name": name} for name in outputs]}


def decode_speech_response(body: dict) -> tuple[list[int], int]:
    """Return one rollout's waveform as 16-bit samples, and its sample rate in Hz.

    Raises:
        KeyError: an output is missing, so the server does not implement this protocol.
        ValueError: the server could not synthesise the sample.
    """
    outputs = {output["name"]: output["data"] for output in body["outputs"]}
    waveform, (length,), (rate,), (error,) = (outputs[name] for name in SPEECH_OUTPUT_NAMES)
    if error:
        raise ValueError(f"the reward server could not synthesise a sample: {error}")
    return waveform[:length], rate


def text_tensor(values: Sequence[str]) -> np.ndarray:
    """Convert B texts to a bytes tensor of shape (B, 1)."""
    import numpy as np

    return np.char.encode(np.array(values, dtype=np.str_), "utf-8")[:, None]


def padded_tensor(rows: Sequence[Sequence[float]], dtype: str) -> np.ndarray:
    """Convert B rows of numbers to a tensor of shape (B, length of the longest row), padded with -1."""
    import numpy as np

    tensor = np.full((len(rows), max([1, *map(len, rows)])), -1, dtype)
    for values, row in zip(tensor, rows, strict=True):
        values[: len(row)] = row
    return tensor


def encode_response(
    scores: Sequence[RolloutScore], server: str, requests: Sequence[tuple[Sequence[int], str, str]]
) -> dict[str, np.ndarray]:
    """Return the tensors of the response for a batch.

    Args:
        scores: B scores.
        server: the server's hash.
        requests: speech tokens, text and language of the B requests.
    """
    import numpy as np

    names = sorted({name for score in scores for name in score.parts})  # samples with an error have none
    return {
        "REWARDS": np.array([[score.reward] for score in scores], np.float32),
        "ERROR_RATES": np.array([[score.error_rate] for score in scores], np.float32),
        "TRANSCRIPTS": text_tensor([score.transcript for score in scores]),
        "PART_NAMES": np.tile(text_tensor(names or [""]).T, (len(scores), 1)),
        "PARTS": np.array([[score.parts.get(name, -1.0) for name in names or [""]] for score in scores], np.float32),
        "UNIT_LOSSES": padded_tensor([score.unit_losses for score in scores], "float32"),
        "UNIT_STARTS": padded_tensor([score.unit_starts for score in scores], "int32"),
        "SERVER": text_tensor([server] * len(scores)),
        "RESCORED": np.array([[score.rescored] for score in scores], np.int32),
        "ERRORS": text_tensor([score.error for score in scores]),
        "CHECKS": text_tensor(
            [
                answer_hash(tokens, text, score, language)
                for (tokens, text, language), score in zip(requests, scores, strict=True)
            ]
        ),
    }


def decode_response(
    body: dict, speech_tokens: Sequence[int], ground_truth: str, language: str = "zh"
) -> RolloutScore:  # fmt: skip
    """Return the score of one rollout from a response; the inverse of :func:`encode_response`.

    Args:
        body: the response.
        speech_tokens: speech tokens of the request.
        ground_truth: text of the request.
        language: language of the request.

    Raises:
        AnswerError: the response is not the answer to this request.
        KeyError: an output is missing, so the server does not implement this protocol.
        SampleError: the server could not score the sample.
        ValueError: the reward is not in [0, 1], or the answer has another form.
    """
    try:
        outputs = {output["name"]: output["data"] for output in body["outputs"]}
        losses, starts = (tuple(n for n in outputs[name] if n >= 0) for name in ("UNIT_LOSSES", "UNIT_STARTS"))
        names, parts = outputs["PART_NAMES"], outputs["PARTS"]
        reward, error_rate, transcript, server, rescored, error, check = (
            outputs[name][0]
            for name in ("REWARDS", "ERROR_RATES", "TRANSCRIPTS", "SERVER", "RESCORED", "ERRORS", "CHECKS")
        )
    except (TypeError, IndexError) as fault:
        raise ValueError(f"the reward server's answer does not have the form of this protocol: {fault}") from fault
    if error:
        _verify(check, speech_tokens, ground_truth, RolloutScore(error=str(error)), language)
        raise SampleError(f"the reward server could not score a sample: {error}")
    if not isinstance(reward, int | float) or not 0.0 <= reward <= 1.0:
        raise ValueError(f"the reward server answered with a reward of {reward}")
    if not isinstance(error_rate, int | float) or not 0.0 <= error_rate < float("inf"):
        raise ValueError(f"the reward server answered with an error rate of {error_rate}")
    if not all(isinstance(text, str) for text in (transcript, server)):
        raise ValueError(f"the reward server answered with {transcript!r} and {server!r} instead of texts")
    if (
        not all(isinstance(n, int | float) and n < float("inf") for n in losses)
        or len(losses) != len(starts)
        or not all(isinstance(n, int) for n in starts)
    ):
        raise ValueError(f"the reward server answered with {losses} and {starts} instead of losses and positions")
    if not isinstance(names, list) or not isinstance(parts, list) or len(names) != len(parts) or not all(
        isinstance(name, str) and isinstance(score, int | float) and (score == -1 or 0 <= score <= 1)
        for name, score in zip(names, parts, strict=True)
    ):  # fmt: skip
        raise ValueError(f"the reward server answered with {names} and {parts} instead of parts and their scores")
    scores = {name: float(score) for name, score in zip(names, parts, strict=True) if name}
    answer = RolloutScore(
        float(reward), float(error_rate), transcript, tuple(map(float, losses)), starts, scores, bool(rescored),
        server=server,
    )  # fmt: skip
    _verify(check, speech_tokens, ground_truth, answer, language)
    return answer


def _verify(check, speech_tokens: Sequence[int], ground_truth: str, answer: RolloutScore, language: str) -> None:
    try:
        wanted = answer_hash(speech_tokens, ground_truth, answer, language)
    except OverflowError:  # a number is too large for float32
        wanted = None
    if check != wanted:
        raise AnswerError("the answer of the reward server is not that to this request, or was changed on the way")
