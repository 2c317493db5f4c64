import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import infer_dist
import infer_single
from scripts.score import main as score_main
from tts_grpo.speech.audio import load_audio, save_audio
from tts_grpo.speech.cosyvoice2.random_weights import make_cosyvoice2_folder
from tts_grpo.speech.generation import OFFICIAL
from tts_grpo.speech.synthesis import Synthesiser, add_arguments, sampling_of, utterance_seed
from tts_grpo.text.input_files import read_eval_set
from tts_grpo.text.jsonl import read_jsonl, write_jsonl
from tts_grpo.text.rules import TextRules

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NUM_UTTERANCES = 9


@pytest.fixture(scope="module")
def eval_set(assets, tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "set.jsonl"
    found = (
        read_jsonl(assets / "data/test.jsonl")[: NUM_UTTERANCES - 4]
        + read_jsonl(assets / "data/test_digits.jsonl")[-4:]
    )
    rows = [{"id": r["id"], "target_text": r["text"]} for r in found]
    prompt = read_jsonl(assets / "prompts/prompts.jsonl")[0]
    shutil.copy(assets / "prompts" / prompt["prompt_audio"], path.parent)
    rows[3] |= {"prompt_text": prompt["prompt_text"], "prompt_audio": prompt["prompt_audio"]}
    write_jsonl(path, rows)
    return path


def infer(assets, eval_set, output_dir, num_processes: int, *flags):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes),
        str(ROOT / "infer_dist.py"), "--llm-path", str(assets / "llm"), "--token2wav-dir", str(assets / "token2wav"),
        "--eval-set", str(eval_set), "--output-dir", str(output_dir), "--seeds", "0", "7", "--batch-size", "2",
        "--max-new-tokens", "120", "--llm-text", "spoken", *flags,
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def one_process(assets, eval_set, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one")
    done = infer(assets, eval_set, output_dir, 1)
    assert done.returncode == 0, done.stderr
    return output_dir


def test_flags_of_cosyvoices_own_sampling(assets, eval_set):
    """The length limits depend on the number of text tokens; the token limits of other texts are those of the flag."""
    flags = ["--top-p", "0.8", "--top-k", "25", "--repetition-window", "10", "--min-token-text-ratio", "2",
             "--max-token-text-ratio", "20"]  # fmt: skip
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base = ["--llm-path", str(assets / "llm"), "--token2wav-dir", str(assets / "token2wav")]
    assert sampling_of(parser.parse_args([*base, *flags])) == OFFICIAL
    args = parser.parse_args([*base, *flags, "--min-token-text-ratio", "5", "--max-token-text-ratio", "6"])
    synthesiser = Synthesiser(args, "cpu", eval_set.parent)
    rows = read_eval_set(eval_set)[:3]
    lengths = [len(synthesiser.tokenizer(row["target_text"])["input_ids"]) for row in rows]
    found = {
        row["id"]: speech.num_speech_tokens for row, speech in zip(rows, synthesiser.synthesise(rows, 0), strict=True)
    }
    assert all(5 * length <= found[row["id"]] <= 6 * length for row, length in zip(rows, lengths, strict=True))
    (batch,) = synthesiser.synthesise_all([(0, row) for row in rows], 3)
    assert {row["id"]: speech.num_speech_tokens for row, speech in zip(batch[1], batch[2], strict=True)} == found


def results(output_dir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output_dir)): p.read_bytes() for p in output_dir.glob("seed_*/**/*") if p.is_file()}


def test_manifest_is_complete(one_process, eval_set):
    for seed in (0, 7):
        lines = read_jsonl(one_process / f"seed_{seed}" / "manifest.jsonl")
        assert [line["id"] for line in lines] == [row["id"] for row in read_jsonl(eval_set)]
        for line in lines:
            assert line["seed"] == seed and line["finish_reason"] in ("eos", "length")
            assert (one_process / f"seed_{seed}" / line["wav"]).stat().st_size > 44
            assert line["duration_s"] == pytest.approx(line["num_speech_tokens"] / 25)
    wavs = {seed: {p.name: p.read_bytes() for p in (one_process / f"seed_{seed}/wavs").iterdir()} for seed in (0, 7)}
    assert len(wavs[0]) == NUM_UTTERANCES
    assert all(wavs[0][name] != wavs[7][name] for name in wavs[0]), "the seeds gave the same speech"


