"""What reward server and client say to each other: names, shapes and buckets of Triton's model ``token2wav_asr``.

Beside it the server has the model ``token2wav``, which only speaks, for those who want to listen (see below).

A request is one rollout or several of one bucket, as Triton's HTTP/JSON inference protocol (KServe v2) has it:

============== ======= ====== ============================================================
TOKENS         int32   [B, T] speech tokens, padded with 0 to a bucket (Triton batches only
                              requests of equal shape)
TOKEN_LENS     int32   [B, 1] number of speech tokens
GT_TEXT        bytes   [B, 1] what was to be said, UTF-8
-------------- ------- ------ ------------------------------------------------------------
REWARDS        float32 [B, 1] in [0, 1]; NaN where ERRORS is not empty
ERROR_RATES    float32 [B, 1] pinyin error rate that the reward is made of; NaN likewise
TRANSCRIPTS    bytes   [B, 1] what was heard
UNIT_ERRORS    int32   [B, N] errors at each unit (syllable, word) of GT_TEXT, padded with -1
UNIT_STARTS    int32   [B, N] the speech token with which each begins, padded with -1
ERRORS         bytes   [B, 1] empty, or why this sample could not be scored
============== ======= ====== ============================================================

``token2wav`` takes TOKENS and TOKEN_LENS as above, and gives

============== ======= ====== ============================================================
WAVEFORM       int16   [B, S] speech in the voice of the reward, padded with 0
WAVEFORM_LENS  int32   [B, 1] its length in samples
SAMPLE_RATE    int32   [B, 1] in Hz
ERRORS         bytes   [B, 1] empty, or why this sample could not be spoken
============== ======= ====== ============================================================

A bad rollout (nothing said, ids out of range) never comes here: the client scores it. So an error is never a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scripts/check.py reads the names here where there is no environment yet
    import numpy as np

MODEL_NAME = "token2wav_asr"
SPEECH_MODEL_NAME = "token2wav"
SPEECH_OUTPUT_NAMES = ("WAVEFORM", "WAVEFORM_LENS", "SAMPLE_RATE", "ERRORS")
OUTPUT_NAMES = ("REWARDS", "ERROR_RATES", "TRANSCRIPTS", "UNIT_ERRORS", "UNIT_STARTS", "ERRORS")
# Few, so that batches fill: zeros cost next to nothing on the way, and the server sorts what it gets by length.
BUCKETS = (512, 2048)


@dataclass(frozen=True)
class RolloutScore:
    """A rollout's score, in the server and in the client; ``error`` says why there is none, and is empty otherwise.

    Attributes:
        unit_errors: errors at each unit (syllable or word) of the ground truth's usual reading; their sum over the
            number of units is the error rate. Another right reading's errors are placed where the usual one's are.
        unit_starts: the speech token with which each of them begins.
    """

    reward: float = float("nan")
    error_rate: float = float("nan")
    transcript: str = ""
    unit_errors: tuple[int, ...] = ()
    unit_starts: tuple[int, ...] = ()
    error: str = ""


def bucket(num_tokens: int) -> int:
    """The length that ``num_tokens`` speech tokens are padded to.

    Raises:
        ValueError: more tokens than the largest bucket.
    """
    for size in BUCKETS:
        if num_tokens <= size:
            return size
    raise ValueError(f"{num_tokens} speech tokens: the reward server takes at most {BUCKETS[-1]}")


def encode_request(speech_tokens: Sequence[int], ground_truth: str) -> dict:
    """The JSON body of one rollout's request."""
    text = {"name": "GT_TEXT", "shape": [1, 1], "datatype": "BYTES", "data": [ground_truth]}
    return {"inputs": [*_token_inputs(speech_tokens), text], "outputs": [{"name": name} for name in OUTPUT_NAMES]}


def encode_speech_request(speech_tokens: Sequence[int]) -> dict:
    """The JSON body of a request to hear one rollout."""
    return {"inputs": _token_inputs(speech_tokens), "outputs": [{"name": name} for name in SPEECH_OUTPUT_NAMES]}


def _token_inputs(speech_tokens: Sequence[int]) -> list[dict]:
    size = bucket(len(speech_tokens))
    return [
        {"name": "TOKENS", "shape": [1, size], "datatype": "INT32",
         "data": [*speech_tokens, *[0] * (size - len(speech_tokens))]},
        {"name": "TOKEN_LENS", "shape": [1, 1], "datatype": "INT32", "data": [len(speech_tokens)]},
    ]  # fmt: skip


def decode_speech_response(body: dict) -> tuple[list[int], int]:
    """One rollout's speech as 16-bit samples, and its sample rate in Hz.

    Raises:
        KeyError: an output is missing: this is no server of this protocol.
        ValueError: the server could not speak the sample.
    """
    outputs = {output["name"]: output["data"] for output in body["outputs"]}
    waveform, (length,), (rate,), (error,) = (outputs[name] for name in SPEECH_OUTPUT_NAMES)
    if error:
        raise ValueError(f"the reward server could not speak a sample: {error}")
    return waveform[:length], rate


def text_tensor(values: Sequence[str]) -> np.ndarray:
    """Texts as a tensor of bytes (B, 1)."""
    import numpy as np

    return np.char.encode(np.array(values, dtype=np.str_), "utf-8")[:, None]


def padded_tensor(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of numbers as a tensor int32 (B, longest row), padded with -1."""
    import numpy as np

    tensor = np.full((len(rows), max([1, *map(len, rows)])), -1, np.int32)
    for values, row in zip(tensor, rows, strict=True):
        values[: len(row)] = row
    return tensor


def encode_response(scores: Sequence[RolloutScore]) -> dict[str, np.ndarray]:
    """The tensors of a batch's answer."""
    import numpy as np

    return {
        "REWARDS": np.array([[score.reward] for score in scores], np.float32),
        "ERROR_RATES": np.array([[score.error_rate] for score in scores], np.float32),
        "TRANSCRIPTS": text_tensor([score.transcript for score in scores]),
        "UNIT_ERRORS": padded_tensor([score.unit_errors for score in scores]),
        "UNIT_STARTS": padded_tensor([score.unit_starts for score in scores]),
        "ERRORS": text_tensor([score.error for score in scores]),
    }


def decode_response(body: dict) -> RolloutScore:
    """One rollout's answer: the inverse of :func:`encode_response`.

    Raises:
        KeyError: an output is missing: this is no server of this protocol.
        ValueError: the server could not score the sample, or its reward is not in [0, 1].
    """
    outputs = {output["name"]: output["data"] for output in body["outputs"]}
    units, starts = (tuple(n for n in outputs[name] if n >= 0) for name in ("UNIT_ERRORS", "UNIT_STARTS"))
    reward, error_rate, transcript, error = (
        outputs[name][0] for name in ("REWARDS", "ERROR_RATES", "TRANSCRIPTS", "ERRORS")
    )
    if error:
        raise ValueError(f"the reward server could not score a sample: {error}")
    if not isinstance(reward, int | float) or not 0.0 <= reward <= 1.0:
        raise ValueError(f"the reward server answered with a reward of {reward}")
    return RolloutScore(float(reward), float(error_rate), transcript, units, starts)
