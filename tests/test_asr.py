import shutil

import numpy as np
import pytest
import torch
import yaml

from tests.asr_folders import make_small_sensevoice
from tests.hub_repositories import make_sensevoice
from tts_grpo.speech.asr.loading import load_asr
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import load_audio
from tts_grpo.speech.model_folders import known_languages
from tts_grpo.text.errors import pinyin_error_rate

pytestmark = pytest.mark.slow


def recordings(assets, test_rows, count):
    rows = [row for row in test_rows if (assets / "recordings" / f"{row['id']}.ogg").exists()][:count]
    return [row["text"] for row in rows], [load_audio(assets / "recordings" / f"{row['id']}.ogg") for row in rows]


def test_transcripts_match_their_own_references_only(asr, assets, test_rows):
    texts, speech = recordings(assets, test_rows, 40)
    transcripts = asr.transcribe(speech)
    assert pinyin_error_rate(texts, transcripts, tones=False) < 0.1
    assert pinyin_error_rate(texts[1:] + texts[:1], transcripts, tones=False) > 0.7
    assert not any("<|" in transcript for transcript in transcripts)


def test_onsets_are_the_times_of_the_syllables(asr, assets, test_rows):
    _, (first, second) = recordings(assets, test_rows, 2)
    gap = np.zeros(8000, np.float32)
    alone, other, joined = asr.transcribe_with_onsets([first, second, np.concatenate([first, gap, second])])
    count = len(alone.onsets_s)
    assert len(joined.text) == len(joined.onsets_s) >= count + len(other.onsets_s) - 2
    assert list(joined.onsets_s) == sorted(joined.onsets_s)
    np.testing.assert_allclose(joined.onsets_s[: count - 1], alone.onsets_s[:-1], atol=0.1)
    later = (len(first) + len(gap)) / 16000
    np.testing.assert_allclose(joined.onsets_s[-3:], np.array(other.onsets_s[-3:]) + later, atol=0.1)


def test_the_network_is_told_the_language_of_each_recording(tmp_path, assets, test_rows):
    texts, speech = recordings(assets, test_rows, 6)
    folder = make_small_sensevoice(tmp_path / "small")
    languages = ["zh", "en"] * 3
    chinese, english = SenseVoice(folder), load_asr(folder, language="en").recogniser
    told = {"zh": chinese.log_likelihoods(speech, texts), "en": english.log_likelihoods(speech, texts)}
    assert all(zh != en for zh, en in zip(*told.values(), strict=True))
    found = chinese.log_likelihoods(speech, texts, languages)
    np.testing.assert_allclose(found, [told[language][i] for i, language in enumerate(languages)], rtol=1e-5)
    alone = [
        (chinese if language == "zh" else english).transcribe([one])[0] for one, language in zip(speech, languages)
    ]
    assert english.transcribe(speech, languages) == alone
    assert chinese.transcribe(speech[::-1], languages[::-1]) == alone[::-1]


def test_a_language_that_the_recogniser_lacks_is_refused(assets, asr):
    assert known_languages(assets / "asr_reward") == ("zh",)
    with pytest.raises(ValueError, match="asr_reward does not know the language en: its vocabulary has zh only"):
        SenseVoice(assets / "asr_reward", language="en")
    with pytest.raises(ValueError, match="asr_eval does not know the language en"):
        load_asr(assets / "asr_eval", language="en")
    with pytest.raises(ValueError, match="does not know the language en"):
        asr.transcribe([np.zeros(16000, np.float32)] * 2, ["zh", "en"])
    with pytest.raises(ValueError, match="no language 'fr': SenseVoice knows auto, zh, en"):
        SenseVoice(assets / "asr_reward", language="fr")


def test_each_character_has_a_time_whatever_the_pieces_are(asr):
    """The tokenizer's pieces and the transcript may differ, by tags and by spaces."""
    ids = asr._model.kwargs["tokenizer"].encode("你好")
    spoken = [(2 * i, piece) for i, piece in enumerate(ids)]
    for text in ("你好", "〇 𠮷a，b", "", "……", "二〇〇八 年"):
        onsets = asr._onsets(text, spoken)
        assert len(onsets) == len(text) and list(onsets) == sorted(onsets)
    assert asr._onsets("你 好", spoken) == (0.0, 2 * asr._frame_s, 2 * asr._frame_s)


def test_transcripts_do_not_depend_on_order_and_batch(asr, assets, test_rows):
    _, speech = recordings(assets, test_rows, 12)
    together = asr.transcribe(speech)
    assert asr.transcribe(speech[::-1]) == together[::-1]
    assert [asr.transcribe([s])[0] for s in speech] == together


def test_transcripts_equal_those_of_funasr_one_by_one(asr, assets, test_rows):
    from funasr.utils.postprocess_utils import rich_transcription_postprocess

    _, speech = recordings(assets, test_rows, 20)
    expected = [asr._model.generate(input=[s], language="zh", use_itn=False, cache={})[0]["text"] for s in speech]
    assert asr.transcribe(speech) == [rich_transcription_postprocess(text) for text in expected]


@pytest.fixture(scope="module")
def published(assets, tmp_path_factory):
    """An ASR model with the config of iic/SenseVoiceSmall, which does not set ``dither``."""
    folder = make_sensevoice(tmp_path_factory.mktemp("asr") / "SenseVoiceSmall", assets / "asr_reward")
    assert "dither" not in yaml.safe_load((folder / "config.yaml").read_text())["frontend_conf"]
    return SenseVoice(folder)


def test_a_recording_has_one_transcript(published, asr, assets, test_rows):
    """Tested with quiet speech, because funasr's default dither of 1.0 changes its transcripts most."""
    quiet = [0.003 * s for s in recordings(assets, test_rows, 16)[1]]
    first = published.transcribe_with_onsets(quiet)
    assert any(transcript.text for transcript in first)
    for _ in range(4):
        assert published.transcribe_with_onsets(quiet) == first
    assert published.transcribe_with_onsets(quiet[::-1]) == first[::-1]
    assert [transcript for s in quiet for transcript in published.transcribe_with_onsets([s])] == first
    assert asr.transcribe_with_onsets(quiet) == first  # the tiny stack's config sets dither to 0


def test_transcript_of_too_short_audio_is_empty(asr, assets, test_rows):
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


def test_weight_of_wrong_shape_is_an_error(assets, tmp_path):
    def change(state):
        state["ctc.ctc_lo.bias"] = state["ctc.ctc_lo.bias"][:-1]

    with pytest.raises((ValueError, RuntimeError), match="ctc.ctc_lo.bias|size mismatch"):
        SenseVoice(broken_copy(assets, tmp_path, change))


def test_folder_without_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="config.yaml"):
        SenseVoice(tmp_path)
