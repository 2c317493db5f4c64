import os
import sys
import time

import pytest

from scripts import train
from tts_grpo.training.verl_log import parse_step

pytestmark = pytest.mark.slow

STEP = (
    "(TaskRunnerV1 pid=1) step:3 - actor/entropy_loss:2.5 - critic/score/mean:0.8125 - response_length/mean:51.4 - "
    "val-aux/text-to-speech/score/mean@1:np.float64(0.7) - val-aux/x/pinyin_error_rate/mean@1:np.float64(0.05)"
)


def run(tmp_path, code: str):
    command = ["--log-file", str(tmp_path / "log"), "--total-steps", "9", "--failure-file", str(tmp_path / "failure")]
    return train.main([*command, "--", sys.executable, "-c", code])


def test_one_line_per_step(tmp_path, capsys):
    assert run(tmp_path, f"print('noise'); print({STEP!r})") == 0
    shown = capsys.readouterr().out
    assert "step 3/9: reward 0.812, 51 tokens, entropy 2.50" in shown and "noise" not in shown
    assert "validation after step 3: reward 0.700, error rate 5.00%" in shown
    assert "noise" in (tmp_path / "log").read_text()


def test_status_and_last_lines_of_a_failure(tmp_path, capsys):
    assert run(tmp_path, "print('what broke'); raise SystemExit(7)") == 7
    assert "what broke" in capsys.readouterr().err


def test_a_failed_reward_ends_the_training(tmp_path, capsys):
    start = time.monotonic()
    path = str(tmp_path / "failure")
    assert run(tmp_path, f"open({path!r}, 'w').write('no reward server'); import time; time.sleep(60)") != 0
    assert time.monotonic() - start < 30
    assert "training failed: no reward server" in capsys.readouterr().err


def test_a_failure_just_before_the_end_counts(tmp_path, capsys):
    """The command ends with status 0 before the failure file is polled."""
    assert run(tmp_path, f"open({str(tmp_path / 'failure')!r}, 'w').write('no reward server')") == 1
    assert "training failed: no reward server" in capsys.readouterr().err


def test_status_0_before_the_last_step_is_a_failure(tmp_path, capsys):
    """For example, an override ends the training at an epoch's end, or a resumed training finds no data."""
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for saved, status in (("8", 1), ("9", 0), ("", 1), (None, 1)):
        tracker.unlink(missing_ok=True)
        code = "pass" if saved is None else f"open({str(tracker)!r}, 'w').write({saved!r})"
        flags = ["--log-file", str(tmp_path / "log"), "--total-steps", "9", "--failure-file", str(tmp_path / "failure")]
        flags += ["--checkpoint-dir", str(tmp_path)]
        assert train.main([*flags, "--", sys.executable, "-c", code]) == status, saved
        said = f"training failed: veRL ended with status 0, but its newest checkpoint is of step {saved or 0} of 9"
        assert (said in capsys.readouterr().err) == bool(status)


def test_an_old_failure_does_not_count(tmp_path):
    (tmp_path / "failure").write_text("from the last run")
    assert run(tmp_path, "import time; time.sleep(1.5)") == 0


ODD = [
    b"\xff\xfe\x80 no UTF-8 \xe4\xbb",
    b"a NUL \0 and a bell \a",
    "好".encode() * 100_000,
    b"x" * 1_000_000,
    b"step:3 - " + b"a/b" * 200_000,
    b"step:" + b"9" * 10_000 + b" - critic/score/mean:0.5",
    b"step:4 - verl/version:0.9.1 - critic/score/mean:1.2.3 - a:... - b:nan - :1 - c:",
    "step:\N{ARABIC-INDIC DIGIT THREE} - critic/score/mean:0.5".encode(),
]


def test_any_byte_is_logged(tmp_path, capfd):
    """A progress bar ends with a carriage return, and a step's line may follow it."""
    output = b"\n".join(ODD) + b"\nTraining Progress: 3%|\r" + STEP.encode() + b"\rno end \xe4\xbb"
    (tmp_path / "output").write_bytes(output)
    copy = f"import sys; sys.stdout.buffer.write(open({str(tmp_path / 'output')!r}, 'rb').read())"
    start = time.monotonic()
    assert run(tmp_path, f"{copy}; raise SystemExit(5)") == 5
    assert time.monotonic() - start < 20
    assert (tmp_path / "log").read_bytes() == output
    shown = capfd.readouterr()
    assert "step 3/9: reward 0.812" in shown.out and "step 4/9" not in shown.out
    assert "no end \N{REPLACEMENT CHARACTER}" in shown.err and "\0" not in shown.err and "\a" not in shown.err


def test_other_log_formats_affect_the_display_only(tmp_path, capsys):
    lines = [STEP.replace("step:3 - ", "iteration 3 | "), "ERROR Error in _run_prompt for uid=1", "Dumped to 3.jsonl"]
    assert run(tmp_path, f"print({chr(10).join(lines)!r})") == 0
    assert "reward" not in capsys.readouterr().out


def test_output_is_shown_before_its_line_ends(tmp_path):
    """Incomplete lines, such as a progress bar or a prompt that blocks the program, are written to the log at once."""
    log = str(tmp_path / "log")
    code = f"print('50%', end='', flush=True); import time; time.sleep(1); assert '50%' in open({log!r}).read()"
    assert run(tmp_path, code) == 0


def test_the_training_is_stopped_if_the_log_cannot_be_written(tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    pid_file = tmp_path / "pid"
    code = (
        f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); print('x', flush=True); time.sleep(60)"
    )
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, code)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_metrics_of_a_line():
    step, values = parse_step(
        "(x pid=1) step:12 - a/b:1e-3 - c:np.int64(7) - time:x:2.5 - d:-0.25 - e:tensor(1) - f:1.2.3"
    )
    assert step == 12 and values == {"a/b": 1e-3, "c": 7.0, "time:x": 2.5, "d": -0.25}
    assert parse_step("no step: 3 - a:1") is None
