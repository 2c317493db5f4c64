"""Tests of the evaluation on speech with known scores, with the tiny stack's evaluation ASR model."""

import json

import numpy as np
import pytest
import soundfile as sf

from scripts import score
from tts_grpo.evaluation.aggregate import compare_quality, compare_rates, read_utterances
from tts_grpo.evaluation.protocols import METRICS, set_language
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, load_audio, resample, save_audio
from tts_grpo.text.jsonl import read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

NUM_UTTERANCES = 12
PER = "pinyin_error_rate_toneless"


@pytest.fixture(scope="module")
def evaluation_asr(assets):
    return SenseVoice(assets / "asr_eval")


@pytest.fixture(scope="module")
def spoken(assets, test_rows):
    """``(rows, recordings)``: sentences of the test set with the teacher's recordings."""
    rows = [row for row in test_rows if (assets / "recordings" / f"{row['id']}.ogg").exists()][::7][:NUM_UTTERANCES]
    return rows, [load_audio(assets / "recordings" / f"{row['id']}.ogg") for row in rows]


@pytest.fixture
def evaluate(evaluation_asr, spoken, tmp_path):
    """Score recordings as one seed: ``evaluate(name, recordings, write=..., texts=...) -> (rates, rows)``."""

    def run(name, recordings, write=save_audio, texts=None):
        rows, folder = spoken[0], tmp_path / name / "seed_0"
        eval_set = [{"id": r["id"], "target_text": t} for r, t in zip(rows, texts or [r["text"] for r in rows])]
        manifest = []
        for row, speech in zip(rows, recordings, strict=True):
            line = {"id": row["id"], "finish_reason": "eos", "num_speech_tokens": 50, "wav": None, "error": "none"}
            if speech is not None:
                line |= {"wav": f"{row['id']}.wav", "duration_s": round(len(speech) / ASR_HZ, 3), "error": None}
                folder.mkdir(parents=True, exist_ok=True)
                write(folder / line["wav"], speech, ASR_HZ)
            manifest.append(line)
        write_jsonl(folder / "manifest.jsonl", manifest)
        utterances = score.utterances_of(folder / "manifest.jsonl", eval_set, tmp_path)
        score.score(utterances, evaluation_asr, "zh", None, set())
        write_jsonl(folder / "utterances.jsonl", utterances)
        return score.describe(utterances, "zh"), utterances

    return run


@pytest.fixture
def truth(evaluate, spoken):
    return evaluate("truth", spoken[1])


def test_real_speech_scores_well_and_shuffled_texts_do_not(evaluate, spoken, truth):
    assert truth[0][PER]["rate"] < 0.08 and truth[0]["failed"] == 0
    texts = [row["text"] for row in spoken[0]]
    shuffled, _ = evaluate("shuffled", spoken[1], texts=texts[1:] + texts[:1])
    assert shuffled[PER]["rate"] > 0.7 and shuffled["seed-tts-eval"]["rate"] > 0.7


def test_silence_is_all_deletions(evaluate, spoken):
    scores, rows = evaluate("silence", [np.zeros(len(s), np.float32) for s in spoken[1]])
    assert scores["cer"]["deletions"] == scores["cer"]["length"] and scores["cer"]["rate"] == 1.0
    assert scores["failed"] == 0 and rows[0]["quality"]["leading_silence_s"] == rows[0]["quality"]["duration_s"]


def test_noise_is_not_recognised(evaluate, spoken):
    rng = np.random.default_rng(0)
    scores, _ = evaluate("noise", [rng.normal(0, 0.1, len(s)).astype(np.float32) for s in spoken[1]])
    assert scores[PER]["rate"] > 0.9


