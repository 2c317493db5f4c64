"""Tests of tools/repeat.py with a run.sh that trains nothing, and scores that are given."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tools import repeat
from tts_grpo.text.jsonl import write_jsonl

# Stage 4 as run.sh prints it, and stages 0 to 3. A run whose number is in the file "kill" kills the calling program.
RUN_SH = r"""
set -eu
if [[ $1 == --dry-run ]]; then
  echo "bash $PWD/infer_dist.py --llm-path x --temperature $temperature --output-dir y --seeds 0 1 --batch-size 5"
  echo "env bash $PWD/compute_wer.sh y $eval_jsonl"
  exit
fi
echo "train $(basename "$exp_dir") ${credit-} $seed" >>calls
if [[ -f pairs ]]; then # of two runs at a time, each waits for the other
  echo "$(basename "$exp_dir") $http_port $grpc_port $metrics_port $server_urls $(nproc)" >>pairs
  line=$(grep -n "^$(basename "$exp_dir") " pairs | cut -d : -f 1)
  until (($(wc -l <pairs) >= (line + 1) / 2 * 2)); do sleep 0.05; done
fi
[[ ! -f kill || $(<kill) != "$(basename "$exp_dir")" ]] || { rm kill && kill -9 "$PPID" && sleep 300; }
[[ ! -f fail ]] || { echo "no reward server" && exit 1; }
mkdir -p "$exp_dir/sft_model" "$exp_dir/merged_hf_model" "$exp_dir/.done"
printf '{}\ncommit %s\n' "abc$seed" >"$exp_dir/.done/2"
echo '{"stage": 2, "seconds": 41}' >"$exp_dir/stage_seconds.jsonl"
"""
COMPUTE_WER_SH = r"""echo "evaluate $1" >>calls
cp -r "given/$(basename "$2" .jsonl)/$(basename "$1")/." "$1"
"""
RATES = {"sft": 0.2, "default": 0.1, "worse": 0.2}  # expected errors per unit


def give_scores(root, set_name, number_of, name, rng):
    """Scores of a model on a set of 60 texts of 10 syllables, for two evaluation seeds."""
    rate = RATES[name.split("-")[0]]
    for seed in (0, 1):
        rows = [{
            "id": f"u{i}", "error": None, "quality": {"speech_rate": 4.0 + 0.01 * i},
            "errors": {repeat.METRICS[0]: {"substitutions": int(n), "deletions": 0, "insertions": 0, "length": 10}},
        } for i, n in enumerate(rng.binomial(10, rate, number_of))]  # fmt: skip
        write_jsonl(root / f"given/{set_name}/{name}/seed_{seed}/utterances.jsonl", rows)
    (root / f"given/{set_name}/{name}/scores.json").write_text("{}")


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name, text in (
        ("run.sh", RUN_SH),
        ("infer_dist.py", 'echo "infer $*" >>calls\n'),
        ("compute_wer.sh", COMPUTE_WER_SH),
    ):
        (tmp_path / name).write_text(text)
    for set_name in ("hard", "test"):
        (tmp_path / f"{set_name}.jsonl").write_text("")
        for name in ("sft", *(f"{s}-{n}" for s in ("default", "worse") for n in (1, 2, 3))):
            give_scores(tmp_path, set_name, 60, name, rng)
    (tmp_path / "settings").write_text("# two settings\ndefault\nworse credit=utterance learning_rate='2e-4'\n")
    return tmp_path


def arguments(root, *more):
    sets = [str(root / "hard.jsonl"), str(root / "test.jsonl")]
    return [str(root / "settings"), "--root", str(root), "--seeds", "1", "2", "3", "--sets", *sets, *more]


def test_runs_are_trained_once_and_compared(root, capsys, monkeypatch):
    monkeypatch.setenv("total_steps", "7")
    monkeypatch.setenv("judge_asr_dir", "/a/judge")
    page = root / "page.md"
    page.write_text("Text\n\n<!-- table: repeat -->\n\n<!-- table: repeat runs -->\n| old |\n")
    repeat.main(arguments(root, "--page", str(page)))
    calls = (root / "calls").read_text().splitlines()
    assert [call for call in calls if call.startswith("train")] == [
        f"train {setting}-{seed} {credit} {seed}" for setting, credit in (("default", ""), ("worse", "utterance"))
        for seed in (1, 2, 3)
    ]  # fmt: skip
    assert sum(call.startswith("infer") for call in calls) == 14  # 6 runs and the SFT model, on two sets
    assert sum("sft_model" in call for call in calls) == 2 and all(
        "--temperature 1.0" in c for c in calls if "infer" in c
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "training 41 s" in line]
    assert len(lines) == 6 and "1/6 default, seed 1: SFT " in lines[0]

    recorded = json.loads((root / "exp/repeat/results.json").read_text("utf-8"))
    assert {"title", "date", "commit", "machine", "command", "conditions", "figures", "runs"} <= recorded.keys()
    assert "learning_rate=2e-4; for all: total_steps=7; seeds 1 2 3; " in recorded["conditions"]
    primary, *others = recorded["figures"]
    assert primary["primary"] and not any(figure["primary"] for figure in others)
    assert (primary["set"], primary["before"], primary["after"]) == ("hard", "sft", "default")
    assert primary["relative_change_percent"] == pytest.approx(-50, abs=8) and primary["conclusion"] == "better"
    low, high = primary["ci95"]
    assert low < -50 < high < -20 and len(primary["rates_after"]) == 3 and primary["p_holm"] == primary["p"]
    assert len(others) == 5 and all(figure["p_holm"] >= figure["p"] for figure in others)
    verdicts = {(f["set"], f["before"], f["after"]): f["conclusion"] for f in others}
    assert (
        verdicts["hard", "sft", "worse"] == "not significant (95%)" and verdicts["test", "default", "worse"] == "worse"
    )
    assert [run["commit"] for run in recorded["runs"]] == ["abc1", "abc2", "abc3"] * 2
    assert recorded["runs"][0]["quality"]["hard-temperature=1.0"]["speech_rate"]["difference"] == 0
    made = repeat.tables(recorded, "repeat")
    assert page.read_text() == "Text\n\n" + "\n\n".join(
        "\n".join([f"<!-- table: {name} -->", *lines]) for name, lines in made.items()
    ) + "\n"  # fmt: skip

    (root / "calls").unlink()
    repeat.main(arguments(root))
    assert not (root / "calls").exists(), "something was trained or evaluated again"


def test_jobs_run_at_a_time_with_cores_and_ports_of_their_own(root, capsys, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    (root / "pairs").write_text("")
    monkeypatch.setenv("http_port", "9000")
    repeat.main(arguments(root, "--jobs", "2"))
    each, found = len(cores) // 2, [line.split(" ", 1)[1] for line in (root / "pairs").read_text().splitlines()]
    jobs = [f"{port} {port + 1} {port + 2} http://127.0.0.1:{port} {each}" for port in (9000, 9010)]
    assert len(found) == 6 and all(sorted(found[i : i + 2]) == jobs for i in (0, 2, 4))
    lines = [line for line in capsys.readouterr().out.splitlines() if "training 41 s" in line]
    assert len(lines) == 6 and sum("SFT " in line for line in lines) == 1
    assert sorted(os.sched_getaffinity(0)) == cores
    together = json.loads((root / "exp/repeat/results.json").read_text("utf-8"))["figures"]
    (root / "pairs").unlink()
    repeat.main(arguments(root, "--name", "alone"))
    assert json.loads((root / "exp/alone/results.json").read_text("utf-8"))["figures"] == together


def test_no_run_begins_after_a_failed_one(root):
    (root / "fail").write_text("")
    with pytest.raises(SystemExit, match="no reward server"):
        repeat.main(arguments(root, "--jobs", "2"))
    assert len((root / "calls").read_text().splitlines()) in (2, 3)  # a third can begin while the first one fails
    with pytest.raises(SystemExit, match="--jobs 9999: at least 1, and at most"):
        repeat.main(arguments(root, "--jobs", "9999"))


def test_english_sets_and_failed_audio(root):
    """An English set has no pinyin error rate, and a model that fails to speak more often is never called better."""
    for path in (root / "given").glob("*/*/seed_*/utterances.jsonl"):
        text = path.read_text("utf-8").replace(repeat.METRICS[0], "spoken")
        if "hard/default-2" in str(path):
            text = text.replace('"error": null', '"error": "no speech tokens"', 1)
        path.write_text(text, "utf-8")
    repeat.main(arguments(root))
    recorded = json.loads((root / "exp/repeat/results.json").read_text("utf-8"))
    verdicts = {(f["set"], f["before"], f["after"]): f["conclusion"] for f in recorded["figures"]}
    assert verdicts["hard", "sft", "default"] == "inconclusive: more audio failed"
    assert verdicts["test", "sft", "default"] == "better"


def test_a_killed_command_continues(root):
    (root / "kill").write_text("worse-2")
    command = [sys.executable, str(ROOT / "tools/repeat.py"), *arguments(root)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == -signal.SIGKILL
    left = subprocess.run(["pgrep", "-x", "sleep"], capture_output=True, text=True).stdout.split()
    mark, marked = f"TTS_GRPO_REPEAT={root / 'exp/repeat'}\0", []
    for pid in left:
        with contextlib.suppress(OSError):  # another program's has ended meanwhile
            marked += [pid] if mark in Path(f"/proc/{pid}/environ").read_text() else []
    (left,) = marked
    before = (root / "calls").read_text().splitlines()
    assert before[-1] == "train worse-2 utterance 2"
    repeat.main(arguments(root))
    after = (root / "calls").read_text().splitlines()[len(before) :]
    assert [call for call in after if call.startswith("train")] == [f"train worse-{n} utterance {n}" for n in (2, 3)]
    assert not any("sft" in call or "default" in call for call in after)
    with contextlib.suppress(OSError):
        assert not Path(f"/proc/{left}/cmdline").read_text(), "a process of the killed call goes on"  # "": a zombie


def test_a_second_call_does_not_disturb_the_first(root):
    args = repeat.get_args(arguments(root))
    with repeat.only_one(args.folder), pytest.raises(SystemExit, match="another call works on"):
        repeat.main(arguments(root))


def test_a_run_does_not_count_twice_and_samplings_have_an_effect(root):
    with pytest.raises(SystemExit, match="a training seed is named twice"):
        repeat.main([*arguments(root), "--seeds", "1", "2", "1"])
    with pytest.raises(SystemExit, match="temprature is no variable of sampling"):
        repeat.main([*arguments(root), "--samplings", "temprature=0"])
    assert not (root / "calls").exists()


def test_failures_stop_the_command(root, monkeypatch):
    (root / "fail").write_text("")
    with pytest.raises(
        SystemExit, match=r"(?s)no reward server\n.*training default-1 failed \(1\), see .*default-1.log"
    ):
        repeat.main(arguments(root))
    (root / "fail").unlink()
    repeat.main(arguments(root))
    (root / "settings").write_text("default credit=utterance\n")
    with pytest.raises(SystemExit, match="default-1 was trained with other variables"):
        repeat.main(arguments(root))
    (root / "settings").write_text("default\n")
    monkeypatch.setenv("total_steps", "7")
    with pytest.raises(SystemExit, match=r"trained with other variables \(environment: {}, now {'total_steps': '7'}\)"):
        repeat.main(arguments(root))
    monkeypatch.delenv("total_steps")
    with pytest.raises(SystemExit, match="was evaluated with other settings"):
        write_jsonl(root / "exp/repeat/eval/hard-temperature=1.0/sft/commands.json", [[]])
        repeat.main(arguments(root))


def test_an_evaluation_of_another_set_or_model_is_not_used(tmp_path):
    model, test_set = tmp_path / "model/model.safetensors", tmp_path / "hard.jsonl"
    model.parent.mkdir()
    model.write_text("weights")
    test_set.write_text("texts")
    sha256 = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (model, test_set)}
    (tmp_path / "scores.json").write_text(json.dumps({"eval_set_sha256": sha256[test_set]}))
    (tmp_path / "settings.json").write_text(json.dumps({"llm": {model.name: sha256[model]}}))
    given = (tmp_path, test_set, model.parent)
    assert repeat.outdated(*given) == ""
    for path, named in ((model, model.parent), (test_set, test_set)):
        repeat.checksum.cache_clear()
        path.write_text("others")
        assert repeat.outdated(*given) == str(named)
    model.unlink()  # deleted to save disk space
    test_set.write_text("texts")
    repeat.checksum.cache_clear()
    assert repeat.outdated(*given) == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("default seed=3", "seed cannot be set per setting"),
        ("default llm_text=spoken", "llm_text cannot be set per setting, because the evaluation"),
        ("default repetition_window=10", "repetition_window cannot be set per setting"),
        ("default llm_pt=llm.rl.pt", "llm_pt cannot be set per setting"),
        ("default learning_rat=1e-6", "run.sh has no variable learning_rat"),
        ("default credit", "'credit' is not of the form variable=value"),
        ("sft", "'sft' is not a new name"),
        ("# nothing", "has no setting"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    (tmp_path / "settings").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        repeat.read_settings(tmp_path / "settings")


@pytest.mark.parametrize("path", sorted((ROOT / "conf/repeats").glob("*.txt")), ids=lambda path: path.stem)
def test_the_settings_in_conf_are_accepted_by_run_sh(path):
    for name, variables in repeat.read_settings(path).items():
        done = subprocess.run(
            ["bash", "run.sh", "--settings"], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
        )
        assert done.returncode == 0, (name, done.stderr)


def test_the_commands_are_those_of_stage_4():
    infer, score = repeat.stage_4_commands(
        ROOT, {"eval_jsonl": str(ROOT / "assets/tiny/data/hard.jsonl"), "seeds": "7"}
    )
    assert infer[infer.index("--seeds") + 1] == "7" and "--llm-path" in infer and "--output-dir" in infer
    assert score[-1].endswith("hard.jsonl") and infer[infer.index("--eval-set") + 1] == score[-1]
