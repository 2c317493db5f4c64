"""Fixtures: the tiny stack of the repository, loaded once."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    return ROOT / "assets" / "tiny"


@pytest.fixture(scope="session")
def token2wav(assets):
    from tts_grpo.token2wav import load_token2wav

    return load_token2wav(assets / "token2wav")


@pytest.fixture(scope="session")
def asr(assets):
    from tts_grpo.asr import SenseVoice

    return SenseVoice(assets / "asr_reward")


@pytest.fixture(scope="session")
def tokenizer(assets):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "llm")


@pytest.fixture(scope="session")
def lm(assets):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets / "llm", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def test_rows(assets) -> list[dict]:
    from scripts.tiny.stack import read_jsonl

    return read_jsonl(assets / "data" / "test.jsonl")
