"""Tests of the parts of the reward: the setting, each part on real speech, several recognisers, and an outside "
"scorer."""

import base64
import dataclasses
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hub_repositories import make_sensevoice
from tts_grpo.reward.parts import interface
from tts_grpo.reward.parts.interface import Context, Part, Scores, combine, load_parts
from tts_grpo.reward.rewards import known_parts, parse_rewards
from tts_grpo.reward.scorer import RewardScorer, vary
from tts_grpo.speech.asr.recogniser import Transcript
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.jsonl import read_jsonl

pytestmark = pytest.mark.slow

MINE = (Path(__file__).parent.parent / "docs/my_reward.py").read_text(encoding="utf-8")
OPTIONS = {
    "pace": ",units_per_s=4.0", "pitch": ",semitones=3.2", "ending": ",limit=160", "emotion": ",tag=NEUTRAL",
    "remote": ",url=http://127.0.0.1:9/score",
}  # fmt: skip


@pytest.fixture(scope="module")
def known(assets):
    rows = read_jsonl(assets / "data/dev.jsonl")[:8]
    return [row["speech_tokens"] for row in rows], [row["text"] for row in rows]


@pytest.fixture(scope="module")
def voices(assets, token2wav):
    recordings = sorted(path for path in (assets / "prompts").iterdir() if path.suffix in (".ogg", ".opus"))
    return [load_prompt_voice(token2wav, recordings[0], "你好")]


def make_scorer(token2wav, asr, voices, rewards: str, **options) -> RewardScorer:
    parts = load_parts(parse_rewards(rewards), Context(asr=asr, token2wav_dir=Path("nowhere")))
    return RewardScorer(token2wav, asr, False, "tanh", voices, parts=parts, **options)


