import pytest

from tools import select_checkpoint
from tts_grpo.evaluation.aggregate import quality, rates
from tts_grpo.evaluation.protocols import METRICS
from tts_grpo.text.jsonl import write_json, write_jsonl

NUM_UTTERANCES = 40
GOOD = {"dnsmos_ovrl": 3.0, "speech_rate": 4.0, "eos_share": 1.0}


@pytest.fixture
def system(tmp_path):
    """Makes scored folders: ``system(name, errors per 10 units, failed utterances, **changed metrics)``."""

    def make(name, errors, failed=0, sha="a", **metrics):
        rows = []
        for i in range(NUM_UTTERANCES):
            counts = {"substitutions": errors, "deletions": 0, "insertions": 0, "length": 10}
            values = {n: v + 0.01 * (i % 3) for n, v in (GOOD | metrics).items() if v is not None}
            rows.append({"id": str(i), "error": "lost" if i < failed else None,
                         "errors": dict.fromkeys(METRICS["zh"], counts), "quality": values})  # fmt: skip
        write_jsonl(tmp_path / name / "seed_0/utterances.jsonl", rows)
        write_json(tmp_path / name / "scores.json", {
            "language": "zh", "eval_set_sha256": sha, "asr_sha256": "b", "metrics": dict.fromkeys(METRICS["zh"]),
            "pooled": rates(rows, "zh"), "quality": quality(rows), "seeds": {"0": {"failed": failed}},
        })  # fmt: skip
        return tmp_path / name

    return make


def choose(folders, *changes):
    return select_checkpoint.choose(folders, None, select_checkpoint.read_limits(list(changes)))


def test_chooses_lowest_error_rate_without_quality_loss(system):
    folders = [
        system("sft", 5), system("noisy", 1, dnsmos_ovrl=2.7), system("fast", 1, speech_rate=4.6),
        system("good", 3, dnsmos_ovrl=2.95, speech_rate=4.2), system("better_mos", 4, dnsmos_ovrl=3.5),
        system("slow", 1, speech_rate=3.5),
        system("unended", 1, eos_share=0.9), system("lost", 1, failed=2), system("unmeasured", 1, dnsmos_ovrl=None),
    ]  # fmt: skip
    best, table = choose(folders)
    assert best.name == "good"
    reasons = {line.split()[1].rsplit("/", 1)[1]: line for line in table.splitlines()[1:-1]}
    assert "refused: dnsmos_ovrl 3.010 -> 2.710 (limit 0.1)" in reasons["noisy"]
    assert "refused: speech_rate 4.010 -> 4.610 (limit 10%)" in reasons["fast"]
    assert "refused: speech_rate 4.010 -> 3.510 (limit 10%)" in reasons["slow"]
    assert "refused: eos_share" in reasons["unended"]
    assert "refused: 2 utterances without usable audio" in reasons["lost"]
    assert "refused: dnsmos_ovrl was not measured" in reasons["unmeasured"]
    assert "chosen" in reasons["good"] and "refused" not in reasons["better_mos"]
    assert "not checked: clipped_share, f0_std_semitones" in table


def test_limits_can_be_changed(system):
    folders = [system("sft", 5), system("noisy", 1, dnsmos_ovrl=2.7)]
    assert choose(folders)[0].name == "sft"
    assert choose(folders, "dnsmos_ovrl=0.5")[0].name == choose(folders, "dnsmos_ovrl=off")[0].name == "noisy"
    with pytest.raises(ValueError, match="expected METRIC=VALUE"):
        select_checkpoint.read_limits(["dnsmos=1"])


def test_baseline_is_chosen_if_none_is_better(system):
    best, table = choose([system("sft", 3), system("same", 3), system("worse", 4)])
    assert best.name == "sft" and "chosen (baseline)" in table


def test_differently_scored_folders_are_refused(system, tmp_path):
    with pytest.raises(ValueError, match="eval_set_sha256"):
        choose([system("sft", 5), system("other", 1, sha="c")])
    with pytest.raises(ValueError, match=r"compute_wer\.sh"):
        choose([tmp_path / "sft", tmp_path / "nothing"])


def test_last_line_is_the_chosen_folder(system, capsys):
    select_checkpoint.main([str(system("sft", 5)), str(system("step_20", 2))])
    assert capsys.readouterr().out.splitlines()[-1].endswith("step_20")
