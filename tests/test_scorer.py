"""Tests of the scorer on batches: voices, failures, and the ASR features on their device."""

import types
import weakref

import numpy as np
import pytest
import torch

from tests.asr_folders import make_small_sensevoice
from tests.hub_repositories import make_sensevoice
from token2wav_asr_server import call_with_valid
from tts_grpo.reward.protocol import RolloutScore
from tts_grpo.reward.scorer import RewardScorer, SampleSpeech
from tts_grpo.speech.asr.recogniser import Transcript
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import resample, resample_batch
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.text.jsonl import read_jsonl

pytestmark = pytest.mark.slow


class RecordingDecoder:
    """A decoder that records the voices passed to it; token 0 makes a waveform with non-finite values.

    Token 7 does so in half precision only.
    """

    sample_rate_hz = 16_000

    def __init__(self, half=False):
        self.voices, self.half = [], half

    def exact(self):
        return RecordingDecoder() if self.half else self

    def __call__(self, speech_tokens, prompt_voices=None, seed=0):
        self.voices.append(list(prompt_voices))
        lens = torch.tensor([640 * len(tokens) for tokens in speech_tokens])
        waveforms = torch.zeros(len(lens), int(lens.max()))
        for row, tokens in zip(waveforms, speech_tokens, strict=True):
            row[0] = float("nan") if 0 in tokens or (self.half and 7 in tokens) else 0.0
        return waveforms, lens


class Quiet:
    """A decoder with quiet speech, which dither changes most."""

    def __init__(self, token2wav):
        self.token2wav, self.sample_rate_hz = token2wav, token2wav.sample_rate_hz

    def exact(self):
        return self

    def __call__(self, speech_tokens, prompt_voices=None, seed=0):
        waveforms, lens = self.token2wav(speech_tokens, prompt_voices, seed)
        return 0.003 * waveforms, lens


class FixedAsr:
    """A recogniser with the same transcript for every recording."""

    def __init__(self, text="你好", onsets_s=(0.04, 0.24)):
        self.transcript = Transcript(text, onsets_s)

    def transcribe_with_onsets(self, recordings, languages=None):
        return [self.transcript] * len(recordings)


def test_rollouts_of_a_text_have_one_voice_and_texts_differ():
    voices = [PromptVoice(name, np.zeros(1, np.float32), ()) for name in "abc"]
    token2wav = RecordingDecoder()
    texts = [f"第{i}句" for i in range(20)]
    RewardScorer(token2wav, FixedAsr(), True, "tanh", voices, seed=1).score([[1]] * 40, texts * 2)
    (given,) = token2wav.voices
    assert given[:20] == given[20:] and {voice.prompt_text for voice in given} == set("abc")


def test_each_rollout_of_a_text_may_have_its_own_voice():
    voices = [PromptVoice(name, np.zeros(1, np.float32), ()) for name in "abc"]
    token2wav, rollouts = RecordingDecoder(), [[1 + i, 2] for i in range(20)]
    scorer = RewardScorer(token2wav, FixedAsr(), True, "tanh", voices, 1, "rollout")
    scorer.score(rollouts, ["你好"] * 20)
    scorer.score(rollouts[::-1], ["你好"] * 20)
    RewardScorer(token2wav, FixedAsr(), True, "tanh", voices, 2, "rollout").score(rollouts, ["你好"] * 20)
    first, again, other_seed = token2wav.voices
    assert {voice.prompt_text for voice in first} == set("abc")
    assert again[::-1] == first, "a rollout has another voice in another batch"
    assert other_seed != first


@pytest.mark.parametrize("voice_per", ["text", "rollout"])
def test_speech_for_listening_has_the_voice_of_the_reward(voice_per):
    voices = [PromptVoice(name, np.zeros(1, np.float32), ()) for name in "abc"]
    token2wav, texts = RecordingDecoder(), [f"你好{number}" for number in "一二三四五六七八九十"]
    scorer, rollouts = RewardScorer(token2wav, FixedAsr(), True, "tanh", voices, 1, voice_per), [[1]] * 10
    scorer.score(rollouts, texts)
    scorer.synthesise(rollouts, texts)
    (scored, *spoken) = token2wav.voices
    assert [voice for (voice,) in spoken] == scored and len({voice.prompt_text for voice in scored}) == 3


def test_speech_that_is_not_finite_is_an_error_of_its_rollout_alone():
    scores = RewardScorer(RecordingDecoder(), FixedAsr()).score([[1], [0], [2]], ["你好"] * 3)
    assert [score.reward for score in scores[::2]] == [1.0, 1.0]
    assert "not finite" in scores[1].error and np.isnan(scores[1].reward)
    results = RewardScorer(RecordingDecoder(), FixedAsr()).synthesise([[1], [0]], ["你好"] * 2)
    assert (results[0].error, len(results[0].waveform)) == ("", 640)
    assert "not finite" in results[1].error and not len(results[1].waveform)


