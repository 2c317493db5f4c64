import io
import sys
import wave

import numpy as np
import pytest

from scripts import train, validation_audio
from tests.conftest import free_ports
from tts_grpo.text.errors import pinyin_error_rate
from tts_grpo.text.jsonl import write_jsonl
from tts_grpo.text.tokens import format_speech_tokens

pytestmark = pytest.mark.slow


def dump_of(rows, step=20) -> list[dict]:
    """Rows in the format of veRL's validation dump."""
    return [
        {"input": "...", "output": format_speech_tokens(row["speech_tokens"]), "gts": row["text"], "step": step}
        for row in rows
    ]


def read_audio(folder) -> dict[str, list[tuple[int, str, bytes]]]:
    """``tag -> [(step, title, WAV)]`` of the event files in a folder, read by TensorBoard."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    log.Reload()
    title = lambda tag: log.SummaryMetadata(tag).display_name  # noqa: E731
    return {
        tag: [(event.step, title(tag), event.tensor_proto.string_val[0]) for event in log.Tensors(tag)]
        for tag in log.Tags()["tensors"]
    }


def test_values_have_the_metadata_of_the_audio_plugin(tmp_path):
    """TensorBoard's data server does not add metadata; without it, audio has no title and cannot be played."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.audio import metadata

    value = validation_audio.audio_value("validation/1", "今天天气很好。", [0, 5, -5], 16000)
    validation_audio.write_event(tmp_path, 20, [value])
    (path,) = tmp_path.iterdir()
    event = [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()][-1]
    (value,) = event.summary.value
    plugin = value.metadata.plugin_data
    assert event.step == 20 and value.metadata.display_name == "今天天气很好。" and plugin.plugin_name == "audio"
    assert metadata.parse_plugin_metadata(plugin.content).encoding == metadata.Encoding.Value("WAV")


def test_choice_of_texts_does_not_depend_on_the_order():
    rows = [{"gts": "好" * n, "output": str(n)} for n in (5, 1, 9, 3, 7, 2, 4)]
    chosen = [row["gts"] for row in validation_audio.choose(rows, 4)]
    assert chosen == [row["gts"] for row in validation_audio.choose(rows[::-1], 4)]
    assert [len(text) for text in chosen] == [1, 3, 5, 9]
    assert len(validation_audio.choose(rows[:2], 4)) == 2


def test_audio_of_two_steps_is_written_and_intelligible(reward_server, asr, test_rows, tmp_path):
    for step in (0, 20):
        dump = tmp_path / f"{step}.jsonl"
        write_jsonl(dump, dump_of(test_rows[:12], step))
        validation_audio.main(
            ["--dump", str(dump), "--server-url", reward_server.url, "--tensorboard-dir", str(tmp_path)]
        )
    audio = read_audio(tmp_path / "validation")
    assert sorted(audio) == [f"validation/{number}" for number in (1, 2, 3, 4)]
    texts, recordings = [], []
    for events in audio.values():
        assert [step for step, _, _ in events] == [0, 20]
        _, text, wav = events[1]
        with wave.open(io.BytesIO(wav)) as file:
            assert file.getframerate() == 16000 and file.getsampwidth() == 2
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
        texts.append(text)
        recordings.append(samples)
    assert set(texts) < {row["text"] for row in test_rows[:12]}
    assert pinyin_error_rate(texts, asr.transcribe(recordings), tones=False) < 0.2
    assert pinyin_error_rate(texts, asr.transcribe(recordings[::-1]), tones=False) > 0.7


def test_rollouts_without_valid_speech_tokens_are_skipped(reward_server, test_rows, tmp_path):
    rows = dump_of(sorted(test_rows[:4], key=lambda row: (len(row["text"]), row["text"])))
    rows[0]["output"], rows[1]["output"] = "nothing", "<|s_7000|>"
    write_jsonl(tmp_path / "0.jsonl", rows)
    flags = ["--dump", str(tmp_path / "0.jsonl"), "--server-url", reward_server.url, "--tensorboard-dir", str(tmp_path)]
    validation_audio.main(flags)
    assert sorted(read_audio(tmp_path / "validation")) == ["validation/3", "validation/4"]
    write_jsonl(tmp_path / "0.jsonl", rows[:2])
    with pytest.raises(SystemExit, match="no rollout with valid speech tokens"):
        validation_audio.main(flags)


def wrapped(tmp_path, url: str, dump, status: int = 0) -> int:
    """Run scripts/train.py with a command that writes a validation dump, like the trainer does."""
    validations = tmp_path / "validation"
    validations.mkdir(exist_ok=True)
    (validations / "0.jsonl").write_text("written before the run, must not be read")
    flags = ["--log-file", str(tmp_path / "log"), "--total-steps", "9", "--failure-file", str(tmp_path / "failure"),
             "--server-url", url, "--tensorboard-dir", str(tmp_path / "tensorboard"),
             "--validation-dir", str(validations)]  # fmt: skip
    code = f"import os; os.replace({str(dump)!r}, {str(validations / dump.name)!r}); raise SystemExit({status})"
    return train.main([*flags, "--", sys.executable, "-c", code])


def test_training_writes_audio_of_each_dump(reward_server, test_rows, tmp_path, capfd):
    write_jsonl(tmp_path / "20.jsonl", dump_of(test_rows[:4]))
    assert wrapped(tmp_path, reward_server.url, tmp_path / "20.jsonl") == 0
    assert len(read_audio(tmp_path / "tensorboard/validation")) == 4 and "no audio of" not in capfd.readouterr().out


def test_audio_is_written_again_for_a_rewritten_dump(reward_server, test_rows, tmp_path):
    """A resumed training repeats the validation of its checkpoint."""
    write_jsonl(tmp_path / "0.jsonl", dump_of(test_rows[:4], 0))
    assert wrapped(tmp_path, reward_server.url, tmp_path / "0.jsonl") == 0
    assert len(read_audio(tmp_path / "tensorboard/validation")) == 4


def test_failure_is_reported_and_does_not_stop_the_training(test_rows, tmp_path, capfd):
    unreachable = f"http://127.0.0.1:{free_ports(1)[0]}"
    for status in (0, 3):
        write_jsonl(tmp_path / "20.jsonl", dump_of(test_rows[:4]))
        assert wrapped(tmp_path, unreachable, tmp_path / "20.jsonl", status) == status
        assert "no audio of" in (shown := capfd.readouterr().out)
        assert status or "did not return speech" in shown
    assert not (tmp_path / "tensorboard").exists()
