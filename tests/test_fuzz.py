"""Random input: data preparation, prompts, evaluation sets, scores, report and server protocol give results or errors.

FUZZ_EXAMPLES is the number of cases per test; tests/run.sh explains it. The cases are the same in each run.
"""

import dataclasses
import json
import math
import os
import random
import re
from html.parser import HTMLParser

import pytest
from transformers import AutoTokenizer

from scripts.score import alignment_text
from tests.test_prepare_data import prepare, rows_of, worker  # noqa: F401 (worker is a fixture)
from tests.test_spoken import POOLS
from tts_grpo.evaluation.protocols import METRICS, count_all, prepare_hypothesis
from tts_grpo.evaluation.report.experiment import Experiment, Sample, Utterance
from tts_grpo.evaluation.report.page import render
from tts_grpo.reward.protocol import OUTPUT_NAMES, AnswerError, RolloutScore, answer_hash, decode_response
from tts_grpo.text.errors import align_texts, locate_errors
from tts_grpo.text.input_files import checked_text
from tts_grpo.text.prompts import COSYVOICE_CHAT_TEMPLATE, render_prompt
from tts_grpo.text.rules import TextRules, model_text, usable_eval_set, usable_text
from tts_grpo.text.tags import control_tokens
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
PIECES = (
    "<|", "|>", "<|im_end|>", "<|s_1|>", "<|endoftext|>", "<|endofprompt|>", "[laughter]", "[", "]", "<b>", "</script>",
    "<script>x</script>", "<!--", "&amp;", '"', "'", "\\", "{{", "}}", "{%", "%}", "%s", "$(", "`", "\t", "\u3000",
    "\u200b", "\u202e", "\ufeff", "\ufffd", "\0", "2024年", "50%", "-5℃", "14:30", "3.14", "1,000", "GPT-4", "10kg",
    "$100", "今天", "天气", "怎么样", "，", "。", "儿", "重慶", "hello", "e\u0301", "👩‍👩‍👧", "+86 138-0013-8000",
)  # fmt: skip
JSON_VALUES = (None, True, False, 0, -1, 2.5, 1e308, float("nan"), [], {}, [1], {"text": "今天"}, "", " ", "好", 10**30)


def random_text(rng: random.Random, most: int = 8) -> str:
    """Return a text of pieces that have caused faults and of characters of all planes, without lone surrogates."""
    pieces = [
        rng.choice(PIECES) if rng.random() < 0.6 else chr(rng.choice(rng.choice(POOLS[:-1])))
        for _ in range(rng.randint(0, most))
    ]
    return "".join(pieces).encode("utf-8", "ignore").decode()


def random_line(rng: random.Random) -> str:
    """Return a line of a file of texts: mostly an object with a text, at times another object or no JSON at all."""
    kind = rng.random()
    if kind < 0.7:
        language = rng.choice(({}, {}, {"language": "zh"}, {"language": "en"}, {"language": "en_GB"}))
        text = rng.choice(("", "", "today ")) + random_text(rng)
        return json.dumps({"text": text} | language, ensure_ascii=rng.random() < 0.5)
    if kind < 0.85:
        return json.dumps({"text": "今天", rng.choice(("text", "language", "x")): rng.choice(JSON_VALUES)})
    line = json.dumps({"text": "今天" + random_text(rng)}, ensure_ascii=False)
    return line[: rng.randrange(len(line))] + rng.choice(("", "}", "\\ud800", "[" * 2000))