def test_errors_are_placed_at_the_speech_tokens_of_their_syllable():
    (score,) = RewardScorer(RecordingDecoder(), FixedAsr("你早", (0.08, 0.24))).score([[1] * 20], ["你好吗"])
    lost = (1 - score.reward) / 2
    assert score.unit_losses == (0, lost, lost) and score.error_rate == 2 / 3
    assert score.unit_starts == (1, 5, 12)  # 25 per second, minus the ASR's delay of 1; the third is between 5 and 20


def test_a_batch_may_mix_languages(token2wav, tmp_path):
    """Each rollout is scored as by a scorer of its language; an unknown language fails alone."""
    asr = SenseVoice(make_small_sensevoice(tmp_path / "small"))
    tokens, texts = (
        [[14 * i % 6561 for i in range(20 + 5 * j)] for j in range(4)],
        ["我有3个", "I have 3", "好的OK", "3 5"],
    )
    languages = ["zh", "en", "zh", "en"]
    scorer, english = RewardScorer(token2wav, asr), RewardScorer(token2wav, asr, language="en")
    scores = scorer.score(tokens, texts, languages)
    assert [len(score.unit_losses) for score in scores] == [4, 3, 4, 2]
    for i, language in enumerate(languages):
        (alone,) = (scorer if language == "zh" else english).score(tokens[i : i + 1], texts[i : i + 1])
        assert alone == scores[i]
    scores = scorer.score(tokens[:2], texts[:2], ["zh", "fr"])
    assert not scores[0].error and "'fr'" in scores[1].error


def test_english_is_scored_and_credited_by_word():
    heard = "we met five people to day"
    asr = FixedAsr(heard, tuple(0.04 + 0.1 * i for i in range(len(heard))))
    (score,) = RewardScorer(RecordingDecoder(), asr).score([[1] * 75], ["We saw 5 people today."], ["en"])
    assert score.error_rate == 1 / 5  # a word that the recogniser has split is right
    assert score.unit_losses == (0, pytest.approx(1 - score.reward), 0, 0, 0)
    assert score.unit_starts == (0, 8, 18, 30, 48)  # at 0.1 s per character of the transcript


def test_scores_are_the_same_at_each_call_and_in_each_batch(token2wav, assets, tmp_path):
    """Uses the ASR model's config as published."""
    asr = SenseVoice(make_sensevoice(tmp_path / "SenseVoiceSmall", assets / "asr_reward"))
    scorer = RewardScorer(Quiet(token2wav), asr)
    rows = read_jsonl(assets / "data/dev.jsonl")[:24]
    tokens, texts = [row["speech_tokens"] for row in rows], [row["text"] for row in rows]
    scores = scorer.score(tokens, texts)
    assert all(not score.error for score in scores) and len({score.reward for score in scores}) > 1
    for _ in range(4):
        assert scorer.score(tokens, texts) == scores
    assert scorer.score(tokens[::-1], texts[::-1]) == scores[::-1]
    assert [score for i in range(0, 24, 5) for score in scorer.score(tokens[i : i + 5], texts[i : i + 5])] == scores


SAMPLES = (  # TOKEN_LENS, GT_TEXT, one of the tokens, what the error says
    (40, "今天".encode(), 5, ""),
    (2101, "今天".encode(), 5, "TOKEN_LENS is 2101, but TOKENS has 2100 tokens"),
    (0, "今天".encode(), 5, "TOKEN_LENS is 0"),
    (-1, "今天".encode(), 5, "TOKEN_LENS is -1"),
    (2049, "今天".encode(), 5, "2049 speech tokens: the reward server takes at most 2048"),
    (40, b"\xff", 5, "GT_TEXT is not UTF-8"),
    (40, "今天".encode() * 2731, 5, "a text of 16386 bytes: the reward server takes at most 16384"),
    (40, b"", 5, "has no word"),
    (40, "今天".encode(), 5, "LANGUAGE is b'ja': the reward server scores zh and en"),
    (40, "今天".encode(), 6561, "a speech token is not in [0, 6561)"),
    (1, "今天".encode(), 5, ""),
)


