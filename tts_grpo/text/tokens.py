"""Conversion between speech token ids in ``[0, 6561)`` and their text form in the language model, ``<|s_N|>``."""

import re

NUM_SPEECH_TOKENS = 6561  # size of CosyVoice2's codebook: finite scalar quantisation with 8 dimensions of 3 levels
TOKEN_HZ = 25

_SPEECH_TOKEN = re.compile(r"<\|s_(\d+)\|>")


def speech_token_str(token: int) -> str:
    """Return the text form of one id.

    Raises:
        ValueError: the id is not in ``[0, 6561)``.
    """
    if not 0 <= token < NUM_SPEECH_TOKENS:
        raise ValueError(f"speech token {token} is not in [0, {NUM_SPEECH_TOKENS})")
    return f"<|s_{token}|>"


def first_speech_id(tokenizer) -> int:
    """Return the vocabulary id of speech token 0; those of the other speech tokens follow.

    Raises:
        ValueError: the vocabulary lacks a speech token, or their ids are not consecutive.
    """
    ids = tokenizer.convert_tokens_to_ids([speech_token_str(i) for i in range(NUM_SPEECH_TOKENS)])
    if ids[0] in (None, tokenizer.unk_token_id) or ids != list(range(ids[0], ids[0] + NUM_SPEECH_TOKENS)):
        names = f"{speech_token_str(0)} to {speech_token_str(NUM_SPEECH_TOKENS - 1)}"
        raise ValueError(f"the ids of {names} are not consecutive, or the tokens are not in the vocabulary")
    return ids[0]


def format_speech_tokens(tokens) -> str:
    """Return the text form of a sequence of ids, as in a prompt or a response."""
    return "".join(speech_token_str(int(token)) for token in tokens)


def parse_speech_tokens(text: str) -> list[int]:
    """Return all ids in ``text``, in order; other text is skipped.

    Raises:
        ValueError: an id is not in ``[0, 6561)``.
    """
    tokens = [int(number) for number in _SPEECH_TOKEN.findall(text)]
    for token in tokens:
        if token >= NUM_SPEECH_TOKENS:
            raise ValueError(f"speech token {token} is not in [0, {NUM_SPEECH_TOKENS})")
    return tokens
