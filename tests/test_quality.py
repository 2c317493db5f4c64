"""Tests of the quality metrics on signals with known values."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tts_grpo.speech import quality
from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.cosyvoice2.random_weights import save_campplus, save_full_campplus
from tts_grpo.speech.nets import f0, speaker
from tts_grpo.speech.nets.dnsmos import DnsMos
from tts_grpo.speech.nets.speaker import Resemblyzer, SpeakerSimilarity, WavLm

pytestmark = pytest.mark.slow


def tone(seconds, hz=200.0, amplitude=0.3):
    """A voice-like tone with six harmonics; ``hz`` may be an array with one value per sample."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(hz, int(seconds * ASR_HZ))) / ASR_HZ
    return (amplitude * sum(np.sin(k * phase) / k for k in range(1, 7))).astype(np.float32)


def quiet(seconds):
    return np.zeros(int(seconds * ASR_HZ), np.float32)


@pytest.fixture(scope="module")
def recordings(assets):
    return [load_audio(path) for path in sorted((assets / "recordings").glob("*.ogg"))[:6]]


def test_silences():
    speech = np.concatenate([quiet(0.4), tone(0.6), quiet(0.2), tone(0.2), quiet(0.8)])
    leading, trailing, inner = quality.silences(speech)
    assert (leading, trailing, inner) == (pytest.approx(0.4), pytest.approx(0.8), pytest.approx(0.2))
    noisy = speech + np.random.default_rng(0).normal(0, 3e-4, len(speech)).astype(np.float32)
    assert quality.silences(noisy) == (pytest.approx(0.4), pytest.approx(0.8), pytest.approx(0.2))
    assert quality.silences(quiet(1.0)) == (1.0, 1.0, 0.0)


def test_repetition():
    share = quality.repeated_share
    assert share(list("今天天气很好")) == 0.0  # repeating a single unit is normal
    assert share(list("天气很好天气很好")) == 0.5
    assert share(list("今天天气很好天气很好天气很好")) == pytest.approx(8 / 14)
    assert share([]) == 0.0


def test_basic_metrics():
    speech = np.concatenate([quiet(0.5), tone(2.0), quiet(0.5)])
    speech[10_000:10_300] = 1.0
    metrics = quality.basic_metrics(speech, list("一二三四五六"), list("一二一二三四五六"), "length")
    assert metrics["duration_s"] == 3.0 and metrics["speech_rate"] == pytest.approx(3.0)
    assert metrics["eos_share"] == 0.0 and metrics["repetition"] == pytest.approx(2 / 8)
    assert metrics["clipped_share"] == pytest.approx(300 / 48_000)
    repetitive = list("一二一二三")  # repetitions of the text itself do not count
    assert quality.basic_metrics(speech, repetitive, repetitive, "eos")["repetition"] == 0.0


def test_f0_metrics():
    metrics = f0.F0Metrics()
    flat = metrics.measure(tone(2.0, 220.0))
    assert flat["f0_median_hz"] == pytest.approx(220, rel=0.01)
    assert flat["f0_range_semitones"] < 0.3 and flat["f0_std_semitones"] < 0.1
    seconds = np.arange(2 * ASR_HZ) / ASR_HZ
    wave = metrics.measure(tone(2.0, 220 * 2 ** (3 / 12 * np.sin(2 * np.pi * seconds))))  # 3 semitones up and down
    assert wave["f0_range_semitones"] == pytest.approx(6.0, abs=0.5)
    assert wave["f0_std_semitones"] == pytest.approx(3 / math.sqrt(2), abs=0.2)
    assert set(metrics.measure(quiet(1.0)).values()) == {None}