def test_half_of_the_speech_is_half_of_the_text(evaluate, spoken, truth):
    scores, _ = evaluate("half", [s[: len(s) // 2] for s in spoken[1]])
    assert 0.3 < scores[PER]["rate"] < 0.75
    assert scores["cer"]["deletions"] > 0.3 * scores["cer"]["length"]


def test_a_truncated_file_is_a_failure(evaluate, spoken, truth):
    def cut(path, speech, rate):
        save_audio(path, speech, rate)
        path.write_bytes(path.read_bytes()[: 44 + len(speech)])  # half of the samples

    scores, rows = evaluate("cut", spoken[1], write=cut)
    assert scores["failed"] == NUM_UTTERANCES and scores["cer"]["rate"] == 1.0
    assert "in the manifest" in rows[0]["error"]


def test_another_sample_rate_and_stereo_change_nothing(evaluate, spoken, truth):
    def write_44k_stereo(path, speech, rate):
        speech = resample(speech, rate, 44_100)
        sf.write(path, np.stack([speech, speech], axis=1), 44_100)

    scores, _ = evaluate("44k", spoken[1], write=write_44k_stereo)
    assert scores[PER]["rate"] == pytest.approx(truth[0][PER]["rate"], abs=0.03) and scores["failed"] == 0


def test_a_false_sample_rate_is_a_failure(evaluate, spoken):
    scores, _ = evaluate("false", spoken[1], write=lambda path, speech, rate: save_audio(path, speech, 24_000))
    assert scores["failed"] == NUM_UTTERANCES and scores["cer"]["rate"] == 1.0


def test_failures_worsen_every_score(evaluate, spoken, truth):
    def nan(path, speech, rate):
        sf.write(path, np.full(len(speech), np.nan, np.float32), rate, subtype="FLOAT")

    missing, _ = evaluate("missing", [None, *spoken[1][1:]])
    broken, rows = evaluate("nan", spoken[1][:1] * NUM_UTTERANCES, write=nan)
    assert missing["failed"] == 1 and broken["failed"] == NUM_UTTERANCES and "NaN or infinite" in rows[0]["error"]
    for name in ("seed-tts-eval", "cv3-eval", "cer", "pinyin_error_rate", PER):
        assert truth[0][name]["rate"] < missing[name]["rate"] < broken[name]["rate"] == 1.0
        assert truth[0][name]["length"] == missing[name]["length"] == broken[name]["length"]
    assert truth[0]["eos_share"] > missing["eos_share"] > broken["eos_share"] == 0.0
    for name, better in (("eos_share", -1), ("repetition", 1), ("clipped_share", 1)):
        values = [scores["quality"][name]["value"] * better for scores in (truth[0], missing, broken)]
        assert values == sorted(values) and values[0] < values[1]


def test_two_systems_are_compared_in_words(evaluate, spoken, truth, tmp_path):
    evaluate("half", [s[: len(s) // 2] for s in spoken[1]])
    good, bad = (read_utterances(tmp_path / name) for name in ("truth", "half"))
    assert {c["verdict"] for c in compare_rates(bad, good, "zh").values()} == {"better"}
    assert {c["verdict"] for c in compare_rates(good, bad, "zh").values()} == {"worse"}
    assert compare_quality(good, bad)["duration_s"]["verdict"] == "lower"
    good[0]["error"] = "lost"
    assert {c["verdict"] for c in compare_rates(bad, good, "zh").values()} == {"inconclusive: more audio failed"}


def test_the_judges_errors_are_clipped_at_the_length_of_a_text():
    """A transcript that loops counts as one error per unit, for the judge only."""
    utterance = {"id": "a", "target_text": "今天", "hypothesis": "今天" * 50, "judge_hypothesis": "今天" * 50}
    score.measure(utterance, None, "zh", None)
    assert utterance["errors"][PER] == {"substitutions": 0, "deletions": 0, "insertions": 98, "length": 2}
    assert all(sum(counts.values()) == 2 * counts["length"] for counts in utterance["judge_errors"].values())


def test_the_program_writes_all_figures(evaluate, spoken, truth, assets, tmp_path, capsys):
    set_path, output_dir = tmp_path / "set.jsonl", tmp_path / "truth"
    rows = [{"id": r["id"], "target_text": r["text"]} for r in spoken[0]]
    write_jsonl(set_path, rows)
    arguments = [
        "--output-dir", str(output_dir), "--eval-set", str(set_path), "--asr-dir", str(assets / "asr_eval"),
        "--quality-utterances", "3", "--reference-audio", str(assets / "prompts"),
        "--judge-asr-dir", str(assets / "asr_reward"),
    ]  # fmt: skip
    score.main(arguments)
    written = [output_dir / name for name in ("scores.json", "seed_0/utterances.jsonl", "seed_0/alignment.txt")]
    first = [path.read_bytes() for path in written]
    score.main(arguments)
    assert [path.read_bytes() for path in written] == first, "the same speech has other scores"
    scores = json.loads((output_dir / "scores.json").read_text())
    assert scores["asr"]["backend"] == "funasr" and len(scores["asr"]["sha256"]) == 64
    assert scores["pooled"][PER]["rate"] == truth[0][PER]["rate"]
    rows = read_jsonl(output_dir / "seed_0/utterances.jsonl")
    judged = [row["judge_errors"][PER] for row in rows]
    errors = sum(one[kind] for one in judged for kind in ("substitutions", "deletions", "insertions"))
    assert scores["judge"]["pooled"][PER]["rate"] == errors / sum(one["length"] for one in judged)
    assert scores["judge"]["asr"]["sha256"] != scores["asr"]["sha256"]
    assert [row["judge_hypothesis"] for row in rows] != [row["hypothesis"] for row in rows]
    assert scores["pooled"][PER]["ci"][0] <= scores["pooled"][PER]["rate"] <= scores["pooled"][PER]["ci"][1]
    assert scores["quality_sample"] == {"seed": "0", "utterances": 3} and scores["quality"]["dnsmos_ovrl"]["n"] == 3
    assert scores["quality"]["dnsmos_ovrl"]["model"].startswith("DNSMOS P.835")
    assert 2.0 < scores["quality"]["dnsmos_ovrl"]["value"] < 4.0
    assert scores["quality"]["speaker_similarity"]["value"] > 0.75
    assert scores["quality"]["speaker_similarity"]["model"].startswith("Resemblyzer")
    assert len(read_jsonl(output_dir / "seed_0/utterances.jsonl")) == NUM_UTTERANCES
    shown = capsys.readouterr().out
    assert "seed-tts-eval CER" in shown and "by Resemblyzer 0.1.4" in shown


class FixedTranscript:
    """An ASR model that returns the same transcript for every recording."""

    def transcribe(self, recordings, languages):
        assert len(languages) == len(recordings)
        return ["狐狸不跳" if language == "zh" else "The fox doesn't jump!" for language in languages]


def test_english_is_scored_by_words(tmp_path):
    for utt_id in ("a", "b"):
        save_audio(tmp_path / "seed_0" / f"{utt_id}.wav", np.full(ASR_HZ, 0.1, np.float32), ASR_HZ)
    line = {"finish_reason": "eos", "num_speech_tokens": 25, "duration_s": 1.0, "error": None}
    write_jsonl(tmp_path / "seed_0/manifest.jsonl", [line | {"id": i, "wav": f"{i}.wav"} for i in ("a", "b")])
    eval_set = [{"id": "a", "target_text": "the fox doesn't jump"}, {"id": "b", "target_text": "A dog."}]
    utterances = score.utterances_of(tmp_path / "seed_0/manifest.jsonl", eval_set, tmp_path)
    score.score(utterances, FixedTranscript(), "en", None, set())
    scores = score.describe(utterances, "en")
    assert scores["wer"]["rate"] == 4 / 6 and scores["seed-tts-eval"]["rate"] == (0 + 4 / 2) / 2
    assert "pinyin_error_rate" not in scores and utterances[0]["quality"]["speech_rate"] == 4.0
    assert score.alignment_text(utterances, "en").splitlines()[1] == "a hyp the fox doesn't jump"


def test_a_set_of_several_languages_has_mixed_error_rates_and_those_of_each_language(tmp_path):
    texts = {"a": ("en", "the fox doesn't jump 2 times"), "b": ("zh", "狐狸不叫"), "c": ("en", "A dog.")}
    for utt_id in texts:
        save_audio(tmp_path / "seed_0" / f"{utt_id}.wav", np.full(ASR_HZ, 0.1, np.float32), ASR_HZ)
    line = {"finish_reason": "eos", "num_speech_tokens": 25, "duration_s": 1.0, "error": None}
    write_jsonl(tmp_path / "seed_0/manifest.jsonl", [line | {"id": i, "wav": f"{i}.wav"} for i in texts])
    eval_set = [{"id": i, "target_text": text, "language": language} for i, (language, text) in texts.items()]
    utterances = score.utterances_of(tmp_path / "seed_0/manifest.jsonl", eval_set, tmp_path)
    language = set_language(row["language"] for row in eval_set)
    score.score(utterances, FixedTranscript(), language, None, set())
    scores = score.describe(utterances, language)
    errors = {"cer_zh": (1, 4), "wer_en": (2 + 4, 6 + 2), "mer": (7, 12), "spoken_en": (6, 8), "spoken": (7, 12)}
    assert language == "mixed" and list(scores)[: len(METRICS["mixed"])] == list(METRICS["mixed"])
    for name, (wrong, length) in errors.items():
        assert (scores[name]["rate"], scores[name]["length"]) == (wrong / length, length), name
    assert scores["seed-tts-eval_en"]["rate"] == (2 / 6 + 2) / 2
    assert "b ref 狐 狸 不 叫" in score.alignment_text(utterances, language)
    changes = compare_rates(utterances, utterances, language)
    assert changes.keys() == METRICS["mixed"].keys() and changes["cer_zh"]["difference"] == 0


def test_a_recogniser_without_a_language_of_the_set_is_named_before_anything_is_scored(assets, tmp_path):
    write_jsonl(tmp_path / "seed_0/manifest.jsonl", [{"id": "a"}])
    rows = [{"id": "a", "target_text": "好"}, {"id": "b", "target_text": "well", "language": "en"}]
    write_jsonl(tmp_path / "set.jsonl", rows)
    arguments = ["--output-dir", str(tmp_path), "--eval-set", str(tmp_path / "set.jsonl"), "--asr-dir"]
    chinese = str(assets / "asr_eval")
    with pytest.raises(SystemExit, match=f"{chinese} does not know the language en: .*: set eval_asr_dir "):
        score.main([*arguments, chinese])
    with pytest.raises(SystemExit, match="set judge_asr_dir to the folder of another one"):
        score.main([*arguments, str(tmp_path / "whisper"), "--judge-asr-dir", chinese])


def test_only_the_requested_seeds_are_scored_and_pooled(tmp_path):
    for seed in range(3):
        write_jsonl(tmp_path / f"seed_{seed}/manifest.jsonl", [{"id": "a"}])
        write_jsonl(tmp_path / f"seed_{seed}/utterances.jsonl", [{"id": "a", "seed": seed}])
    assert [path.parent.name for path in score.manifests_of(tmp_path, [2, 0])] == ["seed_0", "seed_2"]
    assert [row["seed"] for row in read_utterances(tmp_path)] == [0, 2]
    assert len(score.manifests_of(tmp_path, None)) == 3
    with pytest.raises(SystemExit, match="no seed_7/manifest.jsonl"):
        score.manifests_of(tmp_path, [0, 7])


def test_alignments_are_written_as_kaldi_does():
    utterances = [
        {"id": "a", "target_text": "我们，今天走吧", "hypothesis": "今天就走把了"},
        {"id": "b", "target_text": "好", "hypothesis": ""},
    ]
    assert score.alignment_text(utterances, "zh").splitlines() == [
        "a ref 我 们 今 天 *** 走 *** 吧", "a hyp *** *** 今 天 就 走 把 了", "a op D D C C I C I S", "a #csid 3 1 2 2",
        "b ref 好", "b hyp ***", "b op D", "b #csid 0 0 0 1",
    ]  # fmt: skip
