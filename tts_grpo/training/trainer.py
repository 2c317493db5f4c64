"""The trainer of this recipe: a subclass of veRL's synchronous trainer.

veRL selects it from its trainer registry by ``trainer.v1.trainer_mode=tts_grpo``. ``VERL_USE_EXTERNAL_MODULES`` makes
each veRL process import this module before the registry lookup. The subclass adds:

- Credit by syllable (``credit=syllable``): advantages are computed from the losses per syllable that the reward
  function returns (tts_grpo/training/credit.py). ``critic/advantages/nonzero`` is the fraction of tokens with a nonzero
  advantage, and ``critic/advantages/mismatched`` the share of rollouts with another number of syllables than the others
  of their group. Settings that this would silently override are rejected at the start.
- GDPO's advantages (``algorithm.adv_estimator=gdpo``): veRL 0.9.1 has the estimator, but its trainer does not pass the
  parts of the reward to it. Here, they are read from what the reward function returns, by the names in
  ``algorithm.gdpo_reward_keys``: by default the parts and weights of the setting ``rewards``.
- Failed rollouts stop the training. veRL itself logs the exception and trains on the rest of the group; with
  ``algorithm.filter_groups`` it may also discard the group.
- A metric for the time spent waiting for rewards. veRL scores a rollout as soon as it ends, while others are still
  generating, so a request's latency is misleading. ``timing_s/generation`` is the time from the start of a step to the
  end of its last generation; ``timing_s/reward_wait`` is the time from there to the last reward. Both are computed from
  the seconds that veRL's agent loop records per rollout, and assume that all rollouts of a step start together.
- Counts of rollouts that are bad, could not be scored, were tried again, and so on, as shares of a step's rollouts
  (``rollouts/...``).
- Statistics of each part of the reward (``reward_parts/...``): its mean, its standard deviation, and the share of
  groups in which all rollouts have the same score, so that the part teaches nothing.
- The known-answer check of the reward servers again after every ``check_reward_freq`` steps, and before a checkpoint is
  saved: a server that no longer tells right from wrong stops the training. No checkpoint has steps after the last check
  that passed.
- All rewards of a training, also after a restart, come from servers with the same models and settings. Their hash is in
  the file ``reward_server`` beside the checkpoints.
- On a CPU, equal settings and seed give equal weights, in whichever order rollouts and rewards are finished: the
  rollouts of a step are sorted; generation waits for all requests of a step (tts_grpo/training/verl_cpu/rollout.py);
  with ``algorithm.filter_groups``, groups are replaced only when no other group is being generated.
- vLLM servers that answer once per rollout (tts_grpo/training/vllm_server.py).
- A shorter polling interval for the rollouts of a step. veRL polls every 2 s, which adds 1 s per step on average.
- Validation dumps in ``trainer.validation_data_dir`` are written atomically.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import ray
import torch
import transfer_queue as tq
import verl
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict

from tts_grpo.reward.protocol import PART_KEY, ROLLOUT_COUNTS, SERVER_KEY
from tts_grpo.reward.rewards import DEFAULT as DEFAULT_REWARDS
from tts_grpo.reward.rewards import parse_rewards
from tts_grpo.text.jsonl import write_text
from tts_grpo.training.credit import KEY, mismatched, syllable_advantages
from tts_grpo.training.verl_version import require_verl

require_verl(verl.__version__)

from verl.trainer.ppo.core_algos import compute_gdpo_outcome_advantage  # noqa: E402  # after the version check
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.rollout.replica import RolloutReplicaRegistry  # noqa: E402

NAME = "tts_grpo"
POLL_S = 0.1
KNOWN_ANSWERS = 64  # entries of the file that a check takes, of each language


def _vllm_replica() -> type:
    from tts_grpo.training.vllm_server import FinalOutputReplica  # needs vLLM, which is not installed without a GPU

    return FinalOutputReplica


RolloutReplicaRegistry.register("vllm", _vllm_replica)  # in the place of veRL's own


def credits_syllables(config: DictConfig) -> bool:
    """Return whether ``credit=syllable``, which run.sh passes to the reward function as ``by_syllable``."""
    return bool((config.reward.custom_reward_function.get("reward_kwargs") or {}).get("by_syllable", False))


def check_credit(config: DictConfig) -> None:
    """Reject settings that credit by syllable would silently override.

    Raises:
        ValueError: there is such a setting; the message lists all of them.
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
    """Return the seconds from a step's start to its last generation's end, and from there to the last reward.

    Args:
        rollouts: for each rollout, its durations ``generate_sequences`` and ``compute_score`` in seconds; the second
            starts when the first ends.
    """
    generated, scored = 0.0, 0.0
    for rollout in rollouts:
        generated = max(generated, rollout["generate_sequences"])
        scored = max(scored, rollout["generate_sequences"] + rollout["compute_score"])
    return {"generation": generated, "reward_wait": scored - generated}


