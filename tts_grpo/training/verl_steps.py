"""What is added to veRL's training loop, on any device; written for veRL 0.9.1.

Loaded in veRL's processes through ``actor_rollout_ref.model.external_lib``. Four things:

- The wait for rewards becomes a metric. veRL scores a rollout as soon as it has ended, while others are still being
  generated, so the seconds of a request to the reward server say little. What training waits for rewards is the time
  from the end of the last generation to the last reward: ``timing_s/reward_wait``; before it comes
  ``timing_s/generation``. Both are made of the seconds that veRL's agent loop notes of each rollout. All rollouts of a
  step start together, or the sum would be none of the clock's.
- veRL looks every 2 s whether the rollouts of a step are there (``ReplayBuffer.poll_interval``, which no setting
  reaches): a second of each step on average. Here it looks ten times a second.
- Where the reward is told to note the errors of each syllable (``credit=syllable``), GRPO's advantages are made of them
  (tts_grpo/training/credit.py); ``critic/advantages/nonzero`` is the share of tokens that have one.
- Where the model's head has a bias (tts_grpo/speech/head_bias.py), log-probabilities and entropies are those of the head with
  its bias.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.engine.fsdp import transformer_impl

from tts_grpo.speech.head_bias import load_head_bias, over_said_ids
from tts_grpo.training.credit import KEY, syllable_advantages

POLL_S = 0.1


def rollout_seconds(rollouts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Seconds from a step's start to the end of the last generation, and from there to the last reward.

    Args:
        rollouts: of each, ``generate_sequences`` and ``compute_score``: the seconds that it took, one after the other.
    """
    generated, scored = 0.0, 0.0
    for rollout in rollouts:
        generated = max(generated, rollout["generate_sequences"])
        scored = max(scored, rollout["generate_sequences"] + rollout["compute_score"])
    return {"generation": generated, "reward_wait": scored - generated}


def _add_rollout_seconds() -> None:
    compute_metrics = PPOTrainer._compute_metrics

    def with_rollout_seconds(self, batch, metrics, timing_raw, **kwargs):
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["metrics"])
        timing_raw.update(rollout_seconds(rows["metrics"]))
        return compute_metrics(self, batch, metrics, timing_raw, **kwargs)

    PPOTrainer._compute_metrics = with_rollout_seconds


def _poll_often() -> None:
    wait_for_next_poll = ReplayBuffer._wait_for_next_poll

    def wait_briefly(self, *args):
        self.poll_interval = POLL_S
        return wait_for_next_poll(self, *args)

    ReplayBuffer._wait_for_next_poll = wait_briefly


def group_advantages(
    uids: Iterable[str], notes: list[str | None], scores: list[float], num_tokens: list[int], by_std: bool
) -> list[np.ndarray]:
    """Advantages of a step's rollouts by syllable.

    Raises:
        ValueError: the reward noted no syllables of a rollout.
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


def _credit_syllables() -> None:
    compute_advantage = PPOTrainer._compute_advantage

    def with_credit(self, batch, metrics):
        batch = compute_advantage(self, batch, metrics)
        if not self.config.reward.custom_reward_function.reward_kwargs.by_syllable:
            return batch
        fields = ["uid", "rm_scores", "extra_fields"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        notes = [(extra or {}).get("reward_extra_info", {}).get(KEY) for extra in rows["extra_fields"]]
        scores = rows["rm_scores"].unbind()  # of each token
        advantages = group_advantages(
            list(rows["uid"]), notes, [row.sum().item() for row in scores], [len(row) for row in scores],
            self.config.algorithm.get("norm_adv_by_std_in_grpo", True),
        )  # fmt: skip
        metrics["critic/advantages/nonzero"] = float(np.mean(np.concatenate(advantages) != 0))
        nested = torch.nested.as_nested_tensor([torch.from_numpy(row) for row in advantages], layout=torch.jagged)
        output = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(advantages))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)

    PPOTrainer._compute_advantage = with_credit


def _train_with_head_bias() -> None:
    apply_monkey_patch = transformer_impl.apply_monkey_patch

    def with_head_bias(model, use_fused_kernels=False, fused_kernels_backend=None, **kwargs):
        """Called for each model that veRL has just loaded.

        Raises:
            ValueError: its head has a bias, which the log-probabilities would lack, or it needs one and has none.
        """
        kernels = {"use_fused_kernels": use_fused_kernels, "fused_kernels_backend": fused_kernels_backend}
        apply_monkey_patch(model=model, **kernels, **kwargs)
        folder = model.config.name_or_path
        bias = load_head_bias(folder, AutoTokenizer.from_pretrained(folder))
        if bias is None:
            return
        if not use_fused_kernels or fused_kernels_backend == "triton":
            raise ValueError(
                f"the head of {folder} has a bias, which only use_fused_kernels=True with "
                f"fused_kernel_options.impl_backend=torch trains with, not {kernels}"
            )
        FusedLinearForPPO.forward = over_said_ids(inspect.unwrap(FusedLinearForPPO.forward), bias)

    transformer_impl.apply_monkey_patch = with_head_bias


_add_rollout_seconds()
_poll_often()
_credit_syllables()
_train_with_head_bias()
