import numpy as np
import pytest
import soundfile as sf

from tts_grpo.speech.audio import ASR_HZ, MAX_PADDED_S, batches_of_similar_length, load_audio, save_audio


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


def test_batches_of_similar_length_are_limited_in_number_and_memory():
    lens = [second * ASR_HZ for second in (2, 100, 1, 300, 3, 90, 120, 4)]
    batches = batches_of_similar_length(lens, 3)
    assert batches == [[2, 0, 4], [7, 5], [1, 6], [3]]
    assert all(len(batch) * max(lens[i] for i in batch) <= MAX_PADDED_S * ASR_HZ for batch in batches[:-1])
    assert batches_of_similar_length([], 3) == []
