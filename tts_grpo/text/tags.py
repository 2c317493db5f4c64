"""Tags in texts: control tokens of language models, and markup of CosyVoice and other programs.

Tags must not be synthesised and must not change the prompt: ``<|im_end|>`` in a text would become the control token.
The following count as tags, in full or half width:

- ``<|...|>``: control tokens, speech tokens, and SenseVoice's tags for language and emotion;
- ``<strong>``, ``</laughter>``, ``<break time="1s"/>``: markup of CosyVoice, HTML and SSML;
- ``[laughter]``, ``[uv_break]``, ``[S1]``, ``[ǐ]``: Latin letters in brackets, as CosyVoice, ChatTTS and others use.

The text before ``<|endofprompt|>`` is an instruction to CosyVoice ("in Sichuanese") that is not synthesised, so it is
removed with that tag.
"""

import re
from collections.abc import Iterable

END_OF_PROMPT = "<|endofprompt|>"
_LESS, _GREATER, _BAR, _OPEN, _CLOSE = "<＜﹤", ">＞﹥", "|｜", r"\[［", r"\]］"
_LETTERS = "A-Za-zÀ-ɏＡ-Ｚａ-ｚ"
_TAG = re.compile(
    rf"[{_LESS}][{_BAR}][^{_LESS}{_GREATER}{_BAR}]{{0,80}}[{_BAR}][{_GREATER}]"
    rf"|[{_LESS}][/／!?]?[{_LETTERS}-][^{_LESS}{_GREATER}]{{0,200}}[{_GREATER}]"
    rf"|[{_OPEN}][/／]?[{_LETTERS}][^{_OPEN}{_CLOSE}㐀-䶿一-鿿]{{0,40}}[{_CLOSE}]"
)
_INSTRUCTION = re.compile(rf".*[{_LESS}][{_BAR}]endofprompt[{_BAR}][{_GREATER}]", re.DOTALL)


def find_tags(text: str) -> list[str]:
    """Return the tags in a text, in order."""
    return _TAG.findall(text)


def remove_tags(text: str) -> str:
    """Remove tags and an instruction from ``text``; a tag between two Latin words is replaced by a space.

    Removing a tag may join the text around it into another tag, so this repeats until there is none.
    """
    while _TAG.search(text):
        text = _TAG.sub(_space, _INSTRUCTION.sub("", text))
    return text.strip()


def _space(tag: re.Match) -> str:
    before, after = tag.string[: tag.start()][-1:], tag.string[tag.end() :][:1]
    return " " if before.isascii() and before.isalnum() and after.isascii() and after.isalnum() else ""


def apply_tags(text: str, what: str) -> str:
    """Remove or reject the tags in a text.

    Args:
        text: any text.
        what: "remove" removes tags, "reject" raises an error if there are any.

    Raises:
        ValueError: tags are rejected and the text has some; the message lists them.
    """
    tags = find_tags(text)
    if not tags:
        return text
    if what == "reject":
        shown = ", ".join(dict.fromkeys(tags))
        raise ValueError(f"contains {shown[:80]}, which is a tag, not a word: remove it (or set text_tags=remove)")
    return remove_tags(text)


def control_tokens(tokenizer) -> dict[int, str]:
    """Return ``id -> token`` for a tokenizer's control tokens: its special tokens, and added tokens that are tags."""
    added = tokenizer.added_tokens_decoder
    return {i: str(token) for i, token in added.items() if token.special or _TAG.fullmatch(str(token))}


def find_control_tokens(tokenizer, texts: Iterable[str]) -> list[str]:
    """Return for each text, as inserted into a prompt, the first control token among its tokens, or ""."""
    texts, control = list(texts), control_tokens(tokenizer)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [next((control[i] for i in text_ids if i in control), "") for text_ids in ids]