def groups_of(uids: Iterable[str]) -> list[list[int]]:
    """Return the rows of each group; rollouts with the same ``uid`` form a group."""
    groups = defaultdict(list)
    for row, uid in enumerate(uids):
        groups[uid].append(row)
    return list(groups.values())


def group_advantages(
    uids: Iterable[str], encoded_losses: list[str | None], scores: list[float], num_tokens: list[int], by_std: bool
) -> tuple[list[np.ndarray], float]:
    """Compute advantages per syllable for the rollouts of a step; rollouts with the same ``uid`` form a group.

    Args are those of :func:`tts_grpo.training.credit.syllable_advantages`, over all groups of a step.

    Returns:
        Its result, over all groups, and the share of rollouts with another number of syllables than their group.

    Raises:
        ValueError: the reward function returned no syllable losses for a rollout.
    """
    lacking = encoded_losses.count(None)
    if lacking:
        raise ValueError(
            f"the reward of {lacking} of {len(encoded_losses)} rollouts has no {KEY}, which credit=syllable needs: "
            "return it as reward_tts.py does, or set credit=utterance"
        )
    advantages, others = [None] * len(encoded_losses), 0
    for rows in groups_of(uids):
        losses, *rest = ([values[row] for row in rows] for values in (encoded_losses, scores, num_tokens))
        others += mismatched(losses)
        for row, values in zip(rows, syllable_advantages(losses, *rest, by_std), strict=True):
            advantages[row] = values
    return advantages, others / len(advantages)


def part_statistics(infos: list[dict], uids: Iterable[str]) -> dict[str, float]:
    """Return mean and standard deviation of each part of the reward, and its share of groups without a difference.

    A part that is not required has the score -1 where it failed; this is left out, and the share of it is ``missing``.

    Args:
        infos: what the reward function returned for each rollout; those of another reward may have no parts.
        uids: group of each rollout.
    """
    found, groups = {}, groups_of(uids)
    names = [name for name in infos[0] if name.startswith(PART_KEY)] if infos else []
    for name in names:
        scores = np.array([info.get(name, -1.0) for info in infos], dtype=float)
        present = scores >= 0
        if present.any():
            found[f"{name}/mean"], found[f"{name}/std"] = float(scores[present].mean()), float(scores[present].std())
        found[f"{name}/equal_groups"] = float(np.mean([np.ptp(scores[rows]) < 1e-6 for rows in groups]))
        if not present.all():
            found[f"{name}/missing"] = float(1 - present.mean())
    return found


