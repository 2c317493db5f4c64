import numpy as np
import pytest
import soundfile as sf

from tts_grpo.speech.audio import load_audio, save_audio


def tone(rate, seconds=0.5, hz=440.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "a.wav"
    save_audio(path, tone(16000), 16000)
    assert np.abs(load_audio(path) - tone(16000)).max() < 1e-4
    assert [p.name for p in path.parent.iterdir()] == ["a.wav"]


def test_resamples_and_mixes_down(tmp_path):
    stereo = np.stack([tone(24000), np.zeros(12000, np.float32)], axis=1)
    sf.write(tmp_path / "s.wav", stereo, 24000)
    loaded = load_audio(tmp_path / "s.wav")
    assert loaded.shape == (8000,) and loaded.dtype == np.float32
    middle = slice(500, -500)
    assert np.abs(loaded[middle] - tone(16000)[middle] / 2).max() < 2e-3


@pytest.mark.parametrize("content", [None, b"", b"no audio at all"])
def test_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.wav"):
        load_audio(path)


def test_empty_recording_is_an_error(tmp_path):
    sf.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(ValueError, match="no samples"):
        load_audio(tmp_path / "empty.wav")
