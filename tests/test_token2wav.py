import numpy as np
import pytest
import torch

from tts_grpo.audio import load_audio
from tts_grpo.tiny_codec import FiniteScalarQuantiser, LogMel
from tts_grpo.token2wav import PromptVoice, decode, load_prompt_voice, load_token2wav

TOLERANCE = 1e-4


def random_sequences(count=9, longest=90):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 6561, rng.integers(1, longest)).tolist() for _ in range(count)]


def test_a_waveform_does_not_depend_on_its_batch(token2wav):
    sequences = random_sequences()
    waveforms, lens = token2wav(sequences)
    assert lens.tolist() == [640 * len(s) for s in sequences]
    assert waveforms.abs().max() > 0.01
    for sequence, waveform, length in zip(sequences, waveforms, lens, strict=True):
        alone, _ = token2wav([sequence])
        assert (alone[0] - waveform[:length]).abs().max() < TOLERANCE
        assert waveform[length:].abs().sum() == 0


def test_decode_keeps_order_and_voices(token2wav):
    calls = []

    def spy(speech_tokens, voice, seed):
        calls.append((sorted(map(len, speech_tokens)), voice, seed))
        return token2wav(speech_tokens, voice, seed)

    sequences = [*random_sequences(5), []]
    voices = [PromptVoice(name, np.zeros(1, np.float32), ()) for name in "ab"]
    waveforms = decode(spy, sequences, [voices[0], voices[1], None, voices[0], None, None], seed=3)
    for sequence, waveform in zip(sequences[:5], waveforms, strict=False):
        alone, _ = token2wav([sequence])
        assert np.abs(alone[0].numpy() - waveform).max() < TOLERANCE
    assert len(waveforms[5]) == 0
    by_voice = {id(voice): lens for lens, voice, _ in calls}
    assert by_voice == {
        id(voices[0]): sorted(len(sequences[i]) for i in (0, 3)), id(voices[1]): [len(sequences[1])],
        id(None): sorted(len(sequences[i]) for i in (2, 4)),
    }  # fmt: skip
    assert all(seed == 3 for *_, seed in calls)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu(token2wav, assets):
    sequences = random_sequences()
    on_gpu, _ = load_token2wav(assets / "token2wav", "cuda")(sequences)
    assert (on_gpu - token2wav(sequences)[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("sequences", "message"), [([[1], []], "item 1"), ([[1], [2], [6561]], "item 2"), ([[-1]], "item 0")]
)
def test_bad_tokens_are_named(token2wav, sequences, message):
    with pytest.raises(ValueError, match=message):
        token2wav(sequences)


def test_encoding_does_not_depend_on_the_batch(token2wav, assets):
    recordings = [load_audio(path) for path in sorted((assets / "recordings").glob("*.ogg"))[:6]]
    together = token2wav.encode(recordings)
    assert [len(tokens) for tokens in together] == [-(-len(r) // 640) for r in recordings]
    same = sum(
        a == b for r, tokens in zip(recordings, together) for a, b in zip(token2wav.encode([r])[0], tokens, strict=True)
    )
    assert same >= 0.995 * sum(map(len, together))  # a value next to a rounding threshold may go either way


def test_shipped_tokens_are_what_the_tokenizer_says(token2wav, assets, test_rows):
    """Up to the loss of the shipped recordings: the tokens were made from lossless ones. Chance is a third."""
    rows = [row for row in test_rows if (assets / "recordings" / f"{row['id']}.ogg").exists()][:20]
    encoded = token2wav.encode([load_audio(assets / "recordings" / f"{row['id']}.ogg") for row in rows])
    for row, tokens in zip(rows, encoded, strict=True):
        ours, shipped = (FiniteScalarQuantiser.to_digits(torch.tensor(t)) for t in (tokens, row["speech_tokens"]))
        assert (ours == shipped).float().mean() > 0.8, row["id"]


def test_resynthesis_sounds_like_the_recording(token2wav, assets):
    mel = LogMel()
    path = sorted((assets / "recordings").glob("*.ogg"))[0]
    speech = load_audio(path)
    waveform = token2wav(token2wav.encode([speech]))[0][0, : len(speech)]
    distance = (mel(waveform[None]) - mel(torch.tensor(speech)[None])).abs().mean()
    shuffled = token2wav([sorted(token2wav.encode([speech])[0])])[0][0, : len(speech)]
    assert distance < 0.5 * (mel(shuffled[None]) - mel(torch.tensor(speech)[None])).abs().mean()


def test_digits_round_trip():
    tokens = torch.arange(6561)
    assert torch.equal(FiniteScalarQuantiser.to_tokens(FiniteScalarQuantiser.to_digits(tokens)), tokens)


def test_prompt_voices(token2wav, assets):
    from tts_grpo.jsonl import read_jsonl

    rows = read_jsonl(assets / "prompts" / "prompts.jsonl")
    assert len(rows) == 3
    for row in rows:
        voice = load_prompt_voice(token2wav, assets / "prompts" / row["prompt_audio"], row["prompt_text"])
        assert 2.5 <= len(voice.prompt_speech_16k) / 16000 <= 4.0
        assert len(voice.prompt_speech_tokens) == -(-len(voice.prompt_speech_16k) // 640)


def test_unknown_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no token2wav here"):
        load_token2wav(tmp_path)
