import shutil

import numpy as np
import pytest
import torch

from tts_grpo.asr import SenseVoice
from tts_grpo.audio import load_audio
from tts_grpo.metrics import pinyin_error_rate


def recordings(assets, test_rows, count):
    rows = [row for row in test_rows if (assets / "recordings" / f"{row['id']}.ogg").exists()][:count]
    return [row["text"] for row in rows], [load_audio(assets / "recordings" / f"{row['id']}.ogg") for row in rows]


def test_it_hears_what_was_said_and_not_something_else(asr, assets, test_rows):
    texts, speech = recordings(assets, test_rows, 40)
    transcripts = asr.transcribe(speech)
    assert pinyin_error_rate(texts, transcripts, tones=False) < 0.1
    assert pinyin_error_rate(texts[1:] + texts[:1], transcripts, tones=False) > 0.7
    assert not any("<|" in transcript for transcript in transcripts)


def test_order_and_batch_do_not_matter(asr, assets, test_rows):
    _, speech = recordings(assets, test_rows, 12)
    together = asr.transcribe(speech)
    assert asr.transcribe(speech[::-1]) == together[::-1]
    assert [asr.transcribe([s])[0] for s in speech] == together


def test_hardly_any_audio_is_an_empty_transcript(asr, assets, test_rows):
    _, speech = recordings(assets, test_rows, 1)
    assert asr.transcribe([np.zeros(0, np.float32), speech[0], np.zeros(399, np.float32)])[0::2] == ["", ""]
    assert asr.transcribe([]) == []


def broken_copy(assets, tmp_path, change):
    folder = tmp_path / "asr"
    shutil.copytree(assets / "asr_reward", folder)
    state = torch.load(folder / "model.pt")
    change(state)
    torch.save(state, folder / "model.pt")
    return folder


def test_missing_weight_is_an_error(assets, tmp_path):
    folder = broken_copy(assets, tmp_path, lambda state: state.pop("ctc.ctc_lo.weight"))
    with pytest.raises(ValueError, match="ctc.ctc_lo.weight"):
        SenseVoice(folder)


def test_misshapen_weight_is_an_error(assets, tmp_path):
    def change(state):
        state["ctc.ctc_lo.bias"] = state["ctc.ctc_lo.bias"][:-1]

    with pytest.raises((ValueError, RuntimeError), match="ctc.ctc_lo.bias|size mismatch"):
        SenseVoice(broken_copy(assets, tmp_path, change))


def test_folder_without_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="config.yaml"):
        SenseVoice(tmp_path)
