import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.hub_repositories import make_voxbox
from tts_grpo.text.prompts import COSYVOICE_CHAT_TEMPLATE, END_OF_SYSTEM

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


# Calls prepare_data.py's main once per line of arguments in one process, because its imports take longer than its work.
WORKER = """
import contextlib, io, json, sys, traceback
import prepare_data
for line in sys.stdin:
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            prepare_data.main(json.loads(line))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            errors.write(f"{end.code}\\n")
        except Exception:
            status = 1
            traceback.print_exc()
    print(json.dumps([status, output.getvalue(), errors.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def worker(trainer_python):
    command = [trainer_python, "-c", WORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.stdin.close()


def prepare(worker, tmp_path, train: list[str], test: list[str], *flags):
    for name, lines in (("train", train), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    arguments = [
        "--train-file", str(tmp_path / "train.jsonl"), "--test-file", str(tmp_path / "test.jsonl"), "--output-dir",
        str(tmp_path / "out"), "--llm-path", str(ROOT / "assets/tiny/llm"), *flags,
    ]  # fmt: skip
    worker.stdin.write(json.dumps(arguments) + "\n")
    worker.stdin.flush()
    status, output, errors = json.loads(worker.stdout.readline())
    return subprocess.CompletedProcess(arguments, status, output, errors)


def rows_of(python, path) -> list[dict]:
    code = "import sys, json, pyarrow.parquet as pq; print(json.dumps(pq.read_table(sys.argv[1]).to_pylist()))"
    return json.loads(
        subprocess.run([python, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    )


def line(text) -> str:
    return json.dumps({"text": text, "other": 1}, ensure_ascii=False)


def test_schema(worker, trainer_python, tmp_path):
    done = prepare(worker, tmp_path, [line("你好。"), line("再见"), ""], [line("明天")])
    assert done.returncode == 0, done.stderr
    first, second = rows_of(trainer_python, tmp_path / "out/train.parquet")
    assert first == {
        "data_source": "text-to-speech",
        "prompt": [{"role": "user", "content": "Convert the text to speech: 你好。"}],
        "ability": "text-to-speech",
        "reward_model": {"style": "rule", "ground_truth": "你好。"},
        "extra_info": {"split": "train", "index": 0, "text": "你好。", "language": "zh"},
    }
    assert second["extra_info"]["index"] == 1
    assert rows_of(trainer_python, tmp_path / "out/test.parquet")[0]["extra_info"]["split"] == "test"


def test_what_stage_0_prints(worker, trainer_python, tmp_path):
    texts = ["2024年有50%的人。", "今天meeting取消了。", "没有变化，对吧？", "《书》里[laughter]有", "３月", "三月"]
    flags = ("--max-bad-ratio", "0.5", "--llm-text", "spoken")
    done = prepare(worker, tmp_path, list(map(line, texts)), [line("明天"), line("3月。")], *flags)
    assert done.returncode == 1 and "1 of the 2 texts of " in done.stderr and "max_test_overlap=0.1" in done.stderr
    assert not list((tmp_path / "out").glob("*.parquet*"))
    flags += ("--max-test-overlap", "0.5")
    done = prepare(worker, tmp_path, list(map(line, texts)), [line("明天"), line("3月。")], *flags)
    assert done.returncode == 0 and "are training texts as well" in done.stdout, done.stderr
    assert "train: 5 samples, 1 lines left out: {'contains [laughter]': 1}" in done.stdout
    assert "1 texts have the same reading as an earlier one" in done.stdout
    assert "number of texts with: digits 2, tags 1, Latin letters 2" in done.stdout
    assert "2 texts have a reading that differs from the text" in done.stdout
    assert "2024年有50%的人。 -> 二零二四年有百分之五十的人" in done.stdout and "３月 -> 三月" in done.stdout
    row = rows_of(trainer_python, tmp_path / "out/train.parquet")[0]
    assert row["prompt"][0]["content"] == "Convert the text to speech: 二零二四年有百分之五十的人。"
    assert row["reward_model"]["ground_truth"] == texts[0]


def test_each_line_is_read_in_its_language(worker, trainer_python, tmp_path):
    lines = [
        {"text": "房间302。"}, {"text": "Room 302 costs $5.", "language": "en-US"}, {"text": "Room 302."},
        {"text": "我们meet在302。", "language": "zh"}, {"text": "Room 北京", "language": "en"},
        {"text": "きのう", "language": "ja"},
        {"text": "Room three hundred two costs five dollars", "language": "en"},
    ]  # fmt: skip
    train = [json.dumps(row) for row in lines]
    flags = ("--max-bad-ratio", "0.5", "--llm-text", "spoken")
    done = prepare(worker, tmp_path, train, [line("明天")], *flags)
    assert done.returncode == 0 and "languages: en 2, zh 2" in done.stdout, done.stdout + done.stderr
    assert "1 texts have the same reading as an earlier one" in done.stdout
    rows = rows_of(trainer_python, tmp_path / "out/train.parquet")
    assert [row["extra_info"]["language"] for row in rows] == ["zh", "en", "zh", "en"]
    assert [row["prompt"][0]["content"][28:] for row in rows[:2]] == [
        "房间三零二。", "Room three hundred two costs five dollars.",
    ]  # fmt: skip
    reasons = {row["line"]: row["reason"] for row in map(json.loads, (tmp_path / "out/rejects.jsonl").open())}
    assert "no Chinese character (language zh; an English text needs" in reasons[3]
    assert (
        "letters of another script than en's: chinese" in reasons[5] and reasons[6] == "language is 'ja', not zh or en"
    )
    known = '{"text": "明天", "speech_tokens": [1]}'
    for text, missing in ((f"{known}\n{known}", "no line in language en"), (f"{known}\n{train[1]}", "line 2")):
        (tmp_path / "known.jsonl").write_text(text)
        command = ["--check", "--jsonl", tmp_path / "known.jsonl", "--train-parquet", tmp_path / "out/train.parquet"]
        done = subprocess.run([trainer_python, "reward_tts.py", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and missing in done.stderr
    done = prepare(worker, tmp_path, train, [line("明天")], *flags, "--language", "en")
    assert done.returncode == 1 and "1 of 1 lines" in done.stderr


def test_languages_that_a_recogniser_of_the_reward_does_not_know_are_refused(worker, tmp_path, assets):
    english = [json.dumps({"text": f"Room {i}", "language": "en"}) for i in range(2)]
    flags = ("--asr-dirs", str(assets / "asr_reward"))
    done = prepare(worker, tmp_path, [line("你好"), *english], [line("明天")], *flags, "--max-bad-ratio", "0.9")
    assert done.returncode == 0 and "train: 1 samples, 2 lines left out" in done.stdout, done.stderr
    assert "does not know the language en" in (tmp_path / "out/rejects.jsonl").read_text()
    done = prepare(worker, tmp_path, english, english, *flags, "--language", "en")
    assert done.returncode == 1 and "prepare_data.py: language=en: the recogniser" in done.stderr
    assert "asr_reward does not know the language en: its vocabulary has zh only: set reward_asr_dir" in done.stderr


TAGGED = {
    "用四川话说<|endofprompt|>今天好": "今天好", "[laughter]哈哈": "哈哈", "<strong>今天</strong>好": "今天好",
    "今天<|im_end|>好": "今天好", "<|s_12|>今天好": "今天好", "<|SPEECH_GENERATION_END|>今天好": "今天好",
    "<|im<|s_1|>_end|>今天": "今天", '<break time="1s"/>今天': "今天",
}  # fmt: skip


def test_tags_are_never_in_a_prompt(worker, trainer_python, tmp_path):
    done = prepare(worker, tmp_path, list(map(line, TAGGED)), [line("明天")], "--text-tags", "remove")
    assert done.returncode == 0, done.stderr
    rows = rows_of(trainer_python, tmp_path / "out/train.parquet")
    assert [row["reward_model"]["ground_truth"] for row in rows] == list(TAGGED.values())
    assert [row["prompt"][0]["content"][28:] for row in rows] == list(TAGGED.values())


def test_fewer_texts_than_a_batch_are_named(worker, tmp_path):
    done = prepare(worker, tmp_path, [line("你好")] * 15, [line("明天")], "--batch-size", "16")
    assert done.returncode == 1 and "has 15 usable texts, fewer than the 16 of a training step" in done.stderr
    assert not list((tmp_path / "out").glob("*.parquet*"))


def test_the_evaluation_set_is_checked_whole(worker, tmp_path):
    def with_set(*rows):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "set.jsonl").write_text(lines, encoding="utf-8-sig")
        flags = ("--eval-set", str(tmp_path / "set.jsonl"), "--max-new-tokens", "160")
        return prepare(worker, tmp_path, [line("你好")] * 9, [line("明天")], *flags)

    good = {"id": 1, "target_text": "今天天气很好。"}
    done = with_set(good, {"id": "b", "target_text": "……"}, {"id": "c", "target_text": "好<|im_end|>"})
    assert done.returncode == 1 and "set.jsonl, line 2: target_text has no word" in done.stderr
    assert "set.jsonl, line 3: contains <|im_end|>" in done.stderr and not list((tmp_path / "out").glob("*.parquet*"))
    done = with_set(good, {"id": "l", "target_text": "我们明天早上出发。" * 200}, {"id": "e", "target_text": "Hello"})
    assert done.returncode == 0, done.stderr
    assert "1 texts are too long for max_new_tokens=160 and will be truncated, first l (1800 characters)" in done.stdout
    assert "1 texts could not be trained on, first e: no Chinese character" in done.stdout
    done = with_set(good, {"id": "b", "target_text": "你好！"})
    assert done.returncode == 1 and "1 of the 2 texts of " in done.stderr and "set.jsonl are training" in done.stderr


def test_a_check_writes_nothing(worker, tmp_path):
    done = prepare(worker, tmp_path, [line("你好")], [line("明天")], "--check")
    assert done.returncode == 0 and "train: 1 samples" in done.stdout and not (tmp_path / "out").exists()
    done = prepare(worker, tmp_path, [line("……")], [line("明天")], "--check")
    assert done.returncode == 1 and "the first: 1, text has no word" in done.stderr and not (tmp_path / "out").exists()


def test_preview(worker, tmp_path):
    train = [line("下午14:30开会。"), "{", line("没有"), line("不印")]
    done = prepare(worker, tmp_path, train, [], "--preview", "3", "--llm-text", "spoken")
    assert done.returncode == 0 and not (tmp_path / "out").exists(), done.stderr
    lines = [row.split() for row in done.stdout.splitlines()]
    assert lines[:3] == [
        ["1", "下午14:30开会。"],
        ["model", "下午十四点三十分开会。"],
        ["spoken", "下午十四点三十分开会"],
    ]
    assert lines[3] == ["units", *"下午十四点三十分开会"] and lines[4][:3] == ["2", "not", "JSON"]
    assert lines[5] == ["3", "没有"] and len(lines) == 9


def test_bad_lines_are_listed(worker, trainer_python, tmp_path):
    bad = ["{", '{"txt": "x"}', line("，。！"), line("好" * 200)]
    good = [line(f"你好{i}") for i in range(4)]
    flags = ("--max-bad-ratio", "0.5", "--max-prompt-length", "64", "--max-test-overlap", "1")
    done = prepare(worker, tmp_path, bad + good, good, *flags)
    assert done.returncode == 0, done.stderr
    rejects = [json.loads(row) for row in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejects] == [1, 2, 3, 4]
    reasons = [row["reason"] for row in rejects]
    assert reasons[0].startswith("not JSON (") and reasons[1] == "no text"
    assert "no word" in reasons[2] and "64 tokens" in reasons[3]
    assert len(rows_of(trainer_python, tmp_path / "out/train.parquet")) == 4


def test_too_many_bad_lines_stop_and_leave_nothing(worker, tmp_path):
    done = prepare(worker, tmp_path, ["{", line("你好")], [line("你好")])
    assert done.returncode == 1 and "1 of 2 lines" in done.stderr and "rejects.jsonl" in done.stderr
    assert not list((tmp_path / "out").glob("*.parquet*"))


def test_equal_files_give_equal_bytes(trainer_python, tmp_path):
    """In two processes, in which Python orders sets of texts differently."""
    data = ROOT / "assets/tiny/data"
    made = []
    for seed in ("1", "2"):
        command = [
            trainer_python, str(ROOT / "prepare_data.py"), "--train-file", str(data / "grpo.jsonl"), "--test-file",
            str(data / "dev.jsonl"), "--eval-set", str(data / "test.jsonl"), "--output-dir", str(tmp_path / seed),
            "--llm-path", str(ROOT / "assets/tiny/llm"), "--llm-text", "spoken",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        files = {path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()}
        assert {"train.parquet", "test.parquet"} <= files.keys()
        made.append((files, done.stdout.replace(str(tmp_path / seed), "")))
    assert made[0] == made[1]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_as_jsonl_is(worker, trainer_python, tmp_path, indent):
    rows = [{"text": "今天天气很好。"}, {"txt": "x"}, {"text": "我们明天出发。"}]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    flags = ("--train-file", str(array), "--max-bad-ratio", "0.5")
    done = prepare(worker, tmp_path, [], [line("你好")], *flags)
    assert done.returncode == 0, done.stderr
    kept = rows_of(trainer_python, tmp_path / "out/train.parquet")
    assert [row["extra_info"]["text"] for row in kept] == ["今天天气很好。", "我们明天出发。"]
    rejects = [json.loads(row) for row in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejects] == [(2, "no text")]


def test_a_truncated_array_is_an_error(worker, tmp_path):
    (tmp_path / "array.json").write_text('[{"text": "你好"},\n {"text": "再', encoding="utf-8")
    done = prepare(worker, tmp_path, [], [line("你好")], "--train-file", str(tmp_path / "array.json"))
    assert done.returncode == 1 and "array.json begins with '[' but is not a JSON array" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_byte_order_mark_is_skipped(worker, trainer_python, tmp_path):
    (tmp_path / "bom.jsonl").write_text(line("今天") + "\n" + line("明天") + "\n", encoding="utf-8-sig")
    done = prepare(worker, tmp_path, [], [line("你好")], "--train-file", str(tmp_path / "bom.jsonl"))
    assert done.returncode == 0, done.stderr
    assert len(rows_of(trainer_python, tmp_path / "out/train.parquet")) == 2


def test_voxbox_is_read_as_it_is(worker, trainer_python, tmp_path, assets):
    make_voxbox(tmp_path / "voxbox", assets)
    lines = (tmp_path / "voxbox/metadata/aishell-3.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(json.loads(lines[0])) == 15
    done = prepare(worker, tmp_path, lines[:20], lines[-2:])
    assert done.returncode == 0, done.stderr
    assert (
        rows_of(trainer_python, tmp_path / "out/train.parquet")[0]["extra_info"]["text"] == json.loads(lines[0])["text"]
    )


def test_missing_file(worker, tmp_path):
    done = prepare(worker, tmp_path, [line("你好")], [line("你好")], "--test-file", str(tmp_path / "no.jsonl"))
    assert done.returncode == 1 and "no.jsonl is missing" in done.stderr


RECORDING = [(7 * i) % 6561 for i in range(300)]


def test_a_rollout_continues_its_own_recording(worker, tmp_path, trainer_python):
    """1 to 5 s of it, at most half, equal at each run; prompt and reward get the same tokens."""
    texts = ["你好。", "你们好。", "他们好。", "天气很好。"]
    lines = [json.dumps({"text": text, "speech_tokens": RECORDING[: 300 if i else 40]}) for i, text in enumerate(texts)]
    lines.append(json.dumps({"text": "没有声音。"}))
    flags = ["--speech-prefix", "recording", "--max-prompt-length", "224", "--max-bad-ratio", "0.5"]
    for _ in range(2):
        done = prepare(worker, tmp_path, lines, lines[1:2], *flags, "--max-test-overlap", "1")
        assert done.returncode == 0, done.stderr
        rows = rows_of(trainer_python, tmp_path / "out/train.parquet")
        prefixes = [row["extra_info"]["speech_prefix"] for row in rows]
        assert [len(prefix) for prefix in prefixes] == [20, 48, 26, 38]
        for row, prefix in zip(rows, prefixes, strict=True):
            assert prefix == RECORDING[: len(prefix)]
            user, speech = row["prompt"]
            assert user["content"].endswith(row["extra_info"]["text"])
            assert speech == {"role": "speech", "content": "".join(f"<|s_{token}|>" for token in prefix)}
    assert "speech_tokens is not a list" in (tmp_path / "out/rejects.jsonl").read_text()
    done = prepare(worker, tmp_path, lines, lines[1:2], *flags[:2], "--max-prompt-length", "50")
    assert done.returncode == 1 and "the prompt has more than 50 tokens" in done.stderr


def test_a_rollout_continues_a_voice_that_the_reward_server_has_drawn_too(worker, tmp_path, trainer_python):
    from tts_grpo.speech.voices import choose_voice

    voices = [{"text": f"声音{name}。", "speech_tokens": RECORDING[: 9 + i]} for i, name in enumerate("甲乙丙")]
    (tmp_path / "voices.jsonl").write_text("".join(json.dumps(voice) + "\n" for voice in voices))
    texts = [f"{word}好。" for word in ("你", "我", "他", "天气", "今天", "大家")]
    lines = [json.dumps({"text": text}) for text in texts]
    flags = ["--speech-prefix", "voice", "--voices", str(tmp_path / "voices.jsonl"), "--seed", "7"]
    done = prepare(worker, tmp_path, lines, [json.dumps({"text": "再见。"})], *flags)
    assert done.returncode == 0, done.stderr
    drawn = []
    for row, text in zip(rows_of(trainer_python, tmp_path / "out/train.parquet"), texts, strict=True):
        voice = choose_voice(voices, text, 7)
        assert row["prompt"][0]["content"].endswith(f": {voice['text']}{text}")
        assert row["prompt"][1]["content"].count("<|s_") == len(voice["speech_tokens"])
        assert row["reward_model"]["ground_truth"] == text and "speech_prefix" not in row["extra_info"]
        drawn.append(voice["text"])
    assert len(set(drawn)) > 1
    (tmp_path / "voices.jsonl").unlink()  # --check runs before stage 0 makes the file
    assert prepare(worker, tmp_path, lines, lines[:1], *flags, "--check", "--max-test-overlap", "1").returncode == 0


@pytest.fixture
def cosyvoice3_tokenizer(tmp_path):
    """A folder with the tiny stack's tokenizer, in CosyVoice3's form."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny/llm")
    tokenizer.add_tokens([END_OF_SYSTEM, "<|endofprompt|>"], special_tokens=True)
    tokenizer.chat_template = COSYVOICE_CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "llm")
    return str(tmp_path / "llm")


