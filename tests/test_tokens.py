import pytest

from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, format_speech_tokens, parse_speech_tokens


def test_round_trip():
    tokens = [0, 6560, 17, 17]
    assert format_speech_tokens(tokens) == "<|s_0|><|s_6560|><|s_17|><|s_17|>"
    assert parse_speech_tokens(format_speech_tokens(tokens)) == tokens


def test_other_text_is_ignored():
    assert parse_speech_tokens("好<|s_5|> <|s_|><|s_x|><|im_end|><|s_6|>") == [5, 6]
    assert parse_speech_tokens("") == []


@pytest.mark.parametrize("token", [-1, NUM_SPEECH_TOKENS])
def test_id_out_of_range_is_an_error(token):
    with pytest.raises(ValueError, match=str(token)):
        format_speech_tokens([1, token])


def test_parsed_id_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="6561"):
        parse_speech_tokens("<|s_1|><|s_6561|>")
