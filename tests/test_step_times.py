"""Tests of the table of step times from veRL's console log."""

import pytest

from tools.step_times import main


def line(step: int, **values) -> str:
    return f"(TaskRunner pid=1) step:{step} - " + " - ".join(f"{k.replace('__', '/')}:{v}" for k, v in values.items())


def log_of(tmp_path, *lines: str):
    path = tmp_path / "train.log"
    path.write_text("\n".join(["noise", *lines, "step: none"]), encoding="utf-8")
    return str(path)


def test_table_of_medians(tmp_path, capsys):
    lines = [line(1, timing_s__step=90.0, timing_s__generation=60.0)]  # warm-up
    for step, wait, save in ((2, 1.0, ""), (3, 3.0, " - timing_s/save_checkpoint:8.0"), (4, 2.0, "")):
        values = {"timing_s__generation": 4.0, "timing_s__reward_wait": wait, "timing_s__update_actor": 10.0}
        text = line(step, timing_s__step=20.0 + 8 * bool(save), **values, response_length__mean="np.float64(100.0)")
        lines.append(text + save)
    main(["--log-file", log_of(tmp_path, *lines), "--skip", "1"])
    shown = capsys.readouterr().out
    rows = {
        row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:4]] for row in shown.splitlines() if "|" in row
    }
    assert rows["step, without saving"] == ["20.00", "100.0%"]
    assert rows["waiting for rewards"] == ["2.00", "10.0%"]
    assert rows["update"] == ["10.00", "50.0%"]
    assert rows["saving a checkpoint"][0] == "8.00"
    assert "3 steps (2 to 4)" in shown and "100.0 tokens per rollout" in shown


def test_a_log_without_steps_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no step"):
        main(["--log-file", log_of(tmp_path, line(1, timing_s__step=1.0)), "--skip", "1"])