def gdpo_advantages(
    uids: list[str], infos: list[dict], num_tokens: list[int], algorithm: DictConfig
) -> list[np.ndarray]:
    """Compute GDPO's advantages (arXiv 2601.05242) for the rollouts of a step, by veRL's estimator.

    A rollout whose reward is 0 (a bad one, or one below the floor of a part) has 0 in each part. A part that is not
    required and failed has no effect on the rollout's advantage.

    Args:
        uids: n names of prompts; rollouts with the same one form a group.
        infos: what the reward function returned for each rollout.
        num_tokens: n response lengths in tokens.
        algorithm: veRL's settings ``algorithm``: ``gdpo_reward_keys`` has the names of the reward's parts in ``infos``,
            ``gdpo_reward_weights`` their weights.

    Returns:
        n float32 arrays of shape (T,), where T is the length of the response.

    Raises:
        ValueError: the reward function returned no such part for a rollout.
    """
    parts = {}
    for name in algorithm.gdpo_reward_keys:
        if lacking := sum(name not in info for info in infos):
            raise ValueError(
                f"the reward of {lacking} of {len(infos)} rollouts has no {name}, which algorithm=gdpo needs: return "
                "it as reward_tts.py does, or set another algorithm"
            )
        scores = np.array([info[name] if info.get("score", 1.0) else 0.0 for info in infos], dtype=float)
        for rows in groups_of(uids):
            missing = scores[rows] < 0
            scores[np.array(rows)[missing]] = 0.0 if missing.all() else scores[rows][~missing].mean()
        parts[name] = scores
    mask = (torch.arange(max(num_tokens)) < torch.tensor(num_tokens)[:, None]).long()
    advantages, _ = compute_gdpo_outcome_advantage(
        mask.float(), mask, np.array(uids, dtype=object), config=algorithm, non_tensor_batch=parts,
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
        batch={"prompts": mask[:, :0], "attention_mask": mask},  # it finds each response's last token by them
    )  # fmt: skip
    return [row[:size].numpy() for row, size in zip(advantages, num_tokens, strict=True)]


def rollout_shares(infos: list[dict], num_tokens: list[int], max_tokens: int) -> dict[str, float]:
    """Return the share of a step's rollouts of which each of ``ROLLOUT_COUNTS`` is true, and of tokens of other kinds.

    Args:
        infos: what the reward function returned for each rollout; those of another reward may lack the numbers.
        num_tokens: number of generated tokens of each rollout, the end token included.
        max_tokens: largest number of tokens that a rollout may have. A rollout of this length counts as truncated, and
            thus as one without an end token, as in veRL's ``response_length/clip_ratio``.
    """
    shares = {
        f"rollouts/{name}": float(np.mean([info[name] for info in infos]))
        for name in ROLLOUT_COUNTS
        if all(name in info for info in infos)
    }
    if infos and all("num_speech_tokens" in info for info in infos):
        others = [
            max(0.0, n - (n < max_tokens) - info["num_speech_tokens"])
            for info, n in zip(infos, num_tokens, strict=True)
        ]
        shares["rollouts/other_tokens"] = float(sum(others) / sum(num_tokens))
    return shares


def _failed(failed: int, expected: int, what: str) -> RuntimeError:
    return RuntimeError(
        f"{failed} of {expected} {what}: their exceptions are in the log above, where veRL logged them. Training "
        "without them would look like a good step, so it stops here; once the cause is fixed, the same command "
        "continues from the last checkpoint"
    )


