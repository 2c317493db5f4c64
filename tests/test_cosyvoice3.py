"""Compares CosyVoice3's token2wav on batches with single utterances, and with the official code if it is there."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tools import bench_token2wav
from tts_grpo.speech.cosyvoice2 import packed_flow
from tts_grpo.speech.cosyvoice2 import token2wav as cosyvoice2
from tts_grpo.speech.cosyvoice3.config import load_config
from tts_grpo.speech.cosyvoice3.modules import FlowNetwork, VocoderNetwork
from tts_grpo.speech.cosyvoice3.packed_dit import packed_solver
from tts_grpo.speech.cosyvoice3.random_weights import FULL, YAML, write_token2wav
from tts_grpo.speech.cosyvoice3.token2wav import CosyVoice3Token2Wav, PromptMel
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.speech.token2wav import load_token2wav

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_token2wav(tmp_path_factory.mktemp("cosyvoice3"))


@pytest.fixture(scope="module")
def voices():
    time = np.arange(16_000) / 16_000
    speech = 0.3 * np.sin(2 * np.pi * 180 * time) + 0.05 * np.random.default_rng(1).standard_normal(16_000)
    return [PromptVoice("你好", speech[:size].astype(np.float32), ()) for size in (16_000, 12_000)]


def random_tokens(lens):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 6561, n).tolist() for n in lens]


def test_a_batch_equals_single_utterances(folder, voices):
    token2wav = load_token2wav(folder)
    assert isinstance(token2wav, CosyVoice3Token2Wav)
    sequences, prompts = random_tokens([1, 7, 40, 23]), [voices[0], voices[1], voices[1], voices[0]]
    waveforms, lens = token2wav(sequences, prompts)
    assert lens.tolist() == [960 * len(tokens) for tokens in sequences]
    for tokens, voice, waveform, length in zip(sequences, prompts, waveforms, lens, strict=True):
        alone, _ = token2wav([tokens], [voice], seed=3)
        assert alone.abs().max() > 1e-3
        torch.testing.assert_close(waveform[:length], alone[0], rtol=0, atol=TOLERANCE / 10)
        assert not waveform[length:].any()


@pytest.fixture(scope="module")
def official():
    """The class names of CosyVoice's source in the folder of the environment variable cosyvoice_dir."""
    source = os.environ.get("cosyvoice_dir", "")  # noqa: SIM112, the name of the setting
    if not Path(source, "cosyvoice/flow/DiT").is_dir():
        pytest.skip("set cosyvoice_dir to CosyVoice's source (and install x-transformers)")
    pytest.importorskip("x_transformers")
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cosyvoice"}
    sys.path.insert(0, source)

    def load(folder: Path) -> dict:
        modules = cosyvoice2.load_modules(folder, "cosyvoice3.yaml")
        modules["flow"].load_state_dict(torch.load(folder / "flow.pt"))
        state = torch.load(folder / "hift.pt")
        modules["hift"].load_state_dict({name.removeprefix("generator."): value for name, value in state.items()})
        return modules | {name: modules[name].eval() for name in ("flow", "hift")}

    yield load
    sys.path.remove(source)
    for name in [name for name in sys.modules if name.split(".")[0] == "cosyvoice"]:
        del sys.modules[name]
    sys.modules.update(others)


def test_a_batch_equals_the_official_code_one_by_one(official, folder, voices, tmp_path):
    if os.environ.get("FULL_SHAPE"):
        folder = write_token2wav(tmp_path / "full", small=False)
    token2wav, modules = load_token2wav(folder), official(folder)
    sequences, prompts = random_tokens([1, 40, 23]), [voices[0], voices[1], voices[0]]
    waveforms, lens = token2wav(sequences, prompts)
    largest = 0.0
    for tokens, voice, waveform, length in zip(sequences, prompts, waveforms, lens, strict=True):
        prompt = {k: torch.as_tensor(v)[None] for k, v in token2wav.prompt_features(voice).items()}
        size = lambda value: torch.tensor([value.shape[1]])  # noqa: E731
        row = torch.tensor([tokens])
        mel, _ = modules["flow"].inference(
            row, size(row), prompt["tokens"], size(prompt["tokens"]), prompt["mel"], size(prompt["mel"]),
            prompt["speaker_embedding"], streaming=False, finalize=True,
        )  # fmt: skip
        expected = modules["hift"].inference(speech_feat=mel)[0][0]
        assert len(expected) == length and expected.abs().max() > 1e-3
        largest = max(largest, (waveform[:length] - expected).abs().max().item())
    assert largest < TOLERANCE