def test_a_request_that_is_wrong_fails_alone(token2wav, asr):
    """The error names what is wrong; other requests of the batch are scored."""
    lens, texts, ids, messages = zip(*SAMPLES, strict=True)
    tokens = np.repeat(np.array(ids, np.int32)[:, None], 2100, axis=1)
    scorer = RewardScorer(token2wav, asr)
    instance = types.SimpleNamespace(call=lambda method, *arguments: getattr(scorer, method)(*arguments))
    inputs = (tokens, np.array(lens, np.int32)[:, None])
    languages = np.array([b"ja" if "LANGUAGE" in message else b"zh" for message in messages], object)
    scores = call_with_valid(
        instance, "score", lambda fault: RolloutScore(error=fault), *inputs, np.array(texts, object), languages
    )
    for score, message in zip(scores, messages, strict=True):
        assert message in score.error and bool(message) == np.isnan(score.reward) == bool(score.error)
    spoken = call_with_valid(
        instance, "synthesise", lambda fault: SampleSpeech(tokens[0, :0], 0, fault), *inputs, np.array(texts, object)
    )
    can_be_heard = [not message or "LANGUAGE" in message or "has no word" in message for message in messages]
    assert [not speech.error for speech in spoken] == can_be_heard
    assert call_with_valid(None, "score", str, tokens[1:2], np.array([[0]]), np.array(texts[:1], object)) == [
        "TOKEN_LENS is 0, but TOKENS has 2100 tokens"
    ]


def test_resampling_of_a_batch_is_scipys():
    speech = np.random.default_rng(0).standard_normal((2, 2401)).astype(np.float32)
    batch = resample_batch(torch.from_numpy(speech), 24_000, 16_000).numpy()
    np.testing.assert_allclose(batch, resample(speech, 24_000, 16_000), atol=1e-5)


def test_features_of_a_batch_are_the_frontends(asr):
    rng = np.random.default_rng(0)
    speech = [torch.tensor(rng.standard_normal(n) * 0.1, dtype=torch.float32) for n in (400, 4000, 7777, 16000)]
    features, lens = asr._features(speech)
    frontend = asr._model.kwargs["frontend"]
    for wave, row, length in zip(speech, features, lens, strict=True):
        expected, expected_len = frontend(wave[None], torch.tensor([len(wave)]))
        assert length == expected_len[0]
        torch.testing.assert_close(row[:length], expected[0], rtol=1e-4, atol=1e-3)


def test_what_overflows_in_half_precision_is_scored_in_fp32():
    """Samples 1 and 3 overflow in half precision; sample 3 is not finite in fp32 either."""
    scorer = RewardScorer(RecordingDecoder(half=True), FixedAsr())
    scores = scorer.score([[1, 2], [7, 2], [3] * 9], ["你好"] * 3)
    assert [score.rescored for score in scores] == [False, True, False]
    assert all(score.error == "" and score.reward == 1.0 for score in scores)
    scores = scorer.score([[1, 2], [7, 2], [3] * 9, [7, 0]], ["你好"] * 4)
    assert [score.error == "" for score in scores] == [True, True, True, False]
    assert "not finite in fp32" in scores[3].error and np.isnan(scores[3].reward)
    assert [speech.error for speech in scorer.synthesise([[7, 2]], ["你好"])] == [""]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("full"),
        torch.OutOfMemoryError("full"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_fault_of_the_machine_is_not_an_error_of_the_sample(error):
    class Small(RecordingDecoder):
        def __call__(self, speech_tokens, prompt_voices=None, seed=0):
            if len(speech_tokens) > 1 or 5 in speech_tokens[0]:
                raise error
            return super().__call__(speech_tokens, prompt_voices, seed)

    scorer = RewardScorer(Small(), FixedAsr())
    scores = scorer.score([[1, 2], [3, 4]], ["你好"] * 2)  # one by one
    assert [score.error for score in scores] == ["", ""]
    with pytest.raises(type(error)):
        scorer.score([[1, 2], [5]], ["你好"] * 2)
    with pytest.raises(type(error)):
        scorer.synthesise([[5]], ["你好"])


def test_a_batch_is_freed_before_its_samples_are_scored_alone():
    """Otherwise a GPU that has too little memory for a batch would have too little for its samples, too."""
    alive = weakref.WeakSet()

    class Leaking(RecordingDecoder):
        def __call__(self, speech_tokens, prompt_voices=None, seed=0):
            tensors = torch.zeros(len(speech_tokens))
            if len(speech_tokens) > 1:
                alive.add(tensors)
                raise torch.OutOfMemoryError(f"no memory beside {tensors}")
            assert not alive
            return super().__call__(speech_tokens, prompt_voices, seed)

    scores = RewardScorer(Leaking(), FixedAsr()).score([[1], [2]], ["你好"] * 2)
    assert [score.error for score in scores] == ["", ""]
