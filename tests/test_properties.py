"""Properties that hold for every input: credit, batches, packing and the server's protocol."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import infer_dist
from token2wav_asr_server import call_with_valid
from tts_grpo.reward.protocol import (
    MAX_TEXT_BYTES,
    OUTPUT_NAMES,
    AnswerError,
    RolloutScore,
    answer_hash,
    bucket,
    decode_response,
    encode_request,
    encode_response,
)
from tts_grpo.speech.cosyvoice2.kernels import QUERIES
from tts_grpo.speech.cosyvoice2.packed_flow import GAP, SIZES, PackedRow, assign_rows
from tts_grpo.speech.decoder import pad_speech_tokens
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, format_speech_tokens, parse_speech_tokens
from tts_grpo.training.credit import encode, syllable_advantages

speech_tokens = st.lists(st.integers(0, NUM_SPEECH_TOKENS - 1), min_size=1, max_size=60)


@st.composite
def groups(draw):
    """Rollouts of one text: losses and starts of its syllables, rewards, numbers of tokens."""
    syllables, rollouts = draw(st.integers(1, 12)), draw(st.integers(2, 6))
    encoded, scores, sizes = [], [], []
    for _ in range(rollouts):
        if draw(st.integers(0, 5)) == 0:  # a bad rollout has no syllables, and its reward is 0
            encoded.append(encode((), ()))
            scores.append(0.0)
            sizes.append(draw(st.integers(1, 40)))
            continue
        losses = draw(st.lists(st.floats(0, 1 / syllables), min_size=syllables, max_size=syllables))
        starts = sorted(draw(st.lists(st.integers(0, 30), min_size=syllables, max_size=syllables, unique=True)))
        encoded.append(encode(losses, starts))
        scores.append(draw(st.floats(0, 1)) * max(0.0, 1 - sum(losses)))
        sizes.append(max(starts) + draw(st.integers(1, 10)))
    return encoded, scores, sizes


@given(groups())
def test_credit_adds_up_to_grpos_advantage(group):
    """Summed over its syllables, a rollout's advantage is its reward minus the group's mean."""
    encoded, scores, sizes = group
    advantages = syllable_advantages(*group)
    assert [len(row) for row in advantages] == sizes and all(np.isfinite(row).all() for row in advantages)
    bad = encode((), ())
    if all(one == bad for one in encoded):
        assert not np.concatenate(advantages).any()
        return
    for one, score, advantage in zip(encoded, scores, advantages, strict=True):
        starts, syllables = json.loads(one)[1], max(len(json.loads(other)[1]) for other in encoded)
        total = syllables * advantage[0] if one == bad else sum(advantage[start:][0] for start in [0, *starts[1:]])
        assert total == pytest.approx(score - np.mean(scores), abs=1e-5)


@given(st.lists(st.integers(1, 40), max_size=60), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
       st.integers(1, 16))  # fmt: skip
def test_batches_contain_each_utterance_once_per_seed(lens, seeds, batch_size):
    rows = [{"id": str(i), "target_text": "好" * n} for i, n in enumerate(lens)]
    batches = infer_dist.make_batches(rows, seeds, batch_size)
    assert all(1 <= len(batch.rows) <= batch_size for batch in batches)
    for seed in seeds:
        ids = [row["id"] for batch in batches if batch.seed == seed for row in batch.rows]
        assert sorted(ids, key=int) == [row["id"] for row in rows]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_packed_rows_contain_each_utterance_once_with_gaps(lens):
    rows = assign_rows(lens)
    assert [i for members in rows for i in members] == list(range(len(lens)))
    for members in rows:
        own = [lens[i] for i in members]
        assert len(members) == 1 or PackedRow.fits(own, SIZES[-1])
        size = next((size for size in SIZES if PackedRow.fits(own, size)), None)
        row = PackedRow(own, size)
        assert row.used.sum() == sum(own)
        for i, (start, n) in enumerate(zip(row.starts, own, strict=True)):
            assert (row.utterance[start : start + n] == i).all() and (
                row.frame[start : start + n] == torch.arange(n)
            ).all()
            assert row.used[start + n : start + n + GAP].sum() == 0
        check_tiles(row, own)


def check_tiles(row, lens) -> None:
    """Each frame is a query of exactly one block, whose keys are the frames of its own utterance."""
    queries = torch.zeros(row.size, dtype=torch.int64)
    half = row.tiles[: len(row.tiles) // 2]
    for first, count, begin, end in half.tolist():
        assert count <= QUERIES
        queries[first : first + count] += 1
        for start, n in zip(row.starts, lens, strict=True):
            if count and start <= first < start + n:
                assert (begin, end) == (start, start + n)
    assert (queries == 1).all()


@given(speech_tokens, st.text())
def test_requests_keep_tokens_and_text(tokens, text):
    inputs = {value["name"]: value for value in encode_request(tokens, text, "en")["inputs"]}
    (length,) = inputs["TOKEN_LENS"]["data"]
    assert inputs["TOKENS"]["data"][:length] == tokens and not any(inputs["TOKENS"]["data"][length:])
    assert inputs["TOKENS"]["shape"] == [1, bucket(length)] == [1, len(inputs["TOKENS"]["data"])]
    assert (inputs["GT_TEXT"]["data"], inputs["LANGUAGE"]["data"]) == ([text], ["en"])


@given(st.one_of(st.floats(), st.none(), st.text(), st.booleans(), st.integers()))
def test_only_rewards_from_0_to_1_are_accepted(reward):
    values = {"REWARDS": [reward], "ERROR_RATES": [0.5], "TRANSCRIPTS": ["好"], "UNIT_LOSSES": [0], "UNIT_STARTS": [0]}
    values |= {"RESCORED": [0], "SERVER": ["hash"], "PART_NAMES": ["one"], "PARTS": [0.5]}
    values |= {name: [""] for name in OUTPUT_NAMES if name not in values}
    body = {"outputs": [{"name": name, "data": data} for name, data in values.items()]}
    if isinstance(reward, int | float) and 0 <= reward <= 1:
        values["CHECKS"][0] = answer_hash([1], "好", RolloutScore(reward, 0.5, "好", (0.0,), (0,), {"one": 0.5}))
        assert decode_response(body, [1], "好").reward == reward
    else:
        with pytest.raises(ValueError, match="reward"):
            decode_response(body, [1], "好")


unit_losses = st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(0, 2000)), max_size=8)
names = st.lists(st.sampled_from(("intelligibility", "pitch", "我的")), min_size=1, unique=True)
part_scores = st.one_of(st.floats(0, 1, width=32), st.just(-1.0))
batches = st.tuples(
    names,
    st.lists(
        st.tuples(
            st.floats(0, 1, width=32), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            unit_losses, st.lists(part_scores, min_size=3, max_size=3), st.booleans(),
        ),
        min_size=1, max_size=5,
    ),
).map(
    lambda drawn: [
        RolloutScore(
            reward, 0.5, transcript, *(tuple(zip(*units)) or ((), ())), dict(zip(drawn[0], parts)), rescored
        )
        for reward, transcript, units, parts, rescored in drawn[1]
    ]
)  # fmt: skip


@given(batches)
def test_scores_survive_the_round_trip(sent):
    """Each rollout of a batch is returned as its own response, in Triton's JSON format."""
    requests = [([i, 5], "好", "zh" if i % 2 else "en") for i in range(len(sent))]
    tensors = encode_response(sent, "hash", requests)
    assert set(tensors) == set(OUTPUT_NAMES)
    for i, score in enumerate(sent):
        rows = {name: tensor[i] for name, tensor in tensors.items()}
        data = {n: [v.decode() for v in row] if row.dtype.kind == "S" else row.tolist() for n, row in rows.items()}
        body = {"outputs": [{"name": n, "data": d} for n, d in data.items()]}
        assert decode_response(body, *requests[i]) == score
        with pytest.raises(AnswerError):
            decode_response(body, [i + 1, 5], *requests[i][1:])
        with pytest.raises(AnswerError):
            decode_response(body, [i, 5], "好", "en" if i % 2 else "zh")