def test_the_setting_is_parsed(tmp_path):
    mine = tmp_path / "with space" / "mine.py"
    mine.parent.mkdir()
    mine.write_text(MINE)
    first, second, third = parse_rewards(f'intelligibility pitch:0.2,semitones=3,floor=.1 "{mine}":0.5,required=0')
    assert (first.name, first.weight, first.floor, first.required) == ("intelligibility", 1.0, 0.0, True)
    assert (second.weight, second.floor, second.options) == (0.2, 0.1, {"semitones": 3.0})
    assert (third.name, third.path, third.required) == ("mine", mine, False)
    assert {"asr_likelihood", "emotion", "similarity"} < set(known_parts())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rewards is empty"), ("loudness:1", "no part 'loudness': there are asr_likelihood, emotion"),
        ("pauses:0", "weight of pauses is 0"), ("pauses:x", "weight of pauses is x"), ("pauses,floor=2", "floor=2"),
        ("pauses:1 pauses:2", "pauses twice"), ("pauses,required=yes", "required=yes"),
        ("pauses,allowed", "option=value"), ("pauses,width=1", "'width': it has allowed, most, floor, required"),
        ("pitch:1", "pitch needs semitones"), ("/nowhere/mine.py:1", "No such file"),
        ("'pauses", "No closing quotation"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(text, message):
    with pytest.raises(ValueError, match="rewards") as error:
        parse_rewards(text)
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("def f(:\n", "no Python"), ("class Rewards:\n    pass\n", "no class")])
def test_a_file_that_is_no_part_is_named(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_rewards(f"{tmp_path}/mine.py:1")


@pytest.mark.parametrize("name", sorted(set(known_parts()) - {"remote", "emotion"}))
def test_each_part_tells_real_speech_from_spoiled_speech(token2wav, asr, voices, known, name):
    """And its scores do not depend on the batch."""
    scorer = make_scorer(token2wav, asr, voices, name + OPTIONS.get(name, ""))
    scores = scorer.score(*known)
    values = [score.parts[name] for score in scores]
    assert all(0 <= value <= 1 and not score.error for value, score in zip(values, scores, strict=True))
    alone = [scorer.score([tokens], [text])[0].parts[name] for tokens, text in zip(*known, strict=True)]
    np.testing.assert_allclose(values, alone, atol=1e-4)
    assert scorer.check(*known) == []
    part = scorer.parts[0]
    assert name == "intelligibility" or hasattr(part.reward, "spoiled")
    part.reward.spoiled = lambda batch: batch  # a part that tells nothing apart
    assert f"the reward part {name} gives real speech" in scorer.check(*known)[0]


def test_emotions_and_events_are_probabilities_of_the_recogniser(token2wav, asr, voices, known):
    scorer = make_scorer(token2wav, asr, voices, "emotion:1,tag=NEUTRAL")
    assert all(score.parts["emotion"] > 0.5 for score in scorer.score(*known))  # as the tiny recogniser was trained
    with pytest.raises(ValueError, match="emotion.py: ValueError: the vocabulary .* has no <.Laughter.>"):
        make_scorer(token2wav, asr, voices, "emotion:1,tag=Laughter")
    with pytest.raises(ValueError, match="no tag HAPPYY: it has HAPPY, SAD"):
        make_scorer(token2wav, asr, voices, "emotion:1,tag=HAPPYY")


class ScriptedScore(torch.nn.Module):
    """TorchScript with the interface of utmos_scripted.pt; the score falls with the number of changes of sign."""

    @torch.jit.export
    def score(self, wav: torch.Tensor) -> torch.Tensor:
        changes = (wav[..., 1:] * wav[..., :-1] < 0).float()
        return 5.0 - 8.0 * changes.mean(dim=(1, 2)) + 0.0 * wav.sum()

    def forward(self, wav: torch.Tensor) -> torch.Tensor:
        return self.score(wav)


def test_naturalness_by_utmos(token2wav, asr, voices, known, tmp_path):
    torch.jit.save(torch.jit.script(ScriptedScore()), tmp_path / "utmos_scripted.pt")
    scorer = make_scorer(token2wav, asr, voices, f"naturalness:1,metric=utmos,model={tmp_path}/utmos_scripted.pt")
    (part,) = scorer.parts
    batch, _ = scorer._batch(*known, ["zh"] * len(known[0]))
    assert part.check(batch) == "" and part.reward.best == 4.5
    expected = [5 - 8 * np.mean(one[1:] * one[:-1] < 0) for one in batch.recordings]  # each alone, without padding
    np.testing.assert_allclose(part(batch).scores, (np.array(expected) - 1) / 3.5, atol=1e-5)
    broken = dataclasses.replace(batch, waveforms=batch.waveforms * float("nan"))
    with pytest.raises(RuntimeError, match="UTMOS gave nan for a recording of"):
        part(broken)


def test_naturalness_names_what_is_wrong_with_its_model(tmp_path):
    (tmp_path / "other.pt").write_bytes(b"x")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "linear.pt")
    for options, message in (
        ("metric=utmos", "metric=utmos needs model"), (f"model={tmp_path}/other.pt", "no other metric has a model"),
        ("metric=mos", "expected one of dnsmos_ovrl"), (f"metric=utmos,model={tmp_path}/no.pt", "no such file"),
        (f"metric=utmos,model={tmp_path}/other.pt", "is no TorchScript file"),
        (f"metric=utmos,model={tmp_path}/linear.pt", "has no method score"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_parts(parse_rewards(f"naturalness:1,{options}"), Context())


def test_a_part_that_needs_a_voice_is_refused_without_one(token2wav, asr):
    with pytest.raises(ValueError, match="similarity needs a prompt voice: set prompt_audio"):
        make_scorer(token2wav, asr, [], "similarity:1")


def test_the_reward_is_the_weighted_mean_above_the_floors(token2wav, asr, voices, known, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    rewards = f"intelligibility:1 {tmp_path}/mine.py:3,limit_s=1"
    scores = make_scorer(token2wav, asr, voices, rewards).score(*known)
    for score in scores:
        assert score.reward == pytest.approx((score.parts["intelligibility"] + 3 * score.parts["mine"]) / 4)
        assert sum(score.unit_losses) == pytest.approx((1 - score.parts["intelligibility"]) / 4)
    floors = make_scorer(token2wav, asr, voices, f"{rewards},floor=0.5").score(*known)
    assert [score.reward for score in floors] == [s.reward if s.parts["mine"] >= 0.5 else 0.0 for s in scores]
    assert {0.0} < {score.reward for score in floors}


def test_parts_share_the_silences_of_a_batch(monkeypatch, token2wav, asr, voices, known):
    measured = []
    monkeypatch.setattr(interface, "silences", lambda recording: measured.append(len(recording)) or (0.0, 0.0, 0.0))
    scores = make_scorer(token2wav, asr, voices, f"pace{OPTIONS['pace']} pauses").score(*known)
    assert len(measured) == len(scores) and {score.parts["pauses"] for score in scores} == {1.0}


class Broken:
    def __call__(self, batch):
        raise RuntimeError("out of paper")


def part_of(reward, **spec) -> Part:
    part = load_parts(parse_rewards("pauses"), Context())[0]
    part.reward, part.spec = reward, dataclasses.replace(part.spec, name="broken", **spec)
    return part


def test_a_part_that_fails_gives_no_reward_unless_it_is_not_required(token2wav, asr, known):
    good = load_parts(parse_rewards("intelligibility"), Context())[0]
    scorer = RewardScorer(token2wav, asr, False, parts=[good, part_of(Broken())])
    with pytest.raises(RuntimeError, match="out of paper"):  # of the machine: the server answers with status 500
        scorer.score(known[0][:1], known[1][:1])
    scorer = RewardScorer(token2wav, asr, False, parts=[good, part_of(Broken(), required=False)])
    for score in scorer.score(*known):
        assert score.parts["broken"] == -1 and score.reward == score.parts["intelligibility"]
    scorer = RewardScorer(token2wav, asr, False, parts=[part_of(Broken(), required=False)])
    assert all("no part of the reward has a score" in score.error for score in scorer.score(*known))


def test_a_full_gpu_does_not_take_an_optional_part_from_a_whole_batch(token2wav, asr, known):
    def reward(batch):
        if len(batch) > 1 or batch.lens[0] == longest:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return [0.25]

    longest = 0
    good = load_parts(parse_rewards("intelligibility"), Context())[0]
    scorer = RewardScorer(token2wav, asr, False, parts=[good, part_of(reward, required=False)])
    assert {score.parts["broken"] for score in scorer.score(known[0][:2], known[1][:2])} == {0.25}
    longest = max(token2wav(known[0][:2])[1].tolist())
    alone = [score.parts["broken"] for score in scorer.score(known[0][:2], known[1][:2])]
    assert sorted(alone) == [-1, 0.25]


@pytest.mark.parametrize("scores", [[1.2], [-0.1], [float("nan")], [None], [], [0.5, 0.5, 0.5]])
def test_scores_of_another_form_are_no_reward(token2wav, asr, known, scores):
    scorer = RewardScorer(token2wav, asr, False, parts=[part_of(lambda batch: scores)])
    results = scorer.score(known[0][:2], known[1][:2])
    assert all(score.error and np.isnan(score.reward) for score in results)


def test_losses_of_several_parts_are_located_in_proportion():
    parts = [part_of(None, weight=1.0), part_of(None, weight=3.0)]
    scored = [Scores([0.4], [(0, 1, 2)]), Scores([0.8])]
    reward, losses = combine(parts, scored, 0)
    assert reward == pytest.approx(0.7) and losses == pytest.approx([0.0, 0.05, 0.1])
    reward, losses = combine(parts[:1], [Scores([1.0], [(0, 0, 0)])], 0)
    assert reward == 1.0 and losses == [0.0, 0.0, 0.0]
    assert combine([parts[1]], [Scores([0.5])], 0) == (0.5, [])


class Fixed:
    """A recogniser that answers with one text, and notes what it was given."""

    def __init__(self, text):
        self.text, self.given = text, []

    def transcribe_with_onsets(self, recordings, languages=None):
        self.given += recordings
        return [Transcript(self.text, tuple(0.2 * (i + 1) for i in range(len(self.text))))] * len(recordings)


def test_several_recognisers_hear_variations_and_their_errors_are_pooled(token2wav, known):
    first, second = Fixed("今天天气"), Fixed("今天天气真好")
    for pool, rate, losses in (("mean", 2 / 12, (0, 0, 0, 0, 1, 1)), ("worst", 2 / 6, (0, 0, 0, 0, 1, 1))):
        scorer = RewardScorer(token2wav, first, False, "tanh", more_asrs=[second], pool=pool)
        (score,) = scorer.score(known[0][:1], ["今天天气真好"])
        assert score.error_rate == pytest.approx(rate)
        assert np.array(score.unit_losses) * 2 == pytest.approx(np.array(losses) * (1 - score.reward))
    heard, varied = first.given[0], second.given[0]
    assert len(varied) != len(heard) and 0.6 < varied.std() / heard.std() < 0.8
    assert torch.equal(varied, second.given[1]), "a variation is not the same at each call"


def test_a_variation_keeps_the_length_of_normal_speed():
    speech = torch.sin(torch.arange(16_000) / 10)
    assert (
        torch.allclose(vary(speech, 1.0, 200.0, 1.0), speech, atol=1e-6)
        and len(vary(speech, 1.0, 30.0, 1.25)) == 12_800
    )


@pytest.fixture
def outside_scorer():
    """A program with the remote protocol; ``answers`` are given one after the other, the last one again and again."""

    class Handler(http.server.BaseHTTPRequestHandler):
        answers, requests = [], []

        def do_POST(self):
            self.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/score"
    yield Handler
    server.shutdown()
    server.server_close()


def test_a_program_elsewhere_scores_waveforms(token2wav, asr, known, outside_scorer, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is not asked
    outside_scorer.answers = [(503, {}), (200, {"version": 1, "score": 0.25})]
    scorer = make_scorer(token2wav, asr, [], f"remote:1,url={outside_scorer.url},patience_s=5,concurrency=1")
    scores = scorer.score(known[0][:2], known[1][:2])
    assert [score.reward for score in scores] == [0.25, 0.25] and len(outside_scorer.requests) == 3
    request = outside_scorer.requests[-1]
    samples = np.frombuffer(base64.b64decode(request["waveform"]), "<i2")
    assert (request["version"], request["sample_rate_hz"], request["text"]) == (1, 16_000, known[1][1])
    assert len(samples) == 640 * len(known[0][1]) and samples.std() > 100


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"version": 2, "score": 0.5}), "has version 2 of the protocol"),
        ((200, {"version": 1, "score": 1.5}), "the score 1.5: expected"),
        ((200, {"version": 1, "score": None}), "the score None"), ((200, [1]), "instead of a score"),
        ((400, {"error": "too long"}), "refused a rollout with status 400"),
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_an_error_of_the_rollout(token2wav, asr, known, outside_scorer, answer, message):
    outside_scorer.answers = [answer]
    scorer = make_scorer(token2wav, asr, [], f"remote:1,url={outside_scorer.url}")
    (score,) = scorer.score(known[0][:1], known[1][:1])
    assert message in score.error and np.isnan(score.reward)


def test_a_scorer_that_does_not_answer_is_a_fault_of_the_machine(token2wav, asr, known, outside_scorer):
    outside_scorer.answers = [(500, {"error": "starting"})]
    for url in (outside_scorer.url, "http://127.0.0.1:9/score"):
        scorer = make_scorer(token2wav, asr, [], f"remote:1,url={url},patience_s=0.3")
        with pytest.raises(OSError, match="gave no score in 0.3 s.*is it running"):
            scorer.score(known[0][:1], known[1][:1])


def test_likelihoods_of_texts_are_those_of_each_alone(assets, tmp_path, token2wav, known):
    asr = SenseVoice(make_sensevoice(tmp_path / "SenseVoiceSmall", assets / "asr_reward"))
    waveforms, lens = token2wav(known[0])
    recordings = [wave[:n] for wave, n in zip(waveforms, lens, strict=True)]
    right = asr.log_likelihoods(recordings, known[1])
    alone = [asr.log_likelihoods([recording], [text])[0] for recording, text in zip(recordings, known[1], strict=True)]
    np.testing.assert_allclose(right, alone, atol=1e-3)
    wrong = asr.log_likelihoods(recordings, [*known[1][1:], known[1][0]])
    assert max(right) <= 0 and np.mean(right) > np.mean(wrong) + 1
    assert asr.log_likelihoods([recordings[0][:100]], ["你好"]) == [float("-inf")]