@register_trainer(NAME)
class SpeechGRPOTrainer(PPOTrainerSync):
    """veRL's synchronous trainer with the additions listed in the module's docstring.

    Args:
        config: veRL's configuration.

    Raises:
        ValueError: ``credit=syllable`` would override a setting in ``config``.
    """

    def __init__(self, config: DictConfig):
        check_credit(config)
        self._on_cpu, self._num_prompts = config.trainer.device == "cpu", 0
        self._gdpo = config.algorithm.adv_estimator == "gdpo"
        if self._gdpo and config.algorithm.use_kl_in_reward:
            raise ValueError("GDPO does not see algorithm.use_kl_in_reward=True: set kl_loss_coef instead")
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # veRL checks this name for synchronous or asynchronous mode
            if self._gdpo:
                config.algorithm.adv_estimator = "grpo"  # _compute_advantage replaces its advantages
            if self._gdpo and not config.algorithm.get("gdpo_reward_keys"):
                options = config.reward.custom_reward_function.get("reward_kwargs") or {}
                specs = parse_rewards(options.get("rewards", DEFAULT_REWARDS))
                config.algorithm.gdpo_reward_keys = [PART_KEY + spec.name for spec in specs]
                config.algorithm.gdpo_reward_weights = [spec.weight for spec in specs]
        super().__init__(config)

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = POLL_S
        select, read = replay_buffer._select_prompt_uids, replay_buffer._sync_metadata_from_transfer_queue
        replay_buffer._select_prompt_uids = lambda partition, uids, size: select(partition, sorted(uids), size)

        def read_when_settled():
            read()
            while replay_buffer.pending_keys["train"] or replay_buffer.running_keys["train"]:
                time.sleep(POLL_S)
                read()

        if self._on_cpu and self.config.algorithm.filter_groups.enable:
            replay_buffer._sync_metadata_from_transfer_queue = read_when_settled
        reasons = replay_buffer._terminal_eviction_reasons  # veRL calls it at each poll, before it discards anything

        def stop_at_failures(global_steps, partition_id):
            if failed := replay_buffer.failure_keys["train"]:
                raise _failed(
                    len(failed), self.config.data.train_batch_size, "prompts of this step have a failed rollout"
                )
            return reasons(global_steps, partition_id)

        replay_buffer._terminal_eviction_reasons = stop_at_failures
        return replay_buffer

    def _fetch_one_gen_batch(self):
        """Name prompts by their order, so that sorting by name does not depend on chance."""
        batch = super()._fetch_one_gen_batch()
        numbers = range(self._num_prompts, self._num_prompts + len(batch))
        self._num_prompts += len(batch)
        tu.assign_non_tensor_stack(batch, "uid", [f"{number:012d}" for number in numbers])
        return batch

    def _submit_batch_to_rollout(self, batch):
        replicas = self.llm_server_manager.get_replicas() if self._on_cpu else []
        if len(replicas) == 1:  # veRL distributes the requests to several by their load
            count = len(batch) * self.config.actor_rollout_ref.rollout.n
            ray.get([server.expect.remote(count) for server in replicas[0].servers])
        return super()._submit_batch_to_rollout(batch)

    def _balance_batch(self, batch, metrics, *args, **kwargs):
        """Sort the rollouts of a step by prompt and content; veRL has them in the order in which they were finished."""
        fields = ["responses", "rollout_log_probs"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        found = [field for field in fields if field in rows.keys()]  # noqa: SIM118  # a TensorDict
        columns = [[row.tolist() for row in rows[field].unbind()] for field in found]
        places = [(key.split("_")[0], *(column[i] for column in columns)) for i, key in enumerate(batch.keys)]
        batch.reorder(sorted(range(len(places)), key=places.__getitem__))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def step(self, metrics, timing_raw):
        batch = super().step(metrics, timing_raw)
        every = int(self._reward_options().get("check_freq", 0))
        due = (self.global_steps % freq == 0 for freq in (every, self.config.trainer.save_freq) if freq > 0)
        if every and (any(due) or self.global_steps >= self.total_training_steps):
            start = time.monotonic()
            self._check_servers()
            timing_raw["check_reward"] = time.monotonic() - start
        return batch

    def _reward_options(self) -> dict:
        return self.config.reward.custom_reward_function.get("reward_kwargs") or {}

    def _check_servers(self) -> None:
        import reward_tts  # imports of this module's processes that need no reward server stay small

        options = self._reward_options()
        rows = reward_tts.load_rows(Path(options["known_answer_jsonl"]), KNOWN_ANSWERS, options.get("language", "zh"))
        try:
            reward_tts.check_servers(rows, options["server_urls"], float(options.get("patience_s", 180)))
        except reward_tts.RewardServerError as error:
            self._stop(
                f"after step {self.global_steps}: {error}. No checkpoint was saved since the check passed last. Mend "
                "the server, and start training again with the same command: it resumes from the last checkpoint"
            )

    def _check_identity(self, infos: Iterable[dict]) -> None:
        """Stop the training if a rollout was scored by a server with other models or settings than those before."""
        record = Path(self.config.trainer.default_local_dir, "reward_server")
        found = {info[SERVER_KEY] for info in infos if info.get(SERVER_KEY)}
        if len(found) == 1 and not record.exists():
            write_text(record, f"{min(found)}\n")
        if found and found != {record.read_text(encoding="utf-8").strip() if record.exists() else ""}:
            self._stop(
                f"reward servers compute other rewards than those with which this training began ({record}): models, "
                "voices, language, curve, tones or precision differ. Start the servers as before, and start training "
                "again with the same command: it resumes from the last checkpoint. force=1 trains from the beginning"
            )

    def _stop(self, reason: str) -> NoReturn:
        """End the training with a reason, which scripts/train.py shows if the reward's failure file has it."""
        if failure_file := self._reward_options().get("failure_file"):
            write_text(failure_file, f"{reason}\n")
        raise RuntimeError(reason)

    def _val_metrics_update(
        self, data_sources, sample_uids, reward_extra_infos, *args, expected_acc_counts=None, **kwargs
    ):
        expected = sum((expected_acc_counts or {}).values())
        if len(sample_uids) < expected:
            raise _failed(expected - len(sample_uids), expected, "rollouts of this validation failed")
        self._check_identity({SERVER_KEY: server} for server in reward_extra_infos.get(SERVER_KEY, []))
        return super()._val_metrics_update(
            data_sources, sample_uids, reward_extra_infos, *args, expected_acc_counts=expected_acc_counts, **kwargs
        )

    def _compute_advantage(self, batch, metrics):
        fields = ["uid", "rm_scores", "extra_fields"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        infos = [(extra or {}).get("reward_extra_info", {}) for extra in rows["extra_fields"]]
        self._check_identity(infos)
        batch = super()._compute_advantage(batch, metrics)
        scores = rows["rm_scores"].unbind()  # one value per token
        uids, num_tokens = list(rows["uid"]), [len(row) for row in scores]
        if credits_syllables(self.config):
            advantages, metrics["critic/advantages/mismatched"] = group_advantages(
                uids, [info.get(KEY) for info in infos], [row.sum().item() for row in scores], num_tokens,
                self.config.algorithm.get("norm_adv_by_std_in_grpo", True),
            )  # fmt: skip
        elif self._gdpo:
            advantages = gdpo_advantages(uids, infos, num_tokens, self.config.algorithm)
        else:
            return batch
        metrics["critic/advantages/nonzero"] = float(np.mean(np.concatenate(advantages) != 0))
        nested = torch.nested.as_nested_tensor([torch.from_numpy(row) for row in advantages], layout=torch.jagged)
        output = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(advantages))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)

    def _compute_metrics(self, batch, metrics, timing_raw, **kwargs):
        fields = ["uid", "metrics", "rm_scores", "extra_fields"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        timing_raw.update(rollout_seconds(rows["metrics"]))
        infos = [(extra or {}).get("reward_extra_info", {}) for extra in rows["extra_fields"]]
        num_tokens = [len(row) for row in rows["rm_scores"].unbind()]
        metrics.update(rollout_shares(infos, num_tokens, self.config.data.max_response_length))
        metrics.update(part_statistics(infos, list(rows["uid"])))
        return super()._compute_metrics(batch, metrics, timing_raw, **kwargs)

    @staticmethod
    def _write_generations(*columns_path_and_step):
        *columns, dump_path, global_steps = columns_path_and_step
        name, part = f"{global_steps}.jsonl", Path(dump_path) / ".part"
        PPOTrainerSync._write_generations(*columns, str(part), global_steps)
        (part / name).replace(part.parent / name)