def test_campplus_of_a_batch_equals_onnxruntime_and_falls_back_to_it(recordings, tmp_path, caplog, monkeypatch):
    from torchaudio.compliance import kaldi

    save_full_campplus(tmp_path / "campplus.onnx")
    recordings = [*recordings[:3], recordings[3][: ASR_HZ // 4], np.concatenate(recordings[:3]), quiet(1.0)]
    encoder = speaker.CamPlus(tmp_path / "campplus.onnx")
    expected = encoder.embed_all(recordings)
    assert expected[-1] is None and np.linalg.norm(expected[0]) == pytest.approx(1.0)
    bands = kaldi.fbank(torch.from_numpy(recordings[0])[None], num_mel_bins=80, dither=0, sample_frequency=ASR_HZ)
    alone = encoder._session.run(None, {"input": (bands - bands.mean(0))[None].numpy()})[0][0]  # as CosyVoice does
    np.testing.assert_allclose(expected[0], alone / np.linalg.norm(alone), atol=1e-5)

    encoder._run = encoder._batched(tmp_path / "campplus.onnx")
    assert encoder._run != encoder._run_onnx and not caplog.records
    for found, one in zip(encoder.embed_all(recordings)[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(found, one, atol=1e-5)

    shapes = set()  # of the inputs of convolutions, each of which cuDNN must plan
    for name in ("conv1d", "conv2d"):
        function = getattr(torch.nn.functional, name)
        watched = lambda x, *rest, f=function, **options: (shapes.add(x.shape), f(x, *rest, **options))[1]  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, name, watched)
    network = speaker.CamPlusNetwork(tmp_path / "campplus.onnx")
    network([torch.zeros(100, 80)])
    few = set(shapes)
    network([torch.zeros(128, 80)])
    assert shapes == few and 0 < len(few) < 12, "lengths are rounded up, and most convolutions are matrix products"

    save_campplus(tmp_path / "other.onnx")
    other = speaker.CamPlus(tmp_path / "other.onnx")
    assert other._batched(tmp_path / "other.onnx") == other._run_onnx
    assert "CAM++ runs on the CPU by onnxruntime" in caplog.text and "not CAM++ as known" in caplog.text
    monkeypatch.setattr(speaker, "MAX_ERROR", 0.0)
    assert encoder._batched(tmp_path / "campplus.onnx") == encoder._run_onnx
    assert "differs from onnxruntime" in caplog.text

    def without_memory(*_):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(speaker.CamPlusNetwork, "__call__", without_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):  # the file may be right
        encoder._batched(tmp_path / "campplus.onnx")


def test_f0_of_a_batch_equals_the_package_and_needs_its_network(recordings, monkeypatch):
    import swift_f0

    package, network = swift_f0.SwiftF0(threads=1, spin=False), f0.SwiftF0Network()
    long = np.resize(np.concatenate(recordings), 31 * ASR_HZ)  # more than the package analyses at once
    recordings = [*recordings[:4], quiet(0.5), recordings[0][8000:8200], long, recordings[1][:6000]]
    lens = [len(one) for one in recordings]
    waveforms = torch.full((len(lens), max(lens)), 0.2)  # what lies beyond an end must not count
    for row, one in zip(waveforms, recordings, strict=True):
        row[: len(one)] = torch.from_numpy(one)
    for batch in (1, 4):
        monkeypatch.setattr(f0, "BATCH", batch)
        for one, (hz, confidence) in zip(recordings, network(waveforms, lens), strict=True):
            expected = package.detect(one, ASR_HZ, f0.MIN_HZ, f0.MAX_HZ)
            voiced = expected.confidence >= 0.5
            np.testing.assert_allclose(confidence, expected.confidence, atol=1e-4)
            np.testing.assert_allclose(hz[voiced], expected.pitch_hz[voiced], rtol=1e-4)
    lengths = []
    monkeypatch.setattr(network, "_f0", lambda logits, f=network._f0: (lengths.append(logits.shape[1]), f(logits))[1])
    for seconds in (0.6, 1.0):
        network(torch.zeros(1, int(seconds * ASR_HZ)), [int(seconds * ASR_HZ)])
    assert lengths == [64, 64], "lengths are rounded up, so that cuDNN plans few shapes"
    with pytest.raises(ValueError, match="empty or not finite"):
        network(torch.full((1, 800), torch.nan), [800])
    with pytest.raises(ValueError, match="empty or not finite"):
        network(torch.zeros(2, 800), [800, 0])
    monkeypatch.setattr(f0, "NETWORK_SHA256", "")
    with pytest.raises(RuntimeError, match="swift-f0 .* has another network"):
        f0.SwiftF0Network()


def test_dnsmos_equals_the_package_and_decreases_with_noise(recordings):
    from speechmos import dnsmos

    mos, speech = DnsMos(), np.concatenate(recordings)  # more than one window
    assert len(speech) > 9.01 * ASR_HZ
    for recording in (recordings[0], speech):
        expected = dnsmos.run(recording, ASR_HZ)
        found = mos.measure(recording)
        for part in ("ovrl", "sig", "bak"):
            assert found[f"dnsmos_{part}"] == pytest.approx(expected[f"{part}_mos"], abs=1e-3)
    clean = mos.measure(recordings[0])
    noise = np.random.default_rng(0).normal(0, 0.05, len(recordings[0])).astype(np.float32)
    noisy = mos.measure(np.clip(recordings[0] + noise, -1, 1))
    assert noisy["dnsmos_ovrl"] < clean["dnsmos_ovrl"] - 0.5 and min(noisy.values()) >= 1.0


def test_dnsmos_computes_what_windows_share_once_and_equally(recordings):
    import onnxruntime
    from speechmos import dnsmos

    speech = np.concatenate(recordings)
    size = int(9.01 * ASR_HZ)
    windows = [speech[i * ASR_HZ : i * ASR_HZ + size] for i in range(3)]
    assert len(windows[-1]) == size
    whole = onnxruntime.InferenceSession(str(Path(dnsmos.__file__).parent / "dnsmos_models/sig_bak_ovr.onnx"))
    expected = np.concatenate([whole.run(None, {"input_1": window[None]})[0] for window in windows])
    assert np.ptp(expected, axis=0).min() > 1e-3  # the windows differ
    assert np.abs(DnsMos().raw_scores(windows) - expected).max() < 1e-5


def test_similarity_is_lower_for_another_voice(recordings, assets, tmp_path):
    prompts = sorted((assets / "prompts").glob("*.ogg"))
    similarity = SpeakerSimilarity(Resemblyzer(), prompts)
    itself = similarity.measure(load_audio(prompts[0]), str(prompts[0]))["speaker_similarity"]
    assert itself == pytest.approx(1.0, abs=1e-5)
    same = [similarity.measure(speech, None)["speaker_similarity"] for speech in recordings]
    slowed = np.interp(np.arange(0, len(recordings[0]), 0.65), np.arange(len(recordings[0])), recordings[0])
    other = similarity.measure(slowed.astype(np.float32), None)["speaker_similarity"]  # 7 semitones deeper
    assert min(same) > 0.75 and other < min(same) - 0.1
    assert similarity.measure(quiet(1.0), None) == {"speaker_similarity": -1.0}
    assert SpeakerSimilarity(Resemblyzer()).measure(recordings[0], None) == {}


def test_wavlm(recordings, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    folder = tmp_path / "wavlm-tiny-sv"
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_kernel=(10, 8), conv_stride=(160, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, tdnn_dim=(8, 8), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1),
        xvector_output_dim=8,
    )  # fmt: skip
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    encoder = WavLm(folder)
    assert encoder.name == "WavLM wavlm-tiny-sv"
    assert np.linalg.norm(encoder.embed(recordings[0])) == pytest.approx(1.0, abs=1e-5)
    assert encoder.embed(quiet(1.0)) is None
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "feature_extractor.weight"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing or of another shape.*feature_extractor\.weight"):
        WavLm(folder)
    WavLMForXVector(WavLMConfig(**{**config.to_dict(), "xvector_output_dim": 12})).base_model.save_pretrained(folder)
    with pytest.raises(ValueError, match="not a WavLMForXVector"):
        WavLm(folder)


def test_failures_get_the_worst_value_or_none():
    failed = quality.worst_values(networks=True)
    for name, metric in quality.QUALITY_METRICS.items():
        assert failed[name] == metric.worst and (metric.worst is None) == (metric.better is None)
    assert set(quality.worst_values(networks=None)) == set(quality.BASIC_METRICS)


def test_evenly_spaced_indices():
    assert quality.evenly_spaced(3, 9) == [0, 4, 8] and quality.evenly_spaced(0, 9) == []
    assert quality.evenly_spaced(50, 4) == [0, 1, 2, 3]
    assert len(quality.evenly_spaced(50, 400)) == 50
