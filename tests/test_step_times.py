"""Tests of the table of step times from veRL's console log, and of the benchmark by number of GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from tools import bench_training
from tools.step_times import main
from tts_grpo.evaluation.processes import processes_with
from tts_grpo.text.jsonl import write_json


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


def training_args(tmp_path, *more):
    models = tmp_path / "models"
    return bench_training.get_args(["--models", str(models), "--exp-dir", str(tmp_path / "exp"), *more])


def write_log(args, run, steps):
    log = args.exp_dir / f"{args.model}-{run.name}" / "log/train.log"
    log.parent.mkdir(parents=True)
    text = "step:{} - actor/perf/max_memory_allocated_gb:{} - timing_s/generation:2 - timing_s/step:{}\n"
    log.write_text("".join(text.format(n, 30 + n, seconds) for n, seconds in enumerate(steps, 1)))
    write_json(log.parent.parent / "finished.json", {"run_s": 300})


def test_runs_of_both_scalings_share_their_base(tmp_path):
    runs = bench_training.planned(training_args(tmp_path, "--gpus", "4", "1", "--prompts", "32"))
    assert [(run.gpus, run.prompts, run.kinds) for run in runs] == [
        (1, 32, ("strong", "weak")), (4, 32, ("strong",)), (4, 128, ("weak",)),
    ]  # fmt: skip


def test_settings_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("prompt_text", "早")
    monkeypatch.setenv("rollout_n", "4")
    args = training_args(tmp_path, "--gpus", "2", "--separate-servers")
    found = bench_training.variables(args, bench_training.planned(args)[0], tmp_path / "run")
    assert found["server_devices"] == "cuda:2 cuda:3" and found["num_gpus"] == "2" and found["train_batch_size"] == "32"
    assert args.output != training_args(tmp_path, "--gpus", "2").output
    assert "prompt_text" not in found  # the environment's is used
    assert found["rollout_n"] == "8"  # by which rollouts are counted
    settings = (bench_training.ROOT / "conf/settings.sh").read_text("utf-8")
    assert not [name for name in found if name != "profile" and f"setting {name} " not in settings]


def test_efficiency_of_scaling(tmp_path, capsys, monkeypatch):
    checked = []
    monkeypatch.setattr(bench_training, "start", lambda args, environment, *_: checked.append(environment["exp_name"]))
    monkeypatch.setattr(bench_training, "finish", lambda *_: None)
    args = training_args(tmp_path, "--gpus", "1", "2", "--output", str(tmp_path / "figures.json"))
    strong_base, strong, weak = bench_training.planned(args)
    write_log(args, strong_base, [90, 90, 5, 6, 7])  # the first two steps compile
    write_log(args, strong, [90, 90, 4])
    write_log(args, weak, [90, 90, 8])
    bench_training.main(["--models", str(tmp_path), "--gpus", "1", "2", "--exp-dir", str(args.exp_dir),
                         "--output", str(args.output)])  # fmt: skip
    rows = json.loads(args.output.read_text())["figures"]["runs"]
    assert [row["step_s"] for row in rows] == [6, 4, 8] and rows[2]["rollouts_per_s"] == 64
    assert [row["efficiency"] for row in rows] == [{"strong": 1.0, "weak": 1.0}, {"strong": 0.75}, {"weak": 0.75}]
    assert rows[0]["peak_trainer_gib"] == 35 and rows[0]["seconds"]["sleep, poll and the rest"] == 4
    assert checked == ["cosyvoice2-1x32", "cosyvoice2-2x32", "cosyvoice2-2x64"]  # run.sh refuses other settings
    assert rows[0]["run_s"] == 300
    assert "| 2 | 64 |" in capsys.readouterr().out


def test_a_failed_run_ends_the_benchmark(tmp_path):
    process = subprocess.Popen(["sh", "-c", "echo a message; exit 3"], stdout=(tmp_path / "log").open("w"))
    with pytest.raises(SystemExit, match=r"(?s)a message.*the run failed \(3\)"):
        bench_training.finish(process, tmp_path / "log")


def test_an_interrupted_benchmark_stops_its_run(tmp_path, monkeypatch):
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    wait, calls = process.wait, []

    def interrupted_once():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(10)

    monkeypatch.setattr(process, "wait", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        bench_training.finish(process, tmp_path / "log")
    assert process.poll() == -signal.SIGTERM


def test_kill_all_ends_processes_of_other_groups(tmp_path):
    environment = os.environ | {"TTS_GRPO_EXP_DIR": str(tmp_path)}
    run, daemon = (subprocess.Popen(["sleep", "100"], start_new_session=True, env=environment) for _ in range(2))
    while len(list(processes_with("TTS_GRPO_EXP_DIR", str(tmp_path)))) < 2:
        time.sleep(0.01)  # the kernel shows an environment only a moment after the program has started
    assert bench_training.kill_all(run, tmp_path) == 2
    assert daemon.wait() == -signal.SIGKILL


def test_a_crash_is_the_last_run_and_its_figures_are_kept(tmp_path, monkeypatch):
    args = training_args(tmp_path, "--crash", "--gpus", "1", "2")
    *others, run = bench_training.planned(args)
    assert run.name == "2x64-crash" and not any(other.crash for other in others)
    log = args.exp_dir / "cosyvoice2-2x64-crash/log/train.log"
    log.parent.mkdir(parents=True)
    log.write_text("step:8 - a:1\n")  # of an interrupted call
    started = []

    def start(args, environment, stop, output):
        started.append((stop, environment["save_freq"]))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:  # the first two steps of each start are slower
            for n in range(1, 9) if stop == 2 else range(7, 13):
                file.write(f"step:{n} - timing_s/step:{90 if n in (1, 2) or (stop == 3 and n in (7, 8)) else n}\n")
        return types.SimpleNamespace(poll=lambda: None)

    monkeypatch.setattr(bench_training, "start", start)
    monkeypatch.setattr(bench_training, "finish", lambda *_: None)
    monkeypatch.setattr(bench_training, "kill_all", lambda *_: len(log.read_text().splitlines()))
    model = types.SimpleNamespace(num_parameters=lambda: 3)
    fake = types.SimpleNamespace(AutoModelForCausalLM=types.SimpleNamespace(from_pretrained=lambda path: model))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    found = bench_training.measure(args, run)
    assert found["crash"] == {"saved_after": 6, "killed_after": 8, "processes_killed": 8,
                              "steps_after_resuming": [*range(7, 13)], "merged_parameters": 3}  # fmt: skip
    assert found["step_s"] == 7.5 == (6 + 9) / 2  # steps 3 to 6 and 9 to 12
    assert bench_training.measure(args, run) == found and started == [(2, "6"), (3, "6"), (3, "6")]
