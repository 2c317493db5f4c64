"""The trainer of this recipe: veRL's synchronous trainer with a few of its methods overridden.

veRL finds it in its own registry, by ``trainer.v1.trainer_mode=tts_grpo``; ``VERL_USE_EXTERNAL_MODULES`` imports this
module in each of veRL's processes, before the registry is asked. What it adds:

- Credit by syllable (``credit=syllable``): advantages are made of the errors of each syllable that the reward returned
  (tts_grpo/training/credit.py). ``critic/advantages/nonzero`` is the share of tokens whose advantage is not 0. Settings
  that this would silently override are refused at the start.
- A rollout that failed stops the training. veRL logs the exception and trains on the rest of the group.
- The wait for rewards as a metric. veRL scores a rollout as soon as it ends, while others are still being generated, so
  the latency of a request to the reward server is misleading. ``timing_s/generation`` is the time from the start of a
  step to the end of its last generation, ``timing_s/reward_wait`` the time from there to the last reward. Both are made
  of the seconds that veRL's agent loop notes for each rollout, and rely on all rollouts of a step starting together.
- A shorter wait between two looks at the rollouts of a step: veRL looks every 2 s, 1 s of latency per step on average.
- Dumps of a validation appear in ``trainer.validation_data_dir`` only when they are complete.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import transfer_queue as tq
import verl
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict

from tts_grpo.training.credit import KEY, syllable_advantages
from tts_grpo.training.verl_version import require_verl

require_verl(verl.__version__)

from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer  # noqa: E402  # after the check of its version

NAME = "tts_grpo"
POLL_S = 0.1


def credits_syllables(config: DictConfig) -> bool:
    """Whether ``credit=syllable``: run.sh passes it to the reward function, which returns the errors then."""
    return bool((config.reward.custom_reward_function.get("reward_kwargs") or {}).get("by_syllable", False))


def check_credit(config: DictConfig) -> None:
    """Refuse settings that credit by syllable would silently override.

    Raises:
        ValueError: there is such a setting; the message names all of them.
    """
    if not credits_syllables(config):
        return
    algorithm, reward = config.algorithm, config.reward
    manager = reward.reward_manager
    refused = {
        f"algorithm.adv_estimator={algorithm.adv_estimator}": algorithm.adv_estimator != "grpo",
        f"algorithm.use_kl_in_reward={algorithm.use_kl_in_reward}": algorithm.use_kl_in_reward,
        f"reward.reward_model.enable={reward.reward_model.enable}": reward.reward_model.enable,
        f"reward.reward_manager.name={manager.name}": (manager.source, manager.name) != ("register", "naive"),
        "reward.custom_reward_function.path=null": not reward.custom_reward_function.path,
    }
    if names := [name for name, wrong in refused.items() if wrong]:
        raise ValueError(
            f"credit=syllable would override {', '.join(names)}: it makes GRPO's advantages of the errors that the "
            "reward function returns, and of nothing else. Set credit=utterance, or leave that setting at its default"
        )


def rollout_seconds(rollouts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Seconds from a step's start to the end of the last generation, and from there to the last reward.

    Args:
        rollouts: for each, ``generate_sequences`` and ``compute_score``: the seconds that these took, one after the
            other.
    """
    generated, scored = 0.0, 0.0
    for rollout in rollouts:
        generated = max(generated, rollout["generate_sequences"])
        scored = max(scored, rollout["generate_sequences"] + rollout["compute_score"])
    return {"generation": generated, "reward_wait": scored - generated}


def group_advantages(
    uids: Iterable[str], notes: list[str | None], scores: list[float], num_tokens: list[int], by_std: bool
) -> list[np.ndarray]:
    """Advantages of a step's rollouts by syllable, each compared with the rollouts of the same ``uid``.

    Raises:
        ValueError: the reward returned no syllables for a rollout.
    """
    lacking = notes.count(None)
    if lacking:
        raise ValueError(
            f"the reward of {lacking} of {len(notes)} rollouts has no {KEY}, which credit=syllable needs: return it as "
            "reward_tts.py does, or set credit=utterance"
        )
    groups = defaultdict(list)
    for row, uid in enumerate(uids):
        groups[uid].append(row)
    advantages = [None] * len(notes)
    for rows in groups.values():
        of_group = syllable_advantages(
            *([values[row] for row in rows] for values in (notes, scores, num_tokens)), by_std
        )
        for row, values in zip(rows, of_group, strict=True):
            advantages[row] = values
    return advantages


def _failed(failed: int, expected: int, what: str) -> RuntimeError:
    return RuntimeError(
        f"{failed} of {expected} {what}: their exceptions are in the log above, where veRL logged them. Training "
        "without them would look like a good step, so it stops here; once the cause is mended, the same command goes "
        "on from the last checkpoint"
    )


@register_trainer(NAME)
class SpeechGRPOTrainer(PPOTrainerSync):
    """veRL's synchronous trainer with what the module's docstring lists.

    Args:
        config: veRL's configuration.

    Raises:
        ValueError: ``credit=syllable`` would override one of its settings.
    """

    def __init__(self, config: DictConfig):
        check_credit(config)
        with open_dict(config):  # veRL compares this name to tell synchronous from asynchronous training
            config.trainer.v1.trainer_mode = "sync"
        super().__init__(config)

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = POLL_S
        return replay_buffer

    def on_sample_end(self):
        super().on_sample_end()
        if failed := self.replay_buffer.failure_keys["train"]:
            raise _failed(len(failed), self.config.data.train_batch_size, "prompts of this step have a failed rollout")

    def _val_metrics_update(self, data_sources, sample_uids, *args, expected_acc_counts=None, **kwargs):
        expected = sum((expected_acc_counts or {}).values())
        if len(sample_uids) < expected:
            raise _failed(expected - len(sample_uids), expected, "rollouts of this validation failed")
        return super()._val_metrics_update(
            data_sources, sample_uids, *args, expected_acc_counts=expected_acc_counts, **kwargs
        )

    def _compute_advantage(self, batch, metrics):
        batch = super()._compute_advantage(batch, metrics)
        if not credits_syllables(self.config):
            return batch
        fields = ["uid", "rm_scores", "extra_fields"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        notes = [(extra or {}).get("reward_extra_info", {}).get(KEY) for extra in rows["extra_fields"]]
        scores = rows["rm_scores"].unbind()  # one value per token
        advantages = group_advantages(
            list(rows["uid"]), notes, [row.sum().item() for row in scores], [len(row) for row in scores],
            self.config.algorithm.get("norm_adv_by_std_in_grpo", True),
        )  # fmt: skip
        metrics["critic/advantages/nonzero"] = float(np.mean(np.concatenate(advantages) != 0))
        nested = torch.nested.as_nested_tensor([torch.from_numpy(row) for row in advantages], layout=torch.jagged)
        output = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(advantages))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)

    def _compute_metrics(self, batch, metrics, timing_raw, **kwargs):
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["metrics"])
        timing_raw.update(rollout_seconds(rows["metrics"]))
        return super()._compute_metrics(batch, metrics, timing_raw, **kwargs)

    @staticmethod
    def _write_generations(*columns_path_and_step):
        *columns, dump_path, global_steps = columns_path_and_step
        name, part = f"{global_steps}.jsonl", Path(dump_path) / ".part"
        PPOTrainerSync._write_generations(*columns, str(part), global_steps)
        (part / name).replace(part.parent / name)
