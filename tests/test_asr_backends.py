"""Tests of the evaluation's ASR backends with small models in the real file formats. test_asr.py tests SenseVoice."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sherpa_onnx
import torch
import yaml

from tests.asr_folders import TOKENS, make_paraformer, make_sherpa, make_whisper
from tts_grpo.speech.asr.loading import load_asr
from tts_grpo.speech.asr.paraformer import Paraformer
from tts_grpo.speech.audio import load_audio

pytestmark = pytest.mark.slow

CHARACTERS = set(TOKENS[3:-1])


@pytest.fixture(scope="module")
def speech(assets):
    recordings = [load_audio(path) for path in sorted((assets / "recordings").glob("*.ogg"))[:4]]
    return [*recordings[:2], np.zeros(100, np.float32), *recordings[2:]]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return make_whisper(tmp_path_factory.mktemp("asr") / "whisper")


def test_sensevoice_is_detected_by_its_folder(assets):
    loaded = load_asr(assets / "asr_eval")
    assert (loaded.backend, loaded.model) == ("funasr", "SenseVoiceSmall")
    assert set(loaded.describe()) == {"backend", "model", "weights", "sha256"}


@pytest.mark.parametrize(("seaco", "name"), [(False, "Paraformer"), (True, "SeacoParaformer")])
def test_paraformer(tmp_path, speech, seaco, name):
    loaded = load_asr(make_paraformer(tmp_path / "paraformer", seaco=seaco))
    assert (loaded.backend, loaded.model) == ("funasr", name)
    together = loaded.recogniser.transcribe(speech)
    assert together[2] == "" and all(set(text) <= CHARACTERS | {" "} for text in together)
    assert all(len(text) > 3 for text in together[:2])
    assert [loaded.recogniser.transcribe([one])[0] for one in speech] == together
    for _ in range(4):
        assert loaded.recogniser.transcribe(speech) == together


@pytest.mark.parametrize("seaco", [False, True])
def test_paraformer_that_recognises_nothing(tmp_path, speech, seaco):
    asr = Paraformer(make_paraformer(tmp_path / "paraformer", tokens_per_frame=1e-5, seaco=seaco))
    assert asr.transcribe(speech) == [""] * len(speech)


def test_paraformer_with_a_missing_weight_is_an_error(tmp_path):
    folder = make_paraformer(tmp_path / "p")
    state = torch.load(folder / "model.pt")
    del state["decoder.output_layer.weight"]
    torch.save(state, folder / "model.pt")
    with pytest.raises(ValueError, match=r"decoder\.output_layer\.weight"):
        load_asr(folder)


def test_whisper(whisper, speech):
    loaded = load_asr(whisper, language="en")
    assert (loaded.backend, loaded.model) == ("faster-whisper", "Whisper")
    texts = loaded.recogniser.transcribe(speech[1:3])
    assert texts[1] == "" and isinstance(texts[0], str)
    assert loaded.recogniser.transcribe(speech[1:3]) == texts


def test_whisper_is_told_the_language_of_each_recording(whisper, speech, monkeypatch):
    asr, given = load_asr(whisper, language="en").recogniser, []
    with pytest.raises(ValueError, match="no language 'zh': this Whisper knows en"):
        asr.transcribe(speech[:1], ["zh"])
    monkeypatch.setattr(asr, "_check", lambda language: None)
    monkeypatch.setattr(asr._model, "transcribe", lambda _, **options: given.append(options) or ([], None))
    asr.transcribe(speech, ["en", "zh", "en", "zh", "en"])
    assert [options["language"] for options in given] == ["en", "zh", "zh", "en"]  # the third recording is too short
    assert [bool(options["initial_prompt"]) for options in given] == [False, True, True, False]


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_whisper_does_not_download_a_missing_file(whisper, name):
    (whisper / name).rename(whisper / "away")
    try:
        with pytest.raises(ValueError, match=name):
            load_asr(whisper, language="en")
    finally:
        (whisper / "away").rename(whisper / name)


def test_whisper_with_weights_of_another_shape_is_an_error(whisper, tmp_path):
    bands = json.loads((whisper / "preprocessor_config.json").read_text())
    (whisper / "preprocessor_config.json").write_text(json.dumps(bands | {"feature_size": 128}))
    try:
        with pytest.raises(ValueError, match="128 mel bands"):
            load_asr(whisper, language="en")
    finally:
        (whisper / "preprocessor_config.json").write_text(json.dumps(bands))
    weights = (whisper / "model.bin").read_bytes()
    (whisper / "model.bin").write_bytes(weights[: len(weights) // 2])
    try:
        with pytest.raises(RuntimeError):
            load_asr(whisper, language="en")
    finally:
        (whisper / "model.bin").write_bytes(weights)


def test_sherpa_onnx(tmp_path, speech):
    loaded = load_asr(make_sherpa(tmp_path / "sherpa"))
    assert (loaded.backend, loaded.model) == ("sherpa-onnx", "model.onnx")
    texts = loaded.recogniser.transcribe(speech)
    assert texts[2] == "" and all(len(set(text) & CHARACTERS) > 1 and "<blank>" not in text for text in texts[:2])
    assert loaded.recogniser.transcribe(speech[::-1]) == texts[::-1]
    assert loaded.recogniser.transcribe(speech, ["zh"] * len(speech)) == texts
    with pytest.raises(ValueError, match="sherpa does not know the language en"):
        loaded.recogniser.transcribe(speech[:2], ["zh", "en"])
    with pytest.raises(ValueError, match="sherpa does not know the language en"):
        load_asr(tmp_path / "sherpa", language="en")
    assert sherpa_onnx.FeatureExtractorConfig().dither == 0  # the default, which from_paraformer does not change


def test_sherpa_onnx_of_another_kind_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is neither Paraformer nor SenseVoice"):
        load_asr(make_sherpa(tmp_path / "sherpa", model_type="zipformer2"))


def test_unsupported_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no supported ASR model found"):
        load_asr(tmp_path)
    (tmp_path / "config.yaml").write_text("model: FsmnVADStreaming\n")
    with pytest.raises(ValueError, match="is neither SenseVoiceSmall nor a Paraformer"):
        load_asr(tmp_path)


def test_only_needed_modules_of_funasr_are_imported(assets, tmp_path):
    """Importing all of funasr takes longer than the rest of a process's start; only folders that need it cause it."""
    folders = [assets / "asr_reward", *(make_paraformer(tmp_path / str(s), seaco=s) for s in (False, True))]
    code = """import sys
from tts_grpo.speech.asr.loading import load_asr
for folder in sys.argv[1:]:
    load_asr(folder)
print([name for name in ("funasr.models.whisper.model", "funasr.models.conformer.model") if name in sys.modules])
"""
    run = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr[-3000:]
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())
    config["encoder"] = "ConformerEncoder"  # defined in a module that is not in _MODULES; the weights then do not match
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode and "NoneType" not in done.stderr.splitlines()[-1], done.stderr[-3000:]
