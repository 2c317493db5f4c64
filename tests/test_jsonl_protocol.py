import json
import math

import pytest

from tts_grpo.reward.protocol import (
    BUCKETS,
    AnswerError,
    RolloutScore,
    SampleError,
    answer_hash,
    bucket,
    decode_response,
    encode_request,
)
from tts_grpo.text.jsonl import numbered_rows, read_jsonl, write_jsonl

REQUEST = ([1, 2, 3], "你好")
ANSWER = RolloutScore(0.5, 0.25, "你好", (0.0, 0.25), (0, 7), {"intelligibility": 0.5, "mine": -1.0}, rescored=True)


def response(reward=0.5, error=""):
    values = {"REWARDS": reward, "ERROR_RATES": 0.25, "TRANSCRIPTS": "你好", "ERRORS": error}
    units = {"UNIT_LOSSES": [0.0, 0.25, -1], "UNIT_STARTS": [0, 7, -1], "SERVER": ["hash"], "RESCORED": [1]}
    parts = {"PART_NAMES": ["intelligibility", "mine"], "PARTS": [0.5, -1]}
    values = parts | units | {name: [value] for name, value in values.items()}
    values["CHECKS"] = [answer_hash(*REQUEST, RolloutScore(error=error) if error else ANSWER)]
    return {"outputs": [{"name": name, "data": data} for name, data in values.items()]}


def test_jsonl_round_trip_and_named_faults(tmp_path):
    rows = [{"text": "你好"}, {"text": "行\u2028"}]
    write_jsonl(tmp_path / "a" / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "a" / "x.jsonl") == rows
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match="line 3: not a JSON object"):
        read_jsonl(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_jsonl(tmp_path / "bad.jsonl")


def test_arrays_and_a_byte_order_mark(tmp_path):
    rows = [{"text": "你好"}, {"text": "行"}]
    path = tmp_path / "x.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\n" + json.dumps(rows) + "\n"):
        path.write_text(text, encoding="utf-8-sig")
        assert read_jsonl(path) == rows
        path.write_text(text, encoding="utf-8")
        assert read_jsonl(path) == rows
    path.write_text("".join(json.dumps(row) + "\r\n" for row in rows), encoding="utf-8-sig")
    assert read_jsonl(path) == rows
    path.write_text("")
    assert read_jsonl(path) == []
    path.write_text('[{"text": 1}, 2]')
    with pytest.raises(ValueError, match="element 2: not a JSON object"):
        read_jsonl(path)
    path.write_text('[{"text": 1},')
    with pytest.raises(ValueError, match="begins with"):
        read_jsonl(path)


def test_jsonl_is_streamed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\nnot JSON\n\xff\n' + b'{"text": "b"}\n' * 100_000)
    sizes = []
    rows = numbered_rows(path, sizes.append)
    assert next(rows) == (1, {"text": "a"})
    assert sum(sizes) < 100
    (third, bad), (fourth, worse) = next(rows), next(rows)
    assert (third, fourth) == (3, 4) and isinstance(bad, ValueError) and isinstance(worse, ValueError)
    assert sum(1 for _ in rows) == 100_000 and sum(sizes) == path.stat().st_size


def test_buckets():
    assert [bucket(n) for n in (1, 512, 513, 2048)] == [512, 512, 2048, 2048]
    assert list(BUCKETS) == sorted(set(BUCKETS))
    with pytest.raises(ValueError, match="at most 2048"):
        bucket(2049)


def test_request_is_padded_to_its_bucket():
    tokens, lens, text, language = encode_request([5, 6, 7], "你好")["inputs"]
    assert tokens["shape"] == [1, 512] and tokens["data"] == [5, 6, 7] + [0] * 509
    assert lens["data"] == [3] and text["data"] == ["你好"] and language["data"] == ["zh"]


def changed_response(name, data):
    """A response with other data of one output."""
    body = response()
    for output in body["outputs"]:
        output["data"] = data if output["name"] == name else output["data"]
    return body


def test_response():
    assert decode_response(response(), *REQUEST).server == "hash"
    assert decode_response(response(), *REQUEST) == ANSWER


@pytest.mark.parametrize(
    "request_", [([1, 2, 4], "你好"), ([1, 2], "你好"), ([1, 2, 3], "你"), ([1, 2, 3], "你好", "en")]
)
def test_an_answer_to_another_request_is_an_error(request_):
    for body in (response(), response(error="not finite")):
        with pytest.raises(AnswerError):
            decode_response(body, *request_)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("REWARDS", [0.25]), ("ERROR_RATES", [0.5]), ("TRANSCRIPTS", ["好"]), ("UNIT_LOSSES", [0.25, 0.0]),
        ("UNIT_STARTS", [0, 8]), ("RESCORED", [0]), ("PARTS", [0.25, -1]), ("PART_NAMES", ["pitch", "mine"]),
        ("ERRORS", ["x"]), ("CHECKS", [None]),
    ],
)  # fmt: skip
def test_an_answer_that_was_changed_on_the_way_is_an_error(name, data):
    body = changed_response(name, data)
    with pytest.raises(AnswerError):
        decode_response(body, *REQUEST)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("PARTS", [0.5, 1.5]), ("PARTS", [0.5]), ("PARTS", [0.5, None]), ("PART_NAMES", [1, 2]), ("UNIT_STARTS", [0]),
        ("UNIT_LOSSES", [0.0, math.inf]), ("UNIT_LOSSES", "ab"),
    ],
)  # fmt: skip
def test_parts_and_losses_of_another_form_are_errors(name, data):
    body = changed_response(name, data)
    with pytest.raises(ValueError):
        decode_response(body, *REQUEST)


@pytest.mark.parametrize("reward", [math.nan, -0.1, 1.1, None])
def test_an_invalid_reward_is_an_error(reward):
    with pytest.raises(ValueError):
        decode_response(response(reward), *REQUEST)


def test_server_side_error_is_an_error():
    with pytest.raises(SampleError, match="out of memory"):
        decode_response(response(reward=0.9, error="out of memory"), *REQUEST)


def test_missing_output_is_an_error():
    body = response()
    body["outputs"].pop()
    with pytest.raises(KeyError):
        decode_response(body, *REQUEST)
