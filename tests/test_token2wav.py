import numpy as np
import pytest
import torch

from tts_grpo.speech.audio import load_audio
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.speech.tiny.codec import FiniteScalarQuantiser, LogMel
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.speech.voices import choose_voice, load_prompt_voice, load_prompt_voices

pytestmark = pytest.mark.slow

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
    calls = {}

    def spy(speech_tokens, voices, seed):
        calls.update({tuple(tokens): (voice, seed) for tokens, voice in zip(speech_tokens, voices, strict=True)})
        return token2wav(speech_tokens, voices, seed)

    sequences = [*random_sequences(5), []]
    voices = [PromptVoice(name, np.zeros(1, np.float32), ()) for name in "ab"]
    given = [voices[0], voices[1], None, voices[0], None, None]
    waveforms = decode(spy, sequences, given, seed=3, batch_size=2)
    for sequence, waveform in zip(sequences[:5], waveforms, strict=False):
        alone, _ = token2wav([sequence])
        assert np.abs(alone[0].numpy() - waveform).max() < TOLERANCE
    assert len(waveforms[5]) == 0
    assert [calls[tuple(sequence)] for sequence in sequences[:5]] == [(voice, 3) for voice in given[:5]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu(token2wav, assets):
    sequences = random_sequences()
    on_gpu, _ = load_token2wav(assets / "token2wav", "cuda")(sequences)
    assert (on_gpu - token2wav(sequences)[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("sequences", "message"), [([[1], []], "item 1"), ([[1], [2], [6561]], "item 2"), ([[-1]], "item 0")]
)
def test_errors_name_the_item_with_invalid_tokens(token2wav, sequences, message):
    with pytest.raises(ValueError, match=message):
        token2wav(sequences)


def test_encoding_does_not_depend_on_the_batch(token2wav, assets):
    recordings = [load_audio(path) for path in sorted((assets / "recordings").glob("*.ogg"))[:6]]
    together = token2wav.encode(recordings)
    assert [len(tokens) for tokens in together] == [-(-len(r) // 640) for r in recordings]
    same = sum(
        a == b for r, tokens in zip(recordings, together) for a, b in zip(token2wav.encode([r])[0], tokens, strict=True)
    )
    assert same >= 0.995 * sum(map(len, together))  # values near a rounding threshold may differ


def test_tokens_in_assets_match_the_tokenizer(token2wav, assets, test_rows):
    """The tokens were made from lossless recordings, so they do not match exactly. The chance level is 1/3."""
    rows = [row for row in test_rows if (assets / "recordings" / f"{row['id']}.ogg").exists()][:20]
    encoded = token2wav.encode([load_audio(assets / "recordings" / f"{row['id']}.ogg") for row in rows])
    for row, tokens in zip(rows, encoded, strict=True):
        actual, expected = (FiniteScalarQuantiser.to_digits(torch.tensor(t)) for t in (tokens, row["speech_tokens"]))
        assert (actual == expected).float().mean() > 0.8, row["id"]


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
    from tts_grpo.text.jsonl import read_jsonl

    rows = read_jsonl(assets / "prompts" / "prompts.jsonl")
    assert len(rows) == 3
    for row in rows:
        voice = load_prompt_voice(token2wav, assets / "prompts" / row["prompt_audio"], row["prompt_text"])
        assert 2.5 <= len(voice.prompt_speech_16k) / 16000 <= 4.0
        assert len(voice.prompt_speech_tokens) == -(-len(voice.prompt_speech_16k) // 640)


def test_unknown_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no token2wav model found"):
        load_token2wav(tmp_path)


def test_list_of_prompt_voices(token2wav, assets, tmp_path):
    voices = load_prompt_voices(token2wav, assets / "prompts" / "prompts.jsonl")
    assert len(voices) == 3
    texts = [f"text {i}" for i in range(60)]
    chosen = [choose_voice(voices, text, seed=1) for text in texts]
    assert {id(voice) for voice in chosen} == {id(voice) for voice in voices}
    assert all(choose_voice(voices, text, seed=1) is voice for text, voice in zip(texts, chosen, strict=True))
    assert any(choose_voice(voices, text, seed=2) is not voice for text, voice in zip(texts, chosen, strict=True))
    assert choose_voice([], "text") is None
    (tmp_path / "list.jsonl").write_text('{"prompt_audio": "a.wav"}\n')
    with pytest.raises(ValueError, match="line 1: a prompt needs both prompt_text and prompt_audio"):
        load_prompt_voices(token2wav, tmp_path / "list.jsonl")


def test_the_tiny_decoder_supports_fp32_only(assets):
    with pytest.raises(ValueError, match="use fp32"):
        load_token2wav(assets / "token2wav", precision="fp16")


def test_non_finite_speech_is_an_error():
    class Decoder:
        def exact(self):
            return self

        def __call__(self, speech_tokens, voices, seed):
            return torch.full((len(speech_tokens), 640), torch.nan), torch.tensor([640] * len(speech_tokens))

    with pytest.raises(ValueError, match="not finite"):
        decode(Decoder(), [[1]])
