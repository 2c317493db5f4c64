import sys
import time

import pytest

from scripts import train

STEP = (
    "(TaskRunnerV1 pid=1) step:3 - actor/entropy_loss:2.5 - critic/score/mean:0.8125 - response_length/mean:51.4 - "
    "val-aux/text-to-speech/score/mean@1:np.float64(0.7) - val-aux/x/pinyin_error_rate/mean@1:np.float64(0.05)"
)


def run(tmp_path, code: str):
    command = ["--log-file", str(tmp_path / "log"), "--total-steps", "9", "--failure-file", str(tmp_path / "failure")]
    return train.main([*command, "--", sys.executable, "-c", code])


def test_a_line_a_step(tmp_path, capsys):
    assert run(tmp_path, f"print('noise'); print({STEP!r})") == 0
    shown = capsys.readouterr().out
    assert "step 3/9: reward 0.812, 51 tokens, entropy 2.50" in shown and "noise" not in shown
    assert "validation after step 3: reward 0.700, pinyin error rate 5.00%" in shown
    assert "noise" in (tmp_path / "log").read_text()


def test_status_and_last_lines_of_a_failure(tmp_path, capsys):
    assert run(tmp_path, "print('what broke'); raise SystemExit(7)") == 7
    assert "what broke" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code",
    [
        "open({path!r}, 'w').write('no reward server')",
        "print('ERROR Error in _run_prompt for uid=1: no reward server', flush=True)",
    ],
)
def test_a_failed_reward_ends_the_training(tmp_path, capsys, code):
    start = time.monotonic()
    status = run(tmp_path, code.format(path=str(tmp_path / "failure")) + "\nimport time; time.sleep(60)")
    assert status != 0 and time.monotonic() - start < 30
    assert "no reward server" in capsys.readouterr().err


def test_an_old_failure_does_not_count(tmp_path):
    (tmp_path / "failure").write_text("from the last run")
    assert run(tmp_path, "import time; time.sleep(1.5)") == 0