class EchoInstance:
    """Answers each sample with its input; a server's instance gets only valid samples."""

    def call(self, method, speech_tokens, texts, languages):
        assert speech_tokens and all(speech_tokens) and len(speech_tokens) == len(texts)
        return list(zip(speech_tokens, texts, languages, strict=True))


samples = st.tuples(
    st.one_of(st.integers(-2, 8), st.sampled_from((-(2**31), 2048, 2049, 2**31 - 1))),
    st.one_of(st.binary(max_size=6), st.text(max_size=6).map(str.encode), st.just("好".encode() * 5462)),
    st.sampled_from((b"zh", b"en", b"zh", b"", b"fr", b"\xff")),
)


@given(st.lists(samples, min_size=1, max_size=6), st.sampled_from((1, 6, 512, 2048, 3000)), st.integers(-1, 7000))
def test_each_request_of_a_batch_is_answered_with_its_own_result_or_a_reason(batch, size, token):
    tokens = np.full((len(batch), size), token, np.int32) + np.arange(len(batch), dtype=np.int32)[:, None]
    lens, *texts = zip(*batch, strict=True)
    inputs = (tokens, np.array(lens, np.int32)[:, None], *(np.array(values, dtype=object) for values in texts))
    results = call_with_valid(EchoInstance(), "score", lambda fault: fault, *inputs)
    assert len(results) == len(batch)
    for i, ((length, text, language), result) in enumerate(zip(batch, results, strict=True)):
        if isinstance(result, str):
            with pytest.raises((ValueError, AssertionError)):
                assert 0 < length <= min(size, 2048) and len(text) <= MAX_TEXT_BYTES and [text.decode("utf-8")]
                assert language in (b"zh", b"en")
            assert result.isprintable()
        else:
            assert result == ([token + i] * length, text.decode("utf-8"), language.decode())


@given(speech_tokens)
def test_speech_tokens_survive_their_text_form(tokens):
    assert list(parse_speech_tokens(format_speech_tokens(tokens))) == tokens


@given(st.lists(speech_tokens, min_size=1, max_size=6))
def test_padding_keeps_every_sequence(sequences):
    padded, lens = pad_speech_tokens(sequences)
    assert [row[:n].tolist() for row, n in zip(padded, lens, strict=True)] == sequences
    assert padded.shape == (len(sequences), max(map(len, sequences)))
