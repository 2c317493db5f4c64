"""Prompts for the language model. The prompt template is the chat template of the checkpoint's tokenizer.

The form ``llasa`` is for the recipe's SFT model and the tiny model; the user message is ``INSTRUCTION + text``::

    <|im_start|>user
    Convert the text to speech: TEXT<|im_end|>
    <|im_start|>assistant
    <|SPEECH_GENERATION_START|><|s_N|>...<|im_end|>

The tiny model ends its response with ``<|SPEECH_GENERATION_END|>`` instead. The released SFT model has no such token,
and its tokenizer has Qwen2.5's default chat template; recipes that use it pass the template above to each call. veRL
cannot do that, so scripts/prepare_llm.py writes the template into the folder to be trained, and :func:`load_tokenizer`
sets it everywhere else.

The form ``cosyvoice2`` is for the official model, converted by scripts/convert_llm.py; the user message is ``text``::

    <|sos|>TEXT<|task_id|><|s_N|>...<|eos1|>

The form ``cosyvoice3`` has the same template, but the text follows a system prompt, which the model requires and which
may have an instruction, such as a dialect, an emotion or a speed. It is part of the user message::

    <|sos|>You are a helpful assistant.<|endofprompt|>TEXT<|task_id|><|s_N|>...<|eos1|>
    <|sos|>You are a helpful assistant. 请用广东话表达。<|endofprompt|>TEXT<|task_id|><|s_N|>...<|eos1|>

CosyVoice2 takes instructions, too, without the first sentence.

Zero-shot prompting puts the prompt's transcript before TEXT and its speech tokens at the start of the response. In the
data of a training, these speech tokens are a message of the role "speech" (:func:`with_speech_role`), because veRL
renders a prompt from its messages. A prompt with an instruction has neither transcript nor speech tokens, as in
CosyVoice (``frontend_instruct2`` in cosyvoice/cli/frontend.py): the response would continue the recording's manner.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from tts_grpo.text.tags import END_OF_PROMPT
from tts_grpo.text.tokens import format_speech_tokens

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
GENERATION_START = "<|SPEECH_GENERATION_START|>"
GENERATION_END = "<|SPEECH_GENERATION_END|>"  # end token of the tiny model
INSTRUCTION = "Convert the text to speech: "
SOS = "<|sos|>"
TASK_ID = "<|task_id|>"
END_OF_SYSTEM = "<|endofsystem|>"  # only CosyVoice3's tokenizer has it; no prompt does
COSYVOICE3_SYSTEM = "You are a helpful assistant."  # example.py at ace7c47
SPEECH = "speech"

# veRL always asks for a generation prompt and passes no prefill, so the template itself ends with the start token.
LLASA_CHAT_TEMPLATE = (
    "{%- for message in messages %}{%- if message['role'] is defined %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<|SPEECH_GENERATION_START|>' }}{%- endif %}"
)

# The official models' input is sos, text, task id (Qwen2LM.inference in cosyvoice/llm/llm.py).
COSYVOICE_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- '<|sos|>' + message['content'] + '<|task_id|>' }}"
    "{%- elif message['role'] == 'assistant' %}{{- message['content'] }}{%- endif %}"
    "{%- endfor %}"
)

_OTHER_MESSAGES = (
    "{%- set all_messages = messages %}"
    f"{{%- set messages = messages | rejectattr('role', 'equalto', '{SPEECH}') | list %}}"
)
_SPEECH_MESSAGES = (
    f"{{%- for message in all_messages %}}{{%- if message['role'] == '{SPEECH}' %}}{{{{- message['content'] }}}}"
    "{%- endif %}{%- endfor %}"
)

_CHATML = re.compile(
    r"(<\|im_start\|>system\n[^|]*<\|im_end\|>\n)?<\|im_start\|>user\nX<\|im_end\|>\n?(<\|im_start\|>assistant\n)?"
)


def speech_template(tokenizer) -> str:
    """Return a chat template that renders this tokenizer's prompts in one of the forms.

    The tokenizer's own template is kept if its prompts end with the token that starts speech. Otherwise the vocabulary
    must contain ``<|SPEECH_GENERATION_START|>``, and the template must be missing, ChatML (Qwen2.5's default, with its
    system prompt, or icefall's, with which the SFT model was trained) or the one that the original recipe passes at
    inference (mair-hub, rl-tutorial/cosyvoice_llm/infer.py). In these cases the form is ``llasa``.

    Args:
        tokenizer: Hugging Face tokenizer.

    Raises:
        ValueError: the template is none of these, or the vocabulary has no token that starts speech.
    """
    user, assistant = {"role": "user", "content": "X"}, {"role": "assistant", "content": ""}
    if tokenizer.chat_template is not None:
        own = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        if own.endswith(GENERATION_START) or (own.startswith(SOS) and own.endswith(TASK_ID)):
            return tokenizer.chat_template
    if GENERATION_START not in tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer has neither {GENERATION_START} nor a template of the form {SOS}TEXT{TASK_ID}: it is not "
            "a language model with CosyVoice's speech tokens"
        )
    if tokenizer.chat_template is None or _CHATML.fullmatch(own):
        return LLASA_CHAT_TEMPLATE
    answered = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    if answered == f"<|im_start|>user\n{INSTRUCTION}X<|im_end|>\n<|im_start|>assistant\n{GENERATION_START}":
        return LLASA_CHAT_TEMPLATE
    raise ValueError(
        f"the tokenizer's chat template renders {own[:20]!r}...{own[-40:]!r}: it must end with {GENERATION_START}, or "
        f"begin with {SOS} and end with {TASK_ID}, or be ChatML"
    )


def load_tokenizer(folder: str | Path):
    """Load the tokenizer of a language model, with a chat template that :func:`render_prompt` can use.

    Raises:
        ValueError: as :func:`speech_template`; the message names the folder.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        tokenizer.chat_template = speech_template(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return tokenizer


def _ending(tokenizer) -> str:
    """Return the token that ends a prompt in the tokenizer's template; it identifies the form."""
    return TASK_ID if TASK_ID in (tokenizer.chat_template or "") else GENERATION_START


def form_of(tokenizer) -> str:
    """The form of the tokenizer's prompts: ``llasa``, ``cosyvoice2`` or ``cosyvoice3``."""
    if _ending(tokenizer) == GENERATION_START:
        return "llasa"
    known = tokenizer.convert_tokens_to_ids(END_OF_SYSTEM) not in (None, tokenizer.unk_token_id)
    return "cosyvoice3" if known else "cosyvoice2"


def before_text(tokenizer, instruct: str = "") -> str:
    """Return what precedes the text in the user message of the tokenizer's form.

    Args:
        tokenizer: Hugging Face tokenizer.
        instruct: how to speak, such as "请用广东话表达。", or "".

    Raises:
        ValueError: there is an instruction, and the language model takes none.
    """
    form = form_of(tokenizer)
    if form == "llasa":
        if instruct:
            raise ValueError("this language model takes no instructions: remove the key instruct (or use CosyVoice3)")
        return INSTRUCTION
    system = [COSYVOICE3_SYSTEM] if form == "cosyvoice3" else []
    parts = [*system, *([instruct] if instruct else [])]
    return f"{' '.join(parts)}{END_OF_PROMPT}" if parts else ""


def chat_messages(
    tokenizer, text: str, prompt_text: str = "", speech: Sequence[int] = (), instruct: str = ""
) -> list[dict[str, str]]:
    """Return the chat messages that ask for ``text``, after ``prompt_text``, in the tokenizer's form.

    ``speech`` has speech tokens that the response continues; a template needs :func:`with_speech_role` for them.
    ``instruct`` says how to speak (:func:`before_text`).
    """
    messages = [{"role": "user", "content": before_text(tokenizer, instruct) + prompt_text + text}]
    return messages + ([{"role": SPEECH, "content": format_speech_tokens(speech)}] if len(speech) else [])


def with_speech_role(template: str) -> str:
    """Return a chat template that also renders messages of the role "speech": their content ends the prompt."""
    return template if _SPEECH_MESSAGES in template else _OTHER_MESSAGES + template + _SPEECH_MESSAGES


def choose(items: Sequence, key: str, seed: int = 0):
    """Return the item that is determined by ``key`` and ``seed``; None if there are no items."""
    if not items:
        return None
    return items[int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big") % len(items)]


def render_prompt(
    tokenizer, text: str, prompt_text: str = "", prompt_speech_tokens: Sequence[int] = (), instruct: str = ""
) -> str:
    """Render the full prompt of one utterance as text.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        text: text to synthesise.
        prompt_text: transcript of the prompt recording, or "".
        prompt_speech_tokens: speech tokens of the prompt recording, or none.
        instruct: how to speak, or ""; the prompt recording is then left out.

    Raises:
        ValueError: only one of ``prompt_text`` and ``prompt_speech_tokens`` is given, the tokenizer's template renders
            no known form, or the language model takes no instructions.
    """
    if bool(prompt_text) != bool(len(prompt_speech_tokens)):
        raise ValueError("a zero-shot prompt needs both its text and its speech tokens")
    if instruct:
        prompt_text, prompt_speech_tokens = "", ()
    messages, ending = chat_messages(tokenizer, text, prompt_text, instruct=instruct), _ending(tokenizer)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not prompt.endswith(ending) or (ending == TASK_ID and not prompt.startswith(SOS)):
        raise ValueError(
            f"the tokenizer's chat template renders {prompt[:20]!r}...{prompt[-40:]!r}: it must end with "
            f"{GENERATION_START}, or begin with {SOS} and end with {TASK_ID} (load_tokenizer sets one that does)"
        )
    return prompt + format_speech_tokens(prompt_speech_tokens)