def test_packed_utterances_equal_padded_ones(folder, voices, monkeypatch):
    """The kernels, in float32 and run by Triton's interpreter, on a row of two utterances."""
    monkeypatch.setattr(packed_flow, "SIZES", (72,))
    monkeypatch.setattr(packed_flow, "MIN_MEAN_FRAMES", 36)
    monkeypatch.setattr(cosyvoice2, "NUM_STEPS", 1)  # Triton's interpreter is slow
    sequences, padded = random_tokens([3, 12]), load_token2wav(folder)
    prompts = [padded.prompt_features(replace(voices[0], prompt_speech_16k=voices[0].prompt_speech_16k[:6000]))] * 2
    assert packed_flow.assign_rows([2 * (len(prompts[0]["tokens"]) + n) for n in (3, 12)], 0) == [[0, 1]]
    with torch.inference_mode():
        expected, packed = padded.flow(sequences, prompts), load_token2wav(folder).flow
        estimator = packed.module.decoder["estimator"]
        packed.packed = packed_solver(
            estimator, packed.noise[0].T, packed.times[:1], packed.times, packed.rate, torch.float32
        )
        mel = packed(sequences, prompts)
    for one, other, tokens in zip(mel, expected, sequences, strict=True):
        torch.testing.assert_close(one[:, : 2 * len(tokens)], other[:, : 2 * len(tokens)], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_half_precision_is_close_to_fp32(folder, voices, monkeypatch):
    monkeypatch.setattr(packed_flow, "SIZES", (32,))
    monkeypatch.setattr(cosyvoice2, "NUM_STEPS", 1)
    (tokens,) = random_tokens([1])
    exact, half = load_token2wav(folder), load_token2wav(folder, precision="fp16")
    assert half.exact().fast is False
    prompts = [exact.prompt_features(replace(voices[0], prompt_speech_16k=voices[0].prompt_speech_16k[:6000]))]
    mels = [token2wav.flow([tokens], prompts) for token2wav in (exact, half)]
    waveforms = [token2wav._vocode(mels[0], [1], 0)[0] for token2wav in (exact, half)]  # of the same mel
    for first, second in (mels, waveforms):
        assert 0 < (first - second).norm() / first.norm() < 0.002


def test_layers_have_the_official_names_and_shapes(tmp_path):
    """The hashes are those of the official modules at ace7c47, with the sizes of the released model."""
    (tmp_path / "cosyvoice3.yaml").write_text(YAML.format(**FULL))
    flow, vocoder = load_config(tmp_path / "cosyvoice3.yaml")
    with torch.device("meta"):
        networks = FlowNetwork(flow), VocoderNetwork(vocoder)
    hashes = []
    for network in networks:
        layers = sorted(f"{name} {tuple(value.shape)}" for name, value in network.state_dict().items())
        hashes.append(hashlib.sha256("\n".join(layers).encode()).hexdigest()[:16])
    assert hashes == ["871db1407ae1b02f", "23949a08e41072e2"]


def test_prompt_mel_equals_that_of_the_official_frontend():
    from matcha.utils.audio import mel_spectrogram

    speech = torch.randn(1, 9_000)
    expected = mel_spectrogram(speech, 1920, 80, 24_000, 480, 1920, 0, None, center=False)
    torch.testing.assert_close(PromptMel()(speech), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("dim_head: 64", "", "KeyError.*dim_head"), ("'cosine'", "'linear'", "t_scheduler is linear"),
     ("sample_rate: 24000", "sample_rate: 22050", "sample_rate is 22050")],
)  # fmt: skip
def test_unsupported_configurations_are_refused(tmp_path, old, new, message):
    (tmp_path / "cosyvoice3.yaml").write_text(YAML.format(**FULL).replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "cosyvoice3.yaml")


def test_errors_name_missing_files_and_wrong_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    torch.save({"input_embedding.weight": torch.zeros(3, 3)}, copy / "flow.pt")
    with pytest.raises(ValueError, match=r"flow\.pt"):
        load_token2wav(copy)
    (copy / "speech_tokenizer_v3.onnx").unlink()
    with pytest.raises(ValueError, match=r"not a CosyVoice3 model folder: speech_tokenizer_v3\.onnx is missing"):
        load_token2wav(copy)


def test_benchmark_measures_batches(folder, capsys):
    lengths = ["--seconds", "0.1", "0.2", "0.4", "--num-rollouts", "3", "--prompt-s", "0.5"]
    bench_token2wav.main(["--random", str(folder), "--runs", "fp32:2", *lengths])
    result = json.loads(capsys.readouterr().out)
    assert result["fp32:2"]["rollouts"] == 3 and result["fp32:2"]["rollouts_per_s"] > 0


def test_the_benchmark_measures_flashcosyvoice_with_its_own_model_only(tmp_path):
    with pytest.raises(SystemExit, match="--flash needs --model cosyvoice2"):
        bench_token2wav.main(["--random", str(tmp_path), "--flash", "8"])