def test_instructions(worker, trainer_python, cosyvoice3_tokenizer, tmp_path):
    train = [
        {"text": "你好。"}, {"text": "再见。", "instruct": "请用广东话表达。"}, {"text": "明天。", "instruct": 3},
        {"text": "早上。", "instruct": "You are a helpful assistant. 请用广东话表达。<|endofprompt|>"},
        {"text": "我们" * 60, "instruct": "Read the TEXT slowly."},  # with its text twice, it has over 220 tokens
    ]  # fmt: skip
    voice = {"text": "晚上", "speech_tokens": [5, 6]}
    (tmp_path / "voices.jsonl").write_text(json.dumps(voice) + "\n")
    flags = ["--llm-path", cosyvoice3_tokenizer, "--max-bad-ratio", "0.5", "--speech-prefix", "voice", "--voices",
             str(tmp_path / "voices.jsonl"), "--max-prompt-length", "220"]  # fmt: skip
    lines = [json.dumps(row, ensure_ascii=False) for row in train]
    done = prepare(worker, tmp_path, lines, [line("好")], *flags)
    assert done.returncode == 0, done.stderr
    plain, instructed, _ = (row["prompt"] for row in rows_of(trainer_python, tmp_path / "out/train.parquet"))
    system = "You are a helpful assistant."
    assert plain[0]["content"] == f"{system}<|endofprompt|>晚上你好。" and len(plain) == 2
    (message,) = instructed  # without the voice's speech
    assert message["content"] == f"{system} 请用广东话表达。<|endofprompt|>再见。"
    reasons = [json.loads(row)["reason"] for row in (tmp_path / "out/rejects.jsonl").read_text("utf-8").splitlines()]
    assert "instruct is the number 3" in reasons[0] and "instruct contains <|endofprompt|>" in reasons[1]
    refused = prepare(worker, tmp_path, lines[:2], [line("好")])  # the tiny model
    assert refused.returncode == 1 and "takes no instructions" in refused.stderr