def test_random_numbers_depend_on_seed_and_id():
    assert len({utterance_seed(seed, utt_id) for seed in (0, 7) for utt_id in "ab"}) == 4


def test_precision_is_passed_to_the_decoder(assets, eval_set, tmp_path):
    done = infer(assets, eval_set, tmp_path, 1, "--precision", "fp16")
    assert done.returncode and "the tiny token2wav does not support the precision fp16" in done.stderr


def test_two_processes_and_a_resumed_run_give_the_same_bytes(assets, eval_set, one_process, tmp_path):
    done = infer(assets, eval_set, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == results(one_process)
    record = tmp_path / "utterances.rank1.jsonl"  # as after a crash: one line missing and the next one truncated
    lines = record.read_text().splitlines()
    record.write_text("\n".join(lines[:-2]) + "\n" + lines[-1][:50])
    for path in tmp_path.glob("seed_*/manifest.jsonl"):
        path.unlink()
    done = infer(assets, eval_set, tmp_path, 1)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == results(one_process)


def test_continuous_batching_gives_the_same_speech(assets, eval_set, one_process, tmp_path):
    """With two processes, and after a crash that lost the record of a batch, too; up to rounding of the waveforms."""

    def assert_equal():
        for path in one_process.glob("seed_*/manifest.jsonl"):
            assert read_jsonl(tmp_path / path.relative_to(one_process)) == read_jsonl(path)
        for path in one_process.glob("seed_*/wavs/*.wav"):
            found = load_audio(tmp_path / path.relative_to(one_process))
            np.testing.assert_allclose(found, load_audio(path), atol=1e-3)

    done = infer(assets, eval_set, tmp_path, 2, "--engine", "continuous")
    assert done.returncode == 0, done.stderr
    assert "utterances in " in done.stderr and "--engine continuous" in done.stderr
    assert_equal()
    record = tmp_path / "utterances.rank0.jsonl"
    record.write_text("\n".join(record.read_text().splitlines()[:-1]))
    for path in tmp_path.glob("seed_*/manifest.jsonl"):
        path.unlink()
    done = infer(assets, eval_set, tmp_path, 1, "--engine", "continuous")
    assert done.returncode == 0, done.stderr
    assert_equal()


def test_a_failure_to_write_stops_the_run(assets, eval_set, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(infer_dist, "save_audio", fail)
    command = ["--llm-path", assets / "llm", "--token2wav-dir", assets / "token2wav", "--eval-set", eval_set]
    with pytest.raises(OSError, match="no space left"):
        infer_dist.main([*map(str, command), "--output-dir", str(tmp_path), "--max-new-tokens", "5"])
    assert not list(tmp_path.glob("seed_*/manifest.jsonl"))


@pytest.fixture
def changed_set(eval_set, tmp_path):
    """A copy of the set: one line changed, one removed, one added, and the recording of one prompt moved."""
    rows = read_jsonl(eval_set)
    (tmp_path / "voices").mkdir()
    shutil.copy(eval_set.parent / rows[3]["prompt_audio"], tmp_path / "voices/voice.ogg")
    rows[3]["prompt_audio"] = "voices/voice.ogg"
    rows[0] |= {"target_text": "明天不会下雨。"}
    write_jsonl(tmp_path / "set.jsonl", [{"id": "new", "target_text": "今天天气很好。"}, *rows[:5], *rows[6:]])
    return tmp_path / "set.jsonl"


def test_only_what_changed_in_the_set_is_synthesised_again(assets, eval_set, one_process, changed_set, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(one_process, out)
    first = read_jsonl(eval_set)[0]["id"]
    kept = {path: path.stat().st_mtime_ns for path in out.glob("seed_*/wavs/*.wav") if path.stem != first}
    done = infer(assets, changed_set, out, 2)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for seed in (0, 7):
        lines = read_jsonl(out / f"seed_{seed}/manifest.jsonl")
        texts = [(line["id"], line["target_text"], line["prompt_audio"]) for line in lines]
        assert texts == [(r["id"], r["target_text"], r.get("prompt_audio")) for r in read_jsonl(changed_set)]
        assert (out / f"seed_{seed}/wavs/new.wav").is_file()
        assert results(out)[f"seed_{seed}/wavs/{first}.wav"] != results(one_process)[f"seed_{seed}/wavs/{first}.wav"]
    done = infer(assets, eval_set, out, 1)  # the first set again: the changed text's audio must be made again
    assert done.returncode == 0 and {path: path.stat().st_mtime_ns for path in kept} == kept, done.stderr
    assert results(out)[f"seed_7/wavs/{first}.wav"] == results(one_process)[f"seed_7/wavs/{first}.wav"]


def test_deleted_or_damaged_audio_is_synthesised_again(assets, eval_set, one_process, tmp_path):
    shutil.copytree(one_process, tmp_path, dirs_exist_ok=True)
    wavs = sorted((tmp_path / "seed_0/wavs").glob("*.wav"))
    wavs[0].unlink()
    wavs[1].write_bytes(wavs[1].read_bytes()[:-100])
    done = infer(assets, eval_set, tmp_path, 1)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path).keys() == results(one_process).keys()
    for wav in wavs[:2]:
        again, before = load_audio(wav), load_audio(one_process / wav.relative_to(tmp_path))
        np.testing.assert_allclose(again, before, atol=1e-3)  # not exact, because the batches differ


def test_another_voice_or_language_changes_the_fingerprint(eval_set, tmp_path):
    rows = [{"id": "a", "target_text": "好", "language": "zh", "prompt_text": "你好", "prompt_audio": "a.wav"}]
    found = set()
    for content in (b"1", b"2"):
        (tmp_path / "a.wav").write_bytes(content)
        found.add(infer_dist.fingerprints(rows, tmp_path)["a"])
    for change in ({"prompt_text": "您好"}, {"language": "en"}, {"instruct": "请用广东话表达。"}):
        found.add(infer_dist.fingerprints([rows[0] | change], tmp_path)["a"])
    assert len(found) == 5


def test_a_record_that_a_crash_truncated_within_a_character(tmp_path):
    def record(utt_id: str) -> bytes:
        line = {"seed": 0, "id": utt_id, "wav": None, "target_text": "今天"}
        utterances = [{"fingerprint": "f", "wav_sha256": None, "line": line}]
        return json.dumps({"utterances": utterances}, ensure_ascii=False).encode()

    cut = record("b")[: record("b").index("天".encode()) + 1]
    (tmp_path / "utterances.rank0.jsonl").write_bytes(b"\n" + record("a") + b"\n" + cut)
    assert list(infer_dist.finished(tmp_path, {"a": "f", "b": "f"})) == [(0, "a")]


def test_other_settings_are_refused(assets, eval_set, one_process):
    done = infer(assets, eval_set, one_process, 1, "--temperature", "0.5")
    assert done.returncode != 0 and "results of other settings (different: temperature)" in done.stderr


@pytest.mark.parametrize("fault", ["no word", "no audio", "missing"])
def test_a_set_with_a_fault_is_refused_before_synthesis(assets, eval_set, tmp_path, fault):
    rows = [*read_jsonl(eval_set), {"id": "last", "target_text": "我们走吧。"}]
    rows[-1] |= {"target_text": "……"} if fault == "no word" else {"prompt_text": "好", "prompt_audio": "a.wav"}
    if fault == "no audio":
        (tmp_path / "a.wav").write_bytes(b"RIFF")
    shutil.copy(next(eval_set.parent.glob("*.ogg")), tmp_path)
    write_jsonl(tmp_path / "set.jsonl", rows)
    message = {"no word": f"line {NUM_UTTERANCES + 1}: target_text has no word", "missing": "a.wav is missing",
               "no audio": "a.wav: cannot be read as audio"}[fault]  # fmt: skip
    command = ["--llm-path", assets / "llm", "--token2wav-dir", assets / "token2wav"]
    command += ["--eval-set", tmp_path / "set.jsonl", "--output-dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=message):
        infer_dist.main([*map(str, command)])
    assert not (tmp_path / "out").exists()


def test_texts_over_the_token_limit_are_reported(tmp_path, caplog):
    rows = [{"id": "s", "target_text": "今天天气很好。"}, {"id": "l", "target_text": "我们明天早上出发。" * 10}]
    write_jsonl(tmp_path / "set.jsonl", rows)
    assert [row["id"] for row in infer_dist.load_eval_set(tmp_path / "set.jsonl", 160, TextRules())] == ["s", "l"]
    assert "1 texts are too long for max_new_tokens=160 and will be truncated, first l (90 characters)" in caplog.text
    caplog.clear()
    infer_dist.load_eval_set(tmp_path / "set.jsonl", 512, TextRules())
    assert not caplog.text


def test_batches_do_not_depend_on_order_of_work():
    rows = [{"id": str(i), "target_text": "好" * (i % 5 + 1)} for i in range(23)]
    batches = infer_dist.make_batches(rows, [1, 2], 4)
    for seed in (1, 2):
        batched_ids = [row["id"] for batch in batches if batch.seed == seed for row in batch.rows]
        assert sorted(batched_ids, key=int) == [row["id"] for row in rows]


def test_audio_of_another_text_is_not_scored(assets, one_process, changed_set):
    command = ["--output-dir", one_process, "--eval-set", changed_set, "--asr-dir", assets / "asr_eval"]
    with pytest.raises(SystemExit, match="was synthesised from .*, but the set's text is '明天不会下雨。'"):
        score_main([*map(str, command), "--quality-utterances", "0"])
    assert not (one_process / "scores.json").exists()


def score(assets, output_dir, eval_set):
    command = ["bash", str(ROOT / "scripts/compute_wer.sh"), str(output_dir), str(eval_set)]
    environment = {"python": sys.executable, "PATH": "/usr/bin:/bin", "eval_asr_dir": str(assets / "asr_eval")}
    environment |= {"quality_utterances": "2", "reference_audio": str(assets / "prompts")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((output_dir / "scores.json").read_text())


def test_failures_never_make_a_score_better(assets, eval_set, one_process, tmp_path):
    shutil.copytree(one_process, tmp_path, dirs_exist_ok=True)
    good = score(assets, tmp_path, eval_set)
    assert good["pooled"]["pinyin_error_rate_toneless"]["rate"] < 0.3
    assert good["quality_sample"] == {"seed": "0", "utterances": 2} and good["quality"]["speaker_similarity"]["n"] == 2
    wavs = sorted((tmp_path / "seed_0/wavs").glob("*.wav"))
    wavs[0].unlink()
    wavs[1].write_bytes(b"RIFF")
    save_audio(wavs[2], np.zeros(16000, np.float32), 16000)
    manifest = tmp_path / "seed_0/manifest.jsonl"
    write_jsonl(manifest, read_jsonl(manifest)[:-1])
    bad = score(assets, tmp_path, eval_set)
    counts = bad["pooled"]["cer"]
    assert counts["length"] == good["pooled"]["cer"]["length"]
    assert counts["deletions"] > good["pooled"]["cer"]["deletions"] and bad["seeds"]["0"]["failed"] == 4
    assert counts["rate"] > good["pooled"]["cer"]["rate"]
    assert bad["seeds"]["7"] == good["seeds"]["7"]
    rows = read_jsonl(tmp_path / "seed_0/utterances.jsonl")
    assert len(rows) == NUM_UTTERANCES and "not in the manifest" in rows[-1]["error"]
    first = rows[0]["id"]
    lines = [line for line in (tmp_path / "seed_0/alignment.txt").read_text().splitlines() if line.startswith(first)]
    assert [line.split()[1] for line in lines] == ["ref", "hyp", "op", "#csid"]


@pytest.mark.parametrize("place", [0, 3], ids=["no prompt", "prompt"])
def test_a_single_utterance_equals_that_of_the_evaluation(assets, eval_set, one_process, tmp_path, place):
    row = read_jsonl(eval_set)[place]
    command = ["--llm-path", assets / "llm", "--token2wav-dir", assets / "token2wav", "--text", row["target_text"]]
    command += ["--max-new-tokens", "120", "--seed", "7", "--utt-id", row["id"], "--output", tmp_path / "a.wav"]
    if place:
        command += ["--prompt-audio", eval_set.parent / row["prompt_audio"], "--prompt-text", row["prompt_text"]]
    infer_single.main([*map(str, command)])
    alone, evaluated = (load_audio(path) for path in (tmp_path / "a.wav", one_process / f"seed_7/wavs/{row['id']}.wav"))
    np.testing.assert_allclose(alone, evaluated, atol=1e-3)  # equal up to rounding, because the batches differ


def test_the_single_text_may_be_the_tongue_twister(assets, tmp_path, capsys):
    command = ["--llm-path", assets / "llm", "--token2wav-dir", assets / "token2wav", "--output", tmp_path / "a.wav"]
    infer_single.main([*map(str, command)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.wav") and len(load_audio(tmp_path / "a.wav")) > 16000


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("今天<|im_end|>好", "contains <|im_end|>, which is a tag, not a word"),
        ("……", "text has no word"),
        ("", "text has no word"),
    ],
)
def test_unusable_texts_are_refused(assets, text, fault):
    command = ["--llm-path", str(assets / "llm"), "--token2wav-dir", str(assets / "token2wav"), "--text", text]
    with pytest.raises(SystemExit, match=fault.replace("|", r"\|")):
        infer_single.main(command)


def test_the_language_model_reads_the_text_by_the_rules(assets):
    args = infer_single.get_args(["--llm-path", "x", "--token2wav-dir", "x", "--text", "2024年[breath]。",
                                  "--text-tags", "remove", "--llm-text", "spoken"])  # fmt: skip
    prompt_text, text = infer_single.checked_texts(args)
    assert (prompt_text, text) == ("", "2024年。")
    synthesiser = Synthesiser.__new__(Synthesiser)
    synthesiser.rules = TextRules(llm_text="spoken")
    assert synthesiser.texts({"target_text": text, "prompt_text": ""}) == ("", "二零二四年。")


def test_an_instruction_for_a_model_that_takes_none_is_named(assets, tmp_path):
    row = {"id": "a", "text": "好", "instruct": "请用广东话表达。"}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    command = ["--llm-path", assets / "llm", "--token2wav-dir", assets / "token2wav", "--eval-set",
               tmp_path / "set.jsonl", "--output-dir", tmp_path / "out"]  # fmt: skip
    with pytest.raises(SystemExit, match="a: this language model takes no instructions"):
        infer_dist.main([*map(str, command)])


def test_utterances_without_a_prompt_are_named_before_synthesis(assets, eval_set, tmp_path):
    token2wav_dir = make_cosyvoice2_folder(tmp_path / "token2wav")
    command = ["--llm-path", assets / "llm", "--token2wav-dir", token2wav_dir, "--eval-set", eval_set]
    with pytest.raises(SystemExit, match=f"{NUM_UTTERANCES - 1} utterances have no prompt, .* first"):
        infer_dist.main([*map(str, command), "--output-dir", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("seed_*"))
    with pytest.raises(SystemExit, match="1 utterances have no prompt"):
        infer_single.main([*map(str, command[:4]), "--output", str(tmp_path / "a.wav")])
