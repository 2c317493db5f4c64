"""Tests of the trainer and the engine for veRL, in the trainer environment. test_training.py runs a whole training."""

import json
import os
import shlex
import subprocess

import numpy as np
import pytest

from tests.conftest import ROOT
from tts_grpo.training.verl_version import SUPPORTED, require_verl

pytestmark = pytest.mark.slow

MODULES = "tts_grpo.training.verl_cpu.platform,tts_grpo.training.trainer"  # as scripts/verl_cpu.sh has them


@pytest.fixture(scope="module")
def found(trainer_python, tmp_path_factory) -> dict:
    """Results of tests/verl_checks.py by name."""
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": MODULES, "VERL_PLATFORM": "cpu", "PYTHONPATH": str(ROOT)}
    command = [trainer_python, "tests/verl_checks.py", str(tmp_path_factory.mktemp("checks"))]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("settings", "modules"),
    [
        ({"profile": "tiny"}, [f"VERL_USE_EXTERNAL_MODULES={MODULES}"]),
        ({"profile": "cosyvoice2", "train_device": "cpu"}, [f"VERL_USE_EXTERNAL_MODULES={MODULES}"]),
        (
            {
                "profile": "cosyvoice2",
                "ray_address": "head:6379",
            },  # processes on other machines do not inherit this environment
            [
                "VERL_USE_EXTERNAL_MODULES=tts_grpo.training.trainer",
                "VERL_USE_EXTERNAL_MODULES: tts_grpo.training.trainer",
            ],
        ),
    ],
)
def test_run_sh_passes_modules_and_trainer_mode_to_verl(settings, modules, tmp_path):
    environment = os.environ | {"exp_dir": str(tmp_path / "exp"), "workspace": str(tmp_path)} | settings
    command = ["bash", str(ROOT / "run.sh"), "--dry-run", "2", "2"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    (words,) = (words for line in run.stdout.splitlines() if "verl.trainer.main_ppo" in (words := shlex.split(line)))
    assert "trainer.v1.trainer_mode=tts_grpo" in words
    assert modules[0] in words and all(any(module in word for word in words) for module in modules)


def test_verl_finds_the_trainer_and_its_own_classes_are_unchanged(found):
    assert found["patched"] == {}
    assert found["constructed"] == ["PPOTrainerSync", "ReplayBuffer", "sync", 0.1]


def test_settings_that_credit_would_override_are_refused_by_name(found):
    assert len(found["refused"]) == 5
    for name, error in found["refused"].items():
        assert f"credit=syllable would override {name}:" in error and "Set credit=utterance" in error
    assert found["not_refused"] == ["", ""]


def test_advantages_are_written_back_group_by_group(found):
    returned, advantages, metrics = found["advantages"]
    assert returned == "batch after writing"
    assert advantages == [[0.0, 0.0, 0.25], [0.0, 0.0, 0.0], [0.0, 0.0, -0.25, -0.25], [0.0, 0.0, 0.0]]
    assert metrics == {
        "critic/advantages/nonzero": pytest.approx(3 / 13), "critic/advantages/mismatched": 0.0,
    }  # fmt: skip
    assert "1 of 2 rollouts has no syllable_losses" in found["missing_errors"]
    assert "credit=utterance" in found["missing_errors"]


def test_each_algorithm_reaches_veRLs_loss_and_reward_manager(found):
    clipped, seq_clipped = [-1.2, -1, -1, 0.9], [-1.0004, 0.9997]
    expected = {
        "grpo": [sum(clipped) / 4, None],
        "dr_grpo": [sum(clipped) / 2 / 160, None],
        "dapo": [(sum(clipped) - 0.05) / 4, [160, 32]],  # 1.25 is below 1 + clip_ratio_high
        "gspo": [sum(seq_clipped) / 2, None],
        "gdpo": [sum(clipped) / 4, None],
    }
    assert found["algorithms"] == {
        name: [pytest.approx(loss, abs=1e-6), overlong] for name, (loss, overlong) in expected.items()
    }


def test_gdpo_normalises_each_part_of_the_reward_in_its_group(found):
    floored, incomplete, no_part, refused = found["gdpo"]

    def expected(words, pace):
        summed = np.zeros(4)
        for weight, part in ((1.0, words), (0.3, pace)):
            groups = np.reshape(part, (2, 2))  # rollouts 0 and 2 are of text a, 1 and 3 of text b
            normalised = (groups - groups.mean(0)) / (groups.std(0, ddof=1) + 1e-6)
            summed += weight * normalised.ravel()
        tokens = np.repeat(summed, (3, 3, 4, 3))
        return (tokens - tokens.mean()) / tokens.std(ddof=1)

    np.testing.assert_allclose(np.concatenate(floored), expected((1, 0, 0.5, 0.2), (0.2, 0, 0.4, 0.8)), atol=1e-5)
    np.testing.assert_allclose(np.concatenate(incomplete), expected((1, 0, 0.5, 0.2), (0.2, 0, 0.2, 0.8)), atol=1e-5)
    assert [len(row) for row in floored] == [3, 3, 4, 3]
    assert "the reward of 1 of 4 rollouts has no reward_parts/pace" in no_part
    assert "set kl_loss_coef instead" in refused


def test_reward_wait_starts_at_the_end_of_the_last_generation(found):
    # Generation ends at 4.0 s; the reward of the third rollout arrives at 5.25 s, that of the first at 4.5 s.
    assert found["seconds"] == [{"generation": 4.0, "reward_wait": 1.25}, {"generation": 1.0, "reward_wait": 9.0}]
    assert found["wait_for_rewards"] == {"step": 9.0, "generation": 2.0, "reward_wait": 1.5}


def test_statistics_of_the_parts_of_the_reward_are_logged(found):
    statistics, of_another_reward = found["part_statistics"]
    assert statistics == {
        "reward_parts/pace/mean": 0.75, "reward_parts/pace/std": 0.25, "reward_parts/pace/equal_groups": 1.0,
        "reward_parts/mine/mean": pytest.approx(0.4), "reward_parts/mine/std": pytest.approx(0.32660, abs=1e-4),
        "reward_parts/mine/equal_groups": 0.0, "reward_parts/mine/missing": 0.25,
    }  # fmt: skip
    assert of_another_reward == {}


def test_shares_of_rollouts_are_logged(found):
    shares, with_a_truncated_one, of_another_reward = found["shares"]
    assert shares == {
        "rollouts/bad_rollout": 0.5, "rollouts/unscored_rollout": 0.0, "rollouts/retried_rollout": 1.0,
        "rollouts/rescored_rollout": 0.0, "rollouts/empty_transcript": 0.5,
        "rollouts/other_tokens": (4 + 3) / 16,  # without the end tokens
    }  # fmt: skip
    assert with_a_truncated_one["rollouts/other_tokens"] == (4 + 4) / 16  # the second has no end token
    assert of_another_reward == {}


def test_servers_are_checked_again_during_the_training_and_a_wrong_one_stops_it(found):
    """After every second step, before each third one is saved, and after the last one."""
    asked, error, shown = found["checked_servers"]
    assert asked == [[step, f"http://{host}", 64] for step in (2, 3, 4, 6, 7) for host in "ab"]
    assert error.startswith("after step 7: right texts score 0.1") and shown == error + "\n"
    assert "No checkpoint was saved since the check passed last" in error


def test_rewards_of_a_server_with_other_models_stop_the_training_before_the_update(found):
    mixed_at_first, step, validation, other_step, other_validation, after = found["identities"]
    assert step == after == "batch after writing" and validation == {"reward": 1.0}
    for error in (mixed_at_first, other_step, other_validation):
        assert "compute other rewards than those with which this training began" in error


def test_a_failed_rollout_stops_the_training(found):
    failed, sampled = found["failed_rollout"]
    assert failed.startswith("1 of 2 prompts of this step have a failed rollout")
    assert sampled == ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    assert found["failed_validation"].startswith("RuntimeError: 1 of 2 rollouts of this validation failed")


def test_validation_dumps_are_written_atomically(found):
    files_during_writing, names, text = found["dump"]
    assert files_during_writing == [[]] and names == ["15.jsonl"] and json.loads(text)["gts"] == "text"


def test_only_a_head_with_a_bias_changes_the_log_probabilities(found):
    assert found["engines"] == "HeadBiasEngine"
    assert found["head_without_a_bias"] == [False, True]
    assert found["head_with_a_bias"] == ["the model", True]
    for name in ("unfused_head_with_a_bias", "other_kernel_with_a_bias"):
        assert "has a bias, which training would ignore" in found[name] and "impl_backend=torch" in found[name]


def test_weights_of_two_processes_reach_the_rollouts_without_a_transfer_for_each(found):
    """The sharded state dict, which checkpoints need, is in use again afterwards."""
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert found["weights_of_fsdp1"] == [[dict.fromkeys(names, True), 4, True]] * 2


def test_a_lora_adapter_is_added_to_the_weights_when_merging(found):
    relative, change, others, dtype, unknown_scale = found["lora_merge"]
    assert relative < 2**-7 and change > 0.01 and others == [] and dtype == "torch.bfloat16"
    assert "lora_alpha is unknown" in unknown_scale


def test_rollouts_on_a_cpu_draw_by_step_prompt_and_request(found):
    step_0, step_1, resumed = found["rollout_seeds"]
    assert len({*step_0, *step_1}) == 4 and resumed == step_1


def test_rollouts_are_summed_in_an_order_that_does_not_depend_on_their_speed(found):
    """By prompt, tokens and log-probabilities: which rollout of a group is the first depends on chance."""
    assert [key[11:14] for key in found["rollout_order"]] == ["0_1", "0_0", "1_0", "1_1"]


def test_generation_on_a_cpu_waits_for_announced_requests_and_sorts_them(found):
    unannounced, announced, incomplete = found["gathered_requests"]
    assert unannounced == [[[2]], [[1]]] and announced == incomplete == [[[1], [2]]]


def test_another_version_of_verl_is_refused():
    require_verl(SUPPORTED)
    require_verl(SUPPORTED + "+cpu")
    for version in ("0.9.0", "0.9.10", "0.10.0"):
        with pytest.raises(ImportError, match=rf"veRL {version} is installed.*run bash run.sh -1"):
            require_verl(version)


def test_supported_version_is_in_the_requirements():
    for name in ("requirements-verl.txt", "requirements-verl-gpu.txt"):
        assert f"verl=={SUPPORTED}" in (ROOT / name).read_text()


def test_vllm_answers_once_per_rollout(found):
    replica, rank, server, request = found["vllm_requests"]
    assert [replica, rank] == ["FinalOutputReplica", 3] and "FinalOutputServer" in server
    assert request == [[1], {"top_p": 0.9, "output_kind": "final", "detokenize": False}, "id", {"priority": 2}]
