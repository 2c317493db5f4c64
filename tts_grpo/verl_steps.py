"""What is added to veRL's training loop, on any device; written for veRL 0.9.1.

Loaded in veRL's processes through ``actor_rollout_ref.model.external_lib``. Two things:

- The wait for rewards becomes a metric. veRL scores a rollout as soon as it has ended, while others are still being
  generated, so the seconds of a request to the reward server say little. What training waits for rewards is the time
  from the end of the last generation to the last reward: ``timing_s/reward_wait``; before it comes
  ``timing_s/generation``. Both are made of the seconds that veRL's agent loop notes of each rollout. All rollouts of a
  step start together, or the sum would be none of the clock's.
- veRL looks every 2 s whether the rollouts of a step are there (``ReplayBuffer.poll_interval``, which no setting
  reaches): a second of each step on average. Here it looks ten times a second.
"""

from collections.abc import Iterable

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

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


_add_rollout_seconds()
_poll_often()
