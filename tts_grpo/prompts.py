"""Prompts of the language model. The template belongs to the checkpoint: it is the tokenizer's chat template.

Form ``llasa`` (the SFT model of the recipe and the tiny one), for a user message ``INSTRUCTION + text``::

    <|im_start|>user
    Convert the text to speech: TEXT<|im_end|>
    <|im_start|>assistant
    <|SPEECH_GENERATION_START|><|s_N|>...<|SPEECH_GENERATION_END|>

Zero-shot prompting puts the prompt's text before TEXT and its speech tokens at the start of the response.
"""

from tts_grpo.tokens import format_speech_tokens

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
GENERATION_START = "<|SPEECH_GENERATION_START|>"
GENERATION_END = "<|SPEECH_GENERATION_END|>"
INSTRUCTION = "Convert the text to speech: "

# veRL always asks for a generation prompt and passes no prefill, so the template itself ends with the start token.
LLASA_CHAT_TEMPLATE = (
    "{%- for message in messages %}{%- if message['role'] is defined %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<|SPEECH_GENERATION_START|>' }}{%- endif %}"
)


def chat_messages(text: str, prompt_text: str = "") -> list[dict[str, str]]:
    """The messages that ask for ``text``; a zero-shot prompt's text goes before it."""
    return [{"role": "user", "content": INSTRUCTION + prompt_text + text}]


def render_prompt(tokenizer, text: str, prompt_text: str = "", prompt_speech_tokens=()) -> str:
    """The full prompt of one utterance, as text.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        text: what is to be said.
        prompt_text: transcript of the prompt recording, or "".
        prompt_speech_tokens: speech tokens of the prompt recording, or none.

    Raises:
        ValueError: only one of ``prompt_text`` and ``prompt_speech_tokens`` is given, or the tokenizer's template
            does not end its prompt with ``<|SPEECH_GENERATION_START|>``.
    """
    if bool(prompt_text) != bool(len(prompt_speech_tokens)):
        raise ValueError("a zero-shot prompt needs both its text and its speech tokens")
    messages = chat_messages(text, prompt_text)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not prompt.endswith(GENERATION_START):
        raise ValueError(f"the tokenizer's chat template ends with {prompt[-40:]!r}, not with {GENERATION_START}")
    return prompt + format_speech_tokens(prompt_speech_tokens)