@pytest.mark.slow
def test_each_line_is_a_sample_or_is_rejected_with_a_reason(worker, trainer_python, tokenizer, tmp_path):  # noqa: F811
    rng = random.Random(0)
    lines = [line for line in (random_line(rng) for _ in range(EXAMPLES)) if line.strip()]
    validation = ['{"text": "这一句只用来验证"}']
    flags = ("--max-bad-ratio", "1", "--text-tags", "remove", "--llm-text", "spoken")
    done = prepare(worker, tmp_path, lines, validation, *flags)
    assert done.returncode == 0, done.stderr
    rows = rows_of(trainer_python, tmp_path / "out/train.parquet")
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text("utf-8").splitlines()]
    bad = {row["line"]: row["reason"] for row in rejects if row["file"].endswith("train.jsonl")}
    assert len(rows) + len(bad) == len(lines) and all(bad.values())
    assert min(len(rows), len(bad)) > 0.1 * len(lines)
    kept, rules = [line for n, line in enumerate(lines, 1) if n not in bad], TextRules("zh", "remove", "spoken")
    control, languages = set(control_tokens(tokenizer)), set()
    for index, (line, row) in enumerate(zip(kept, rows, strict=True)):
        text, its_rules = row["reward_model"]["ground_truth"], rules.of(json.loads(line))
        assert text == usable_text(checked_text(json.loads(line), "text"), its_rules), ascii(line)
        assert row["extra_info"] == {"split": "train", "index": index, "text": text, "language": its_rules.language}
        (message,) = row["prompt"]
        assert message["content"].endswith(model_text(text, its_rules)), ascii(line)
        languages.add(its_rules.language)
        ids = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        assert not control.intersection(ids), ascii(line)
    assert languages == {"zh", "en"}


def test_a_prompt_contains_its_texts_once_and_no_control_token_more(assets, tokenizer):
    cosyvoice2 = AutoTokenizer.from_pretrained(assets / "llm")
    cosyvoice2.chat_template = COSYVOICE_CHAT_TEMPLATE
    rng, rules, used = random.Random(1), TextRules("zh", "remove"), 0
    templates = [(t, frozenset(control_tokens(t)), render_prompt(t, "X").split("X")) for t in (tokenizer, cosyvoice2)]
    for _ in range(EXAMPLES):
        try:
            texts = [usable_text(checked_text({"text": random_text(rng)}, "text"), rules) for _ in range(2)]
        except ValueError:
            continue
        used += 1
        tokens = [rng.randrange(NUM_SPEECH_TOKENS) for _ in range(rng.randint(1, 5))]
        spoken = "".join(f"<|s_{token}|>" for token in tokens)
        for one, control, (before, after) in templates:
            prompt = render_prompt(one, texts[1], texts[0], tokens)
            assert prompt == before + "".join(texts) + after + spoken, ascii(texts)
            num = [sum(i in control for i in one(text, add_special_tokens=False)["input_ids"])
                   for text in (prompt, before + after + spoken)]  # fmt: skip
            assert num[0] == num[1], ascii(texts)
    assert used > 0.1 * EXAMPLES


def random_utterance(rng: random.Random) -> dict:
    """Return an entry of an evaluation set; about half of them are faultless."""
    utt_id = rng.choice(
        (random_text(rng, 2), f"utt{rng.randrange(10**9)}", rng.choice(JSON_VALUES), "../x", "a/b", ".")
    )
    text = rng.choice((random_text(rng), "今天" + random_text(rng), rng.choice(JSON_VALUES)))
    row = {"id": utt_id, rng.choice(("text", "target_text")): text}
    if rng.random() < 0.4:
        row |= {"prompt_text": rng.choice(("在", random_text(rng))), "prompt_audio": rng.choice(("a.wav", "b.wav", 1))}
    return row


