"""Checks of the files in assets/tiny: checksums, size, data splits and error rates."""

import json
import logging
import subprocess

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from tiny_stack.hard_texts import build
from tiny_stack.texts import han_only
from tiny_stack.written import PROMPTS, TEST
from tts_grpo.reward.scorer import RewardScorer
from tts_grpo.text.jsonl import read_jsonl
from tts_grpo.text.rules import TextRules, is_plain, model_text, spoken_text, usable_text
from tts_grpo.text.units import pinyin


def test_checksums(assets):
    run = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=assets, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_size(assets):
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) <= 25e6


def test_splits_do_not_overlap(assets):
    splits = {name: read_jsonl(assets / "data" / f"{name}.jsonl") for name in ("train", "grpo", "dev", "test")}
    texts = {name: [han_only(row["text"]) for row in rows] for name, rows in splits.items()}
    assert len(texts["test"]) >= 300
    for held_out in ("test", "dev"):
        assert not any(held in sentence for held in texts[held_out] for sentence in texts["train"] + texts["grpo"])
    assert len(texts["grpo"]) >= 1000 and not set(texts["grpo"]) & set(texts["train"])
    assert not set(texts["test"]) & set(texts["dev"])
    ids = [row["id"] for name in ("dev", "test") for row in splits[name]]
    assert len(set(ids)) == len(ids)


def test_the_hard_set_is_new_and_can_be_read(assets):
    rules = TextRules(llm_text="spoken")
    rows = read_jsonl(assets / "data/hard.jsonl")
    assert [{key: row[key] for key in ("id", "kind", "text")} for row in rows] == build()
    texts = [han_only(row["text"]) for row in rows]
    assert len(rows) >= 200 and len({row["text"] for row in rows}) == len(rows)
    trained = [han_only(row["text"]) for name in ("train", "grpo") for row in read_jsonl(assets / f"data/{name}.jsonl")]
    assert not any(text in sentence for text in texts for sentence in trained)
    assert not any(len(sentence) >= 6 and sentence in text for text in texts for sentence in trained)
    pieces = SentencePieceProcessor(str(assets / "asr_eval/chn_jpn_yue_eng_ko_spectok.bpe.model"))
    for row in rows:
        assert usable_text(row["text"], rules)
        unknown = [c for c in spoken_text(row["text"], rules) if c != " " and pieces.piece_to_id(c) == pieces.unk_id()]
        assert not unknown, (row["id"], unknown)
    assert max(len(pinyin(row["text"], tones=False)) for row in rows) <= 26


def test_sentences_with_digits_have_the_readings_in_words(assets, token2wav, asr):
    """The prompts are the same, and so is the reward of the same speech."""
    rules, in_words = TextRules(llm_text="spoken"), {written: text for text, written in TEST.items()}
    rows = read_jsonl(assets / "data/test_digits.jsonl")
    assert {row["text"] for row in rows} == set(in_words) and len(rows) == len(in_words)
    assert all(model_text(written, rules) == text for text, written in TEST.items())
    prompts = {row["text"] for row in read_jsonl(assets / "data/grpo.jsonl")}
    assert set(PROMPTS.values()) <= prompts and not set(PROMPTS) & prompts
    assert sum(model_text(written, rules) == text for text, written in PROMPTS.items()) >= 30
    assert all(is_plain(model_text(text, rules).replace("著", "")) for text in prompts)
    scorer = RewardScorer(token2wav, asr, tones=False)
    tokens = [row["speech_tokens"] for row in rows]
    texts = [row["text"] for row in rows]
    written, spoken = scorer.score(tokens, texts), scorer.score(tokens, [in_words[text] for text in texts])
    assert [score.reward for score in written] == [score.reward for score in spoken]
    assert sum(score.reward for score in written) / len(written) > 0.7


def test_corpus_uses_most_tokens(assets):
    counts = json.loads((assets / "token2wav" / "corpus_token_counts.json").read_text())
    assert len(counts) == 6561 and sum(count > 0 for count in counts) >= 5000


def test_recognisers_differ(assets):
    reward_asr, eval_asr = (torch.load(assets / name / "model.pt") for name in ("asr_reward", "asr_eval"))
    assert reward_asr["ctc.ctc_lo.weight"].shape[1] != eval_asr["ctc.ctc_lo.weight"].shape[1]


def test_language_model_is_a_qwen2(lm):
    assert lm.config.model_type == "qwen2"
    assert lm.config.hidden_size // lm.config.num_attention_heads == 64
    assert (lm.generation_config.temperature, lm.generation_config.top_p) == (1.0, 1.0)


@pytest.mark.slow
def test_error_rates(assets):
    """The models are as good as when they were published. Speed is not tested; check.sh prints it."""
    from tiny_stack.check import measure

    logging.disable(logging.INFO)
    metrics = measure(assets)
    assert metrics["teacher_per"] <= 0.03
    assert metrics["resynthesis_per"] <= 0.06
    assert metrics["resynthesis_per"] - metrics["teacher_per"] <= 0.04
    assert metrics["lm_greedy_per"] <= 0.08
    assert metrics["eos_share"] >= 0.98
    assert metrics["reward_asr_teacher_per"] <= 0.05
    assert metrics["duration_ratio"] == pytest.approx(1.0, abs=0.1)
