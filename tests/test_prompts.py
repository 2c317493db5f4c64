import pytest
from transformers import AutoTokenizer

from tts_grpo.text.prompts import COSYVOICE_CHAT_TEMPLATE, END_OF_SYSTEM, chat_messages, render_prompt
from tts_grpo.text.tokens import speech_token_str

EXPECTED = (
    "<|im_start|>user\nConvert the text to speech: 你好。<|im_end|>\n<|im_start|>assistant\n<|SPEECH_GENERATION_START|>"
)


def test_prompt(tokenizer):
    assert render_prompt(tokenizer, "你好。") == EXPECTED


def test_zero_shot_prompt(tokenizer):
    prompt = render_prompt(tokenizer, "你好。", "早。", [7, 8])
    assert prompt == EXPECTED.replace("你好", "早。你好") + "<|s_7|><|s_8|>"


@pytest.mark.parametrize("prompt", [("早。", ()), ("", (1,))])
def test_half_a_zero_shot_prompt_is_an_error(tokenizer, prompt):
    with pytest.raises(ValueError, match="both"):
        render_prompt(tokenizer, "你好。", *prompt)


def test_foreign_template_is_an_error(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "llm")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="SPEECH_GENERATION_START"):
        render_prompt(tokenizer, "你好。")


@pytest.fixture
def cosyvoice2_tokenizer(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "llm")
    tokenizer.chat_template = COSYVOICE_CHAT_TEMPLATE
    return tokenizer


def test_cosyvoice2_prompt(cosyvoice2_tokenizer):
    assert render_prompt(cosyvoice2_tokenizer, "你好。") == "<|sos|>你好。<|task_id|>"
    prompt = render_prompt(cosyvoice2_tokenizer, "你好。", "早。", [7, 8])
    assert prompt == "<|sos|>早。你好。<|task_id|><|s_7|><|s_8|>"


@pytest.mark.parametrize("flag", [True, False])
def test_cosyvoice2_template_accepts_verls_arguments(cosyvoice2_tokenizer, flag):
    render = lambda messages: cosyvoice2_tokenizer.apply_chat_template(  # noqa: E731
        messages, tokenize=False, add_generation_prompt=flag
    )
    assert render([{}]) == ""
    assert render(chat_messages(cosyvoice2_tokenizer, "你好。")) == "<|sos|>你好。<|task_id|>"


def test_half_a_cosyvoice2_template_is_an_error(cosyvoice2_tokenizer):
    cosyvoice2_tokenizer.chat_template = "{{ messages[0]['content'] }}<|task_id|>"
    with pytest.raises(ValueError, match="sos"):
        render_prompt(cosyvoice2_tokenizer, "你好。")


def test_nothing_is_unknown(tokenizer):
    text = "你好 Hello 123 \n饕餮 é 😀 ＡＢ"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_ids(tokenizer, lm):
    assert len(tokenizer("\n", add_special_tokens=False)["input_ids"]) == 1
    speech = tokenizer.convert_tokens_to_ids([speech_token_str(i) for i in range(6561)])
    assert speech == list(range(speech[0], speech[0] + 6561))
    assert max(speech) < lm.config.vocab_size
    assert tokenizer.decode([*speech[:2], tokenizer.eos_token_id], skip_special_tokens=True) == "<|s_0|><|s_1|>"
    ends = tokenizer.convert_tokens_to_ids(["<|SPEECH_GENERATION_END|>", "<|im_end|>"])
    assert lm.generation_config.eos_token_id == ends
    assert tokenizer.eos_token_id == ends[0] == lm.config.eos_token_id


def test_template_accepts_verls_arguments(tokenizer):
    # veRL renders an empty message to find a template's system prompt.
    assert tokenizer.apply_chat_template([{}], tokenize=False, add_generation_prompt=False) == ""
    whole = tokenizer.apply_chat_template(
        chat_messages(tokenizer, "你好。"), tokenize=False, add_generation_prompt=True
    )
    assert whole == EXPECTED


@pytest.fixture
def cosyvoice3_tokenizer(cosyvoice2_tokenizer):
    cosyvoice2_tokenizer.add_tokens([END_OF_SYSTEM])
    return cosyvoice2_tokenizer


def test_cosyvoice3_prompt(cosyvoice3_tokenizer):
    before = "<|sos|>You are a helpful assistant.<|endofprompt|>"
    assert render_prompt(cosyvoice3_tokenizer, "你好。") == f"{before}你好。<|task_id|>"
    prompt = render_prompt(cosyvoice3_tokenizer, "你好。", "早。", [7, 8])
    assert prompt == f"{before}早。你好。<|task_id|><|s_7|><|s_8|>"


def test_instructions(cosyvoice2_tokenizer, tokenizer):
    rendered = render_prompt(cosyvoice2_tokenizer, "你好。", instruct="用四川话说这句话")
    assert rendered == "<|sos|>用四川话说这句话<|endofprompt|>你好。<|task_id|>"
    cosyvoice2_tokenizer.add_tokens([END_OF_SYSTEM])  # CosyVoice3
    rendered = render_prompt(cosyvoice2_tokenizer, "你好。", "早。", [7], instruct="请用广东话表达。")
    expected = "<|sos|>You are a helpful assistant. 请用广东话表达。<|endofprompt|>你好。<|task_id|>"
    assert rendered == expected  # without the recording
    with pytest.raises(ValueError, match="takes no instructions"):
        render_prompt(tokenizer, "你好。", instruct="请用广东话表达。")
