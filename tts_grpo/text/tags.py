"""Marks in texts that are no words: control tokens of language models, and tags of this and other programs.

They must neither be spoken nor change the prompt: in a prompt, ``<|im_end|>`` written in a text is the control token.
What counts as one, in letters of full or half width:

- ``<|...|>``: control tokens, speech tokens, SenseVoice's marks of languages and feelings;
- ``<strong>``, ``</laughter>``, ``<break time="1s"/>``: CosyVoice's marks, HTML and SSML;
- ``[laughter]``, ``[uv_break]``, ``[S1]``, ``[ǐ]``: marks of CosyVoice, ChatTTS and others: Latin letters in brackets.

What stands before ``<|endofprompt|>`` is CosyVoice's instruction ("in Sichuanese") and not to be spoken: it is a part
of that mark.
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
    """The marks in a text, in order."""
    return _TAG.findall(text)


def remove_tags(text: str) -> str:
    """``text`` without marks, and without an instruction; a mark between two Latin words leaves a space.

    What is left has none: removing one may make another of what stood around it, which is removed, too.
    """
    while _TAG.search(text):
        text = _TAG.sub(_space, _INSTRUCTION.sub("", text))
    return text.strip()


def _space(tag: re.Match) -> str:
    before, after = tag.string[: tag.start()][-1:], tag.string[tag.end() :][:1]
    return " " if before.isascii() and before.isalnum() and after.isascii() and after.isalnum() else ""


def apply_tags(text: str, what: str) -> str:
    """``text`` as it may be spoken.

    Args:
        text: any text.
        what: "remove" takes marks out, "reject" lets no text with marks pass.

    Raises:
        ValueError: marks are rejected and the text has some; they are named.
    """
    tags = find_tags(text)
    if not tags:
        return text
    if what == "reject":
        shown = ", ".join(dict.fromkeys(tags))
        raise ValueError(f"holds {shown[:80]}, which is no word: take it out (text_tags=remove does so)")
    return remove_tags(text)


def control_tokens(tokenizer) -> dict[int, str]:
    """Tokens that control a language model, by id: those that its tokenizer calls special, and ``<|...|>``."""
    added = tokenizer.added_tokens_decoder
    return {i: str(token) for i, token in added.items() if token.special or _TAG.fullmatch(str(token))}


def holding_control_tokens(tokenizer, texts: Iterable[str]) -> list[str]:
    """For each text the control token that its tokens hold, or ""; the texts are those inside of a prompt."""
    texts, control = list(texts), control_tokens(tokenizer)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [next((control[i] for i in text_ids if i in control), "") for text_ids in ids]
