"""Compares CosyVoice2's token2wav on batches with the official code on single utterances."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tts_grpo.speech.audio import save_audio
from tts_grpo.speech.cosyvoice2 import packed_flow
from tts_grpo.speech.cosyvoice2 import token2wav as cosyvoice2
from tts_grpo.speech.cosyvoice2.random_weights import FULL, SMALL, make_cosyvoice2_folder
from tts_grpo.speech.cosyvoice2.token2wav import CosyVoice2Token2Wav, load_modules
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.speech.voices import load_prompt_voice

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tts_grpo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_cosyvoice2_folder(tmp_path_factory.mktemp("cosyvoice2"))


@pytest.fixture(scope="module")
def voice():
    time = np.arange(24_000) / 16_000
    speech = 0.3 * np.sin(2 * np.pi * 180 * time) + 0.05 * np.random.default_rng(1).standard_normal(24_000)
    return PromptVoice("你好", speech.astype(np.float32), ())


def random_tokens(lens):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 6561, n).tolist() for n in lens]


def official(token2wav, folder, tokens, voice, seed):
    """Mel and waveform by CosyVoice's own inference, with the noise that token2wav uses."""
    modules = load_modules(folder)
    flow, hift = modules["flow"].eval(), modules["hift"].eval()
    flow.load_state_dict(torch.load(folder / "flow.pt"))
    hift.load_state_dict({k.removeprefix("generator."): v for k, v in torch.load(folder / "hift.pt").items()})
    prompt = {k: torch.as_tensor(v).cpu()[None] for k, v in token2wav.prompt_features(voice).items()}
    length = lambda value: torch.tensor([value.shape[1]])  # noqa: E731
    row = torch.tensor([tokens])
    mel, _ = flow.inference(
        row, length(row), prompt["tokens"], length(prompt["tokens"]), prompt["mel"], length(prompt["mel"]),
        prompt["speaker_embedding"], streaming=False, finalize=True,
    )  # fmt: skip
    with token2wav.vocoder.fixed_noise(seed, 480 * mel.shape[2]):
        return mel[0], hift.inference(speech_feat=mel)[0][0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_equals_the_official_code_one_by_one(folder, voice, device):
    token2wav = load_token2wav(folder, device)
    assert isinstance(token2wav, CosyVoice2Token2Wav)
    sequences = random_tokens([1, 7, 40, 23, 40])
    waveforms, lens = token2wav(sequences, [voice] * 5, seed=5)
    assert lens.tolist() == [960 * len(tokens) for tokens in sequences]
    for tokens, waveform, length in zip(sequences, waveforms, lens, strict=True):
        _, expected = official(token2wav, folder, tokens, voice, seed=5)
        assert expected.abs().max() > 1e-3 and len(expected) == length
        torch.testing.assert_close(waveform[:length].cpu(), expected, rtol=0, atol=TOLERANCE)
        assert waveform[length:].abs().sum() == 0


@pytest.mark.skipif("FULL_SHAPE" not in os.environ, reason="minutes: set FULL_SHAPE=1")
def test_a_batch_equals_the_official_code_at_full_shape(tmp_path, voice):
    folder = make_cosyvoice2_folder(tmp_path, FULL)
    token2wav = load_token2wav(folder)
    sequences = random_tokens([50, 75, 120])
    waveforms, lens = token2wav(sequences, [voice] * 3)
    for tokens, waveform, length in zip(sequences, waveforms, lens, strict=True):
        _, expected = official(token2wav, folder, tokens, voice, seed=0)
        torch.testing.assert_close(waveform[:length].cpu(), expected, rtol=0, atol=TOLERANCE)


def test_masks_are_necessary(folder, voice):
    """Without the hooks that mask the padding, results differ."""
    token2wav = load_token2wav(folder)
    sequences = random_tokens([20, 40])
    expected = token2wav(sequences, [voice] * 2)[0][0, :19200]
    token2wav.flow.module.encoder.pre_lookahead_layer._forward_pre_hooks.clear()
    assert (token2wav(sequences, [voice] * 2)[0][0, :19200] - expected).abs().max() > TOLERANCE
    token2wav = load_token2wav(folder)
    token2wav.vocoder.module.conv_post._forward_pre_hooks.clear()
    assert (token2wav(sequences, [voice] * 2)[0][0, :19200] - expected).abs().max() > TOLERANCE


def test_split_batch_limits_padded_tokens(monkeypatch):
    monkeypatch.setattr(cosyvoice2, "MAX_UTTERANCES", 4)
    lens = [1, 1, 1, 1, 1, 20, 30, 30, 60, 120]
    batches = [lens[rows] for rows in cosyvoice2.split_batch(lens, 100)]
    assert batches == [[1, 1, 1, 1], [1, 20, 30], [30], [60], [120]]
    assert cosyvoice2.split_batch([], 100) == []
    monkeypatch.setattr(cosyvoice2, "FEW_UTTERANCES", 2)
    assert [lens[rows] for rows in cosyvoice2.split_batch(lens, 1000)] == [[1, 1, 1, 1], [1, 20], [30, 30], [60, 120]]


def test_short_utterances_are_solved_without_the_padding_of_long_ones(folder, voice, monkeypatch):
    token2wav, sequences = load_token2wav(folder), random_tokens([4, 8, 30, 3])
    expected, _ = token2wav(sequences, [voice] * 4)
    sizes, solve = [], token2wav.flow.solve
    monkeypatch.setattr(token2wav.flow, "solve", lambda mu, *rest: sizes.append(tuple(mu.shape)) or solve(mu, *rest))
    monkeypatch.setattr(cosyvoice2, "MAX_UTTERANCES", 2)
    waveforms, _ = token2wav(sequences, [voice] * 4)
    torch.testing.assert_close(waveforms, expected, rtol=0, atol=TOLERANCE)
    assert [shape[0] for shape in sizes] == [2, 2] and sizes[1][2] - sizes[0][2] == 2 * (30 - 4)


def test_seeds_and_prompts(folder, voice):
    token2wav = load_token2wav(folder)
    (tokens,) = random_tokens([20])
    first = token2wav([tokens], [voice], seed=1)[0]
    torch.testing.assert_close(
        first, token2wav([tokens[:5], tokens], [voice, voice], seed=1)[0][1:], rtol=0, atol=TOLERANCE
    )
    assert (first - token2wav([tokens], [voice], seed=2)[0]).abs().max() > TOLERANCE
    with pytest.raises(ValueError, match="needs a prompt voice"):
        token2wav([tokens])
    features = token2wav.prompt_features(voice)
    assert len(features["mel"]) == 2 * len(features["tokens"]) == 74 and features["speaker_embedding"].shape == (192,)
    assert token2wav.prompt_features(voice) is features


@pytest.mark.parametrize("sizes", [(128, 256), (64,)])
def test_packed_utterances_equal_padded_ones(folder, voice, monkeypatch, sizes):
    """Tests rows of several sizes and, with the second parameter, utterances that are longer than all SIZES."""
    monkeypatch.setattr(packed_flow, "SIZES", sizes)
    monkeypatch.setattr(cosyvoice2, "NUM_STEPS", 2)  # Triton's interpreter is slow
    token2wav = load_token2wav(folder)
    other = PromptVoice("好", voice.prompt_speech_16k[:10_000], ())
    voice = PromptVoice("你", voice.prompt_speech_16k[:8_000], ())
    sequences, voices = random_tokens([1, 40, 23]), [voice, other, voice]
    padded, _ = token2wav(sequences, voices)
    flow = token2wav.flow
    with torch.inference_mode():
        flow.packed = packed_flow.packed_solver(flow.module.decoder, flow.times, torch.float32)
    torch.testing.assert_close(token2wav(sequences, voices)[0], padded, rtol=0, atol=TOLERANCE / 100)
    monkeypatch.setattr(flow.packed.estimator, "gap", 0)
    assert (token2wav(sequences, voices)[0] - padded).abs().max() > TOLERANCE / 100  # the gaps are necessary


def test_each_utterance_of_a_batch_has_its_own_voice(folder, voice):
    token2wav = load_token2wav(folder)
    other = PromptVoice("好", voice.prompt_speech_16k[:20_000], ())
    sequences = random_tokens([10, 10])
    both, _ = token2wav(sequences, [voice, other])
    for i, one in enumerate((voice, other)):
        torch.testing.assert_close(token2wav([sequences[i]], [one])[0][0], both[i], rtol=0, atol=TOLERANCE)


def test_half_precision_is_close_to_fp32(folder, voice, monkeypatch):
    monkeypatch.setattr(packed_flow, "SIZES", (256,))
    monkeypatch.setattr(cosyvoice2, "NUM_STEPS", 2)
    (tokens,) = random_tokens([5])
    voice = PromptVoice("你", voice.prompt_speech_16k[:8_000], ())
    exact, _ = load_token2wav(folder)([tokens], [voice])
    half, _ = load_token2wav(folder, precision="fp16")([tokens], [voice])
    difference = (half - exact).norm() / exact.norm()
    assert 0 < difference < 0.002


def test_half_precision_needs_a_gpu(folder, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        load_token2wav(folder, precision="fp16")


def test_tokens_and_features_of_recordings_are_cached_on_disk(folder, voice, cache, monkeypatch):
    first = load_token2wav(folder)
    tokens, features = first.encode([voice.prompt_speech_16k]), first.prompt_features(voice)
    assert sorted(path.name.split("_")[0] for path in cache.iterdir()) == ["prompt", "tokens"]
    again = load_token2wav(folder)
    monkeypatch.setattr(again, "_run_onnx", None)
    cached = again.prompt_features(voice)
    assert again.encode([voice.prompt_speech_16k]) == tokens and cached["tokens"] == features["tokens"]
    assert torch.equal(cached["mel"], features["mel"])
    other = PromptVoice("好", voice.prompt_speech_16k[:20_000], ())
    load_token2wav(folder).prompt_features(other)
    assert len(list(cache.iterdir())) == 4


def test_a_recording_that_the_tokenizer_does_not_accept_is_named(folder, tmp_path):
    save_audio(tmp_path / "long.wav", np.zeros(31 * 16_000, np.float32), 16_000)
    with pytest.raises(ValueError, match=r"long\.wav: item 0 has 31\.0 s; .* up to 30 s"):
        load_prompt_voice(load_token2wav(folder), tmp_path / "long.wav", "好")


def test_threads_may_prepare_voices(folder, voice, cache):
    token2wav = load_token2wav(folder)
    voices = [PromptVoice("好", voice.prompt_speech_16k[: 16_000 + 100 * (i // 2)], ()) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(token2wav.prepare_voice, voices))
    assert len(list(cache.glob("*.pt"))) == len(list(cache.iterdir())) == 8
    assert len(token2wav.sessions) == 2


def test_batch_is_halved_when_memory_runs_out(folder, voice, monkeypatch):
    token2wav = load_token2wav(folder)
    sequences = random_tokens([9, 12, 5])
    expected, _ = token2wav(sequences, [voice] * 3)
    flow, sizes = token2wav.flow, []

    def flow_out_of_memory(tokens, prompts):
        sizes.append(len(tokens))
        if len(tokens) > 1:
            raise torch.cuda.OutOfMemoryError
        return flow(tokens, prompts)

    monkeypatch.setattr(token2wav, "flow", flow_out_of_memory)
    torch.testing.assert_close(token2wav(sequences, [voice] * 3)[0], expected, rtol=0, atol=TOLERANCE)
    assert sizes == [3, 1, 2, 1, 1]


@pytest.mark.parametrize("name", ["flow.pt", "campplus.onnx"])
def test_errors_name_missing_files_and_wrong_weights(folder, tmp_path, name):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        CosyVoice2Token2Wav(copy)
    if name == "flow.pt":
        torch.save({"input_embedding.weight": torch.zeros(3, 3)}, copy / name)
        with pytest.raises(ValueError, match=r"flow\.pt"):
            CosyVoice2Token2Wav(copy)


def test_small_and_full_shapes_have_the_same_keys():
    assert SMALL.keys() == FULL.keys()
