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

from collections.abc import Sequence
from dataclasses import dataclass

MODEL_NAME = "token2wav_asr"
SPEECH_MODEL_NAME = "token2wav"
SPEECH_OUTPUT_NAMES = ("WAVEFORM", "WAVEFORM_LENS", "SAMPLE_RATE", "ERRORS")
OUTPUT_NAMES = ("REWARDS", "ERROR_RATES", "TRANSCRIPTS", "UNIT_ERRORS", "UNIT_STARTS", "ERRORS")
# Few, so that batches fill: zeros cost next to nothing on the way, and the server sorts what it gets by length.
BUCKETS = (512, 2048)


@dataclass(frozen=True)
class Scored:
    """What the server found of one rollout; see :class:`tts_grpo.reward.scorer.SampleScore`."""

    reward: float
    error_rate: float
    transcript: str
    unit_errors: tuple[int, ...]
    unit_starts: tuple[int, ...]


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


def decode_response(body: dict) -> Scored:
    """One rollout's answer.

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
    return Scored(float(reward), float(error_rate), transcript, units, starts)