def test_an_evaluation_set_is_usable_or_its_faults_are_named(tmp_path):
    rng, path, usable = random.Random(2), tmp_path / "set.jsonl", 0
    (tmp_path / "a.wav").touch()
    for _ in range(EXAMPLES):
        rows = [random_utterance(rng) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            found = usable_eval_set(path, TextRules("zh", rng.choice(("reject", "remove"))))
        except ValueError as error:
            assert str(path) in str(error)
            continue
        usable += 1
        assert len(found) == len(rows)
        for row in found:
            wav = tmp_path / f"{row['id']}.wav"
            assert wav.parent == tmp_path and wav.name == f"{row['id']}.wav" and not wav.name.startswith("."), ascii(
                row
            )
            assert count_all(row["target_text"], "", "zh")["cer"].rate == 1.0, ascii(row)
    assert usable > 0.05 * EXAMPLES


def random_pairs(seed: int, language: str):
    """Yield usable texts, each with a transcript: the text itself, an edited one, or another text."""
    rng = random.Random(seed)
    for _ in range(EXAMPLES):
        text = ("今天" if language == "zh" else "today ") + random_text(rng)
        try:
            text = checked_text({"text": text}, "text")
            usable_text(text, TextRules(language, "reject"))
        except ValueError:
            continue
        cut = rng.randrange(len(text) + 1)
        edited = text[:cut] + random_text(rng, 2) + text[cut + rng.randint(0, 2) :]
        yield text, rng.choice((text, edited, edited, random_text(rng), ""))


@pytest.mark.parametrize(("language", "of_set"), [("zh", "zh"), ("en", "en"), ("zh", "mixed"), ("en", "mixed")])
def test_every_transcript_has_a_score(language, of_set):
    used, metrics = 0, {name: metric for name, metric in METRICS[of_set].items() if metric.applies(language)}
    for text, transcript in random_pairs(3, language):
        used += 1
        case = ascii((text, transcript))
        hypothesis = prepare_hypothesis(transcript, language)
        scores = count_all(text, hypothesis, language, of_set)
        assert scores.keys() == metrics.keys()
        for name, count in scores.items():
            assert min(vars(count).values()) >= 0 and count.length > 0, (name, case)
            if not metrics[name].match:
                assert count.substitutions + count.deletions <= count.length, (name, case)
            if not hypothesis.strip():
                assert count.rate == 1.0 and count.deletions == count.length, (name, case)
            if transcript == text and name == "spoken":
                assert count.errors == 0, (name, case)
        alignment = align_texts(text, transcript, "toneless", language)
        onsets = [0.2 * i for i in range(len(transcript))]
        errors, starts = locate_errors(alignment, onsets, 0.2 * len(transcript) + 1)
        assert sum(errors) == alignment.errors and len(errors) == len(starts) == alignment.length, case
        lines = alignment_text([{"id": "a", "target_text": text, "hypothesis": hypothesis}], of_set).splitlines()
        assert [line.split()[1] for line in lines] == ["ref", "hyp", "op", "#csid"], case
    assert used > 0.2 * EXAMPLES


class Elements(HTMLParser):
    """Counts the elements of a page, and collects the text outside of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = tag
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.texts.append(data)


def experiment_of(pairs: list[tuple[str, str]], language: str, of_set: str = "") -> Experiment:
    """Return an experiment whose utterances have these texts and transcripts, without audio."""
    name, published = ("pinyin_error_rate_toneless", "cer") if language == "zh" else ("wer", "wer")
    utterances = []
    for i, (text, hypothesis) in enumerate(pairs):
        counts = count_all(text, hypothesis, language)
        sample = Sample(None, hypothesis[:20] or None, hypothesis, counts[name].errors, 1.0, counts[published].errors,
                        counts["spoken"].errors)  # fmt: skip
        better = Sample(None, None, text, 0, 1.0)
        samples = {"sft": {"0": sample}, "grpo": {"0": better if i % 2 else sample}}
        utterances.append(Utterance(f"utt{i}", text, counts[name].length, samples, language=language))
    rates = {name: {"rate": 0.5, "substitutions": 1, "deletions": 1, "insertions": 0, "length": 4}}
    scores = {"pooled": rates, "seeds": {"0": rates}, "asr_dir": "asr", "language": of_set or language}
    summary = {"relative_drop": {name: 0.1}, "relative_drop_ci": {}, "settings": {"text": pairs[0][0]}}
    return Experiment("x", summary, {"sft": scores, "grpo": scores}, {name: name}, name, utterances, ["0"], {})


def test_the_report_aligns_by_the_rules_of_the_language():
    page = render(experiment_of([("He paid $5", "he paid five dollars")], "en"), 1)
    assert '<span class="u same"><b>dollars</b>' in page and '<span class="u other">' not in page
    assert '<span lang="en">He paid $5</span>' in page and "wrong tone" not in page
    mixed = experiment_of([("He paid $5", "he paid five dollars")], "en", "mixed")
    (chinese,) = experiment_of([("他付5元", "他付五元")], "zh").utterances
    mixed.utterances.append(dataclasses.replace(chinese, utt_id="zh"))
    page = render(mixed, 2)
    assert '<span lang="en">He paid $5</span>' in page and '<span lang="zh">他付5元</span>' in page
    assert '<span class="u other">' not in page and "wrong tone" in page


@pytest.mark.slow
@pytest.mark.parametrize("language", ["zh", "en"])
def test_no_text_breaks_the_report(language):
    pairs = [("一会", "一会儿"), ("一会儿", "一会")] if language == "zh" else []  # 儿 is optional
    pairs += [(text, prepare_hypothesis(transcript, language)) for text, transcript in random_pairs(4, language)]
    plain = Elements(render(experiment_of([("今天", "今天")], language), 1))
    for first in range(0, len(pairs), 200):
        page = render(experiment_of(pairs[first : first + 200], language), 200)
        elements = Elements(page)
        for tag in ("script", "style", "html", "body", "iframe", "link"):
            assert elements.tags.count(tag) == plain.tags.count(tag), (tag, first)
        assert page.rstrip().endswith("</html>")
        text = re.sub(r"\s+", " ", " ".join(elements.texts))
        shown = [pair for pair in pairs[first : first + 200] if pair[0].isprintable()]
        missing = [ascii(pair[0]) for pair in shown if " ".join(pair[0].split()) not in text]
        assert not missing, missing[:3]


def random_answer(rng: random.Random):
    """Return a server's answer with a few values replaced, or another JSON value."""
    data = {name: [1.0] if name in ("REWARDS", "ERROR_RATES") else [0] for name in OUTPUT_NAMES}
    data |= {"TRANSCRIPTS": ["好"], "SERVER": ["x"], "ERRORS": [""], "PART_NAMES": ["intelligibility"], "PARTS": [1.0]}
    data["CHECKS"] = [answer_hash([1], "好", RolloutScore(1.0, 1.0, "好", (0.0,), (0,), {"intelligibility": 1.0}))]
    outputs = [{"name": name, "data": values} for name, values in data.items()]
    for _ in range(rng.randint(0, 2)):
        place = rng.randrange(len(outputs))
        wrong = rng.choice((*JSON_VALUES, random_text(rng), [rng.choice(JSON_VALUES)], [random_text(rng)]))
        change = rng.choice(("data", "name", "whole"))
        outputs[place] = wrong if change == "whole" else {**outputs[place], change: wrong} \
            if isinstance(outputs[place], dict) else wrong  # fmt: skip
    return rng.choice(({"outputs": outputs}, {"outputs": outputs}, {"outputs": outputs}, rng.choice(JSON_VALUES),
                       {"outputs": rng.choice(JSON_VALUES)}))  # fmt: skip


def test_an_answer_is_a_score_or_an_error_that_the_client_handles():
    rng, scores = random.Random(5), 0
    for _ in range(EXAMPLES):
        body = random_answer(rng)
        try:
            score = decode_response(body, [1], "好")
        except (AnswerError, KeyError, ValueError):
            continue
        scores += 1
        assert isinstance(score, RolloutScore) and 0 <= score.reward <= 1, ascii(body)
        assert isinstance(score.transcript, str) and isinstance(score.server, str), ascii(body)
        assert all(isinstance(n, int) for n in score.unit_starts), ascii(body)
        assert all(0 <= n < math.inf for n in score.unit_losses), ascii(body)
        assert all(n == -1 or 0 <= n <= 1 for n in score.parts.values()), ascii(body)
    assert scores > 0.05 * EXAMPLES
