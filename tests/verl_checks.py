"""The part of tests/test_trainer.py that runs in the trainer environment, as one process: importing veRL is slow.

    python tests/verl_checks.py FOLDER

Prints a JSON object with the result, or the error, of each check function below.
"""

import asyncio
import collections
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
import unittest.mock
from pathlib import Path

import torch
import verl.trainer.main_ppo  # noqa: F401  # the module that run.sh starts
from hydra import compose, initialize_config_module
from safetensors.torch import save_file
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSync, get_trainer_cls, replay_buffer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout.replica import get_rollout_replica_class

ROOT = Path(__file__).resolve().parent.parent
LLM = ROOT / "assets/tiny/llm"
TRAINER = get_trainer_cls("tts_grpo")  # veRL imported the trainer: this file has not imported tts_grpo yet
DEFINED = {
    f"{owner.__name__}.{name}": function.__module__
    for owner in (PPOTrainer, PPOTrainerSync, ReplayBuffer)
    for name, function in vars(owner).items()
    if callable(function)
} | {"FusedLinearForPPO.forward": FusedLinearForPPO.forward.__module__}

from tts_grpo.training import engine, trainer  # noqa: E402
from tts_grpo.training.credit import encode  # noqa: E402


def config(*overrides: str, by_syllable: bool = True):
    """veRL's configuration as composed by run.sh, limited to what the trainer's constructor reads."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            [
                "trainer.v1.trainer_mode=tts_grpo", "algorithm.adv_estimator=grpo",
                f"actor_rollout_ref.model.path={LLM}",
                "reward.custom_reward_function.path=reward_tts.py", "data.train_batch_size=2",
                "algorithm.norm_adv_by_std_in_grpo=False",
                f"+reward.custom_reward_function.reward_kwargs={{by_syllable: {by_syllable}}}", *overrides,
            ],
        )  # fmt: skip


def make_trainer() -> PPOTrainer:
    """A trainer without workers."""
    return TRAINER(config())


def refusal(*overrides: str, by_syllable: bool = True) -> str:
    """The error message of the constructor; empty if it succeeds."""
    try:
        TRAINER(config(*overrides, by_syllable=by_syllable))
    except ValueError as error:
        return str(error)
    return ""


def patched(folder):
    return {name: module for name, module in DEFINED.items() if module.startswith("tts_grpo")}


def constructed(folder):
    ppo_trainer = make_trainer()
    buffer = ppo_trainer.replay_buffer
    return [
        type(ppo_trainer).__mro__[1].__name__, type(buffer).__name__, ppo_trainer.trainer_mode, buffer.poll_interval
    ]  # fmt: skip


def refused(folder):
    return {
        override: refusal(override)
        for override in (
            "algorithm.adv_estimator=rloo", "algorithm.use_kl_in_reward=True", "reward.reward_model.enable=True",
            "reward.reward_manager.name=dapo", "reward.custom_reward_function.path=null",
        )
    }  # fmt: skip


def not_refused(folder):
    """Cases without credit by syllable, and without conflicting settings."""
    return [
        refusal("algorithm.adv_estimator=rloo", "reward.reward_manager.name=dapo", by_syllable=False),
        refusal("algorithm.norm_adv_by_std_in_grpo=True", "algorithm.filter_groups.enable=True",
                "algorithm.filter_groups.metric=reward"),
    ]  # fmt: skip


def seconds(folder):
    rows = [(4.0, 0.5), (1.0, 2.0), (3.5, 1.75)]
    return [
        trainer.rollout_seconds([{"generate_sequences": g, "compute_score": s} for g, s in rows]),
        trainer.rollout_seconds([{"generate_sequences": 1.0, "compute_score": 9.0}]),
    ]


class FakeTransferQueue:
    """A fake of veRL's transfer queue: columns of one batch."""

    def __init__(self, **columns):
        self.columns = columns

    def kv_batch_get(self, keys, partition_id, select_fields):
        return {name: self.columns[name] for name in select_fields}

    def kv_batch_put(self, keys, partition_id, fields):
        self.columns |= {name: fields[name] for name in fields.keys()}  # noqa: SIM118  # a TensorDict
        return "batch after writing"


def rollouts(*with_errors: bool) -> FakeTransferQueue:
    """Two prompts with two rollouts each, of 3, 3, 4 and 3 tokens; all rewards are 1, except the third."""
    scores = [torch.tensor([0.0] * (size - 1) + [score]) for size, score in ((3, 1.0), (3, 1.0), (4, 0.5), (3, 1.0))]
    syllable_losses = [encode((0, 0.5 * errors), (0, 2)) for errors in with_errors]
    return FakeTransferQueue(
        uid=list("abab"), rm_scores=torch.nested.as_nested_tensor(scores, layout=torch.jagged),
        extra_fields=[{"reward_extra_info": {"syllable_losses": value}} for value in syllable_losses],
        metrics=[{"generate_sequences": 2.0, "compute_score": 1.5}] * 4, advantages="GRPO's",
    )  # fmt: skip


BATCH = types.SimpleNamespace(keys=list("0123"), partition_id="train")


def advantages(folder):
    """The advantages are written after veRL's own, to the column that the update reads."""
    ppo_trainer, metrics = make_trainer(), {}
    trainer.tq = queue = rollouts(False, False, True, False)
    PPOTrainerSync._compute_advantage = lambda self, batch, metrics: BATCH
    returned = ppo_trainer._compute_advantage(BATCH, metrics)
    return [returned, [row.tolist() for row in queue.columns["advantages"].unbind()], metrics]


def missing_errors(folder):
    return trainer.group_advantages("ab", [None, encode((0, 0), (0, 2))], [1.0, 0.5], [3, 3], False)


def part_statistics(folder):
    """Two groups of two rollouts; ``mine`` failed once, and ``pace`` is the same within each group."""
    scores = {"pace": (0.5, 0.5, 1.0, 1.0), "mine": (0.0, 0.4, 0.8, -1.0)}
    infos = [{f"reward_parts/{name}": values[i] for name, values in scores.items()} for i in range(4)]
    return [trainer.part_statistics(infos, "aabb"), trainer.part_statistics([{"score": 1.0}], "a")]


def verl_overrides(**settings: str) -> list[str]:
    """The overrides that run.sh passes to veRL."""
    command = ["bash", "run.sh", "--dry-run", "2", "2"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | settings, check=True)
    (words,) = (words for line in run.stdout.splitlines() if "verl.trainer.main_ppo" in (words := shlex.split(line)))
    overrides = words[words.index("verl.trainer.main_ppo") + 1 :]
    return [override for override in overrides if not override.startswith("hydra.")]


def algorithms(folder):
    """For each algorithm, the loss of two rollouts with 3 and 1 tokens, and where the reward begins to fall.

    The ratios of probabilities are 1.25, 1, 1 and 0.9; the first rollout's advantage is 1, the second's -1.
    """
    ratios, mask = torch.tensor([[1.25, 1, 1], [0.9, 1, 1]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = {}
    for path in sorted((ROOT / "conf/algorithms").glob("*.sh")):
        with initialize_config_module("verl.trainer.config", version_base=None):
            full = compose("ppo_trainer", verl_overrides(algorithm=path.stem, profile="tiny", exp_dir=folder))
        TRAINER(full)
        actor = omega_conf_to_dataclass(full.actor_rollout_ref.actor)
        actor.global_batch_info.update(  # veRL's ppo_loss sets them
            dp_size=1, batch_num_tokens=4, global_batch_size=2, loss_scale_factor=actor.loss_scale_factor
        )
        loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
            torch.zeros(2, 3), ratios.log(), torch.tensor([[1.0] * 3, [-1.0] * 3]), mask, actor.loss_agg_mode, actor
        )
        manager = get_reward_manager_cls(full.reward.reward_manager.name)(full, None, lambda: None)
        overlong = getattr(manager, "overlong_buffer_cfg", None)
        found[path.stem] = [loss.item(), overlong and [manager.max_resp_len, overlong.len]]
    return found


def gdpo(folder):
    """Advantages of two groups of two rollouts; the parts are found in what the reward function returned."""
    rewards = "'intelligibility:1 pace:0.3,units_per_s=4,floor=0.1,required=0'"
    options = ["algorithm.adv_estimator=gdpo", "algorithm.norm_adv_by_std_in_grpo=True",
               f"+reward.custom_reward_function.reward_kwargs.rewards={rewards}"]  # fmt: skip
    ppo_trainer = TRAINER(config(*options, by_syllable=False))
    PPOTrainerSync._compute_advantage = lambda self, batch, metrics: BATCH
    trainer.tq = queue = rollouts(False, False, True, False)

    def advantages(words, pace):
        for extra, *parts, score in zip(queue.columns["extra_fields"], words, pace, (0.9, 0, 0.6, 0.8), strict=True):
            names = ("reward_parts/intelligibility", "reward_parts/pace", "score")
            extra["reward_extra_info"] |= dict(zip(names, (*parts, score), strict=True))
        ppo_trainer._compute_advantage(BATCH, {})
        return [row.tolist() for row in queue.columns["advantages"].unbind()]

    # the second rollout's reward is 0, because its pace is below the floor; that of the third is missing
    found = [advantages((1, 0.7, 0.5, 0.2), (0.2, 0.05, 0.4, 0.8)), advantages((1, 0, 0.5, 0.2), (0.2, 0, -1, 0.8))]
    del queue.columns["extra_fields"][1]["reward_extra_info"]["reward_parts/pace"]
    try:
        ppo_trainer._compute_advantage(BATCH, {})
    except ValueError as error:
        return [*found, str(error), refusal(*options, "algorithm.use_kl_in_reward=True", by_syllable=False)]


def rollout_order(folder):
    """Rollouts of two prompts in the order in which they are finished, and the order in which they are summed."""

    class Batch:
        keys, partition_id = [f"00000000000{prompt}_{i}_0" for prompt, i in ((1, 1), (0, 0), (1, 0), (0, 1))], "train"

        def reorder(self, order):
            self.keys = [self.keys[i] for i in order]

    nested = lambda rows: torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)  # noqa: E731
    trainer.tq = FakeTransferQueue(
        responses=nested([[5, 1], [3, 2, 2], [5, 1], [3, 2, 1]]),
        rollout_log_probs=nested([[-0.5, -0.1], [-0.2] * 3, [-0.7, -0.1], [-0.3] * 3]),
    )
    PPOTrainerSync._balance_batch = lambda self, batch, metrics: batch.keys
    return make_trainer()._balance_batch(Batch(), {})


def wait_for_rewards(folder):
    ppo_trainer, timing = make_trainer(), {"step": 9.0}
    trainer.tq = rollouts(False, False, True, False)
    PPOTrainerSync._compute_metrics = lambda self, batch, metrics, timing_raw, **kwargs: dict(timing_raw)
    return ppo_trainer._compute_metrics(BATCH, {}, timing, global_steps=1, epoch=0)


def shares(folder):
    infos = [
        {"bad_rollout": 1.0, "unscored_rollout": 0.0, "retried_rollout": 1.0, "rescored_rollout": 0.0,
         "empty_transcript": 1.0, "num_speech_tokens": 0.0},
        {"bad_rollout": 0.0, "unscored_rollout": 0.0, "retried_rollout": 1.0, "rescored_rollout": 0.0,
         "empty_transcript": 0.0, "num_speech_tokens": 7.0},
    ]  # fmt: skip
    return [
        trainer.rollout_shares(infos, [5, 11], 12), trainer.rollout_shares(infos, [5, 11], 11),
        trainer.rollout_shares([{}, {}], [5, 11], 12),
    ]  # fmt: skip


def checked_servers(folder):
    """Steps after which servers are checked, and what happens when the check of one fails."""
    import reward_tts

    known = LLM.parent / "data/dev.jsonl"
    options = {
        "by_syllable": True,
        "check_freq": 2,
        "known_answer_jsonl": str(known),
        "server_urls": "http://a,http://b",
        "failure_file": str(Path(folder) / "failure"),
    }
    ppo_trainer, asked = make_trainer(), []
    ppo_trainer.config.reward.custom_reward_function.reward_kwargs = options
    ppo_trainer.config.trainer.save_freq, ppo_trainer.total_training_steps = 3, 7

    def check(rows, url, patience_s):
        asked.append([ppo_trainer.global_steps, url, len(rows)])
        if (ppo_trainer.global_steps, url) == (7, "http://b"):
            raise reward_tts.RewardServerError("right texts score 0.1")
        return {"server_hash": "one"}

    reward_tts.check_server = check
    PPOTrainerSync.step = lambda self, metrics, timing_raw: "batch"
    for step in range(1, 8):
        ppo_trainer.global_steps, timing = step, {}
        try:
            assert ppo_trainer.step({}, timing) == "batch" and (asked == [] or asked[-1][0] < step or timing)
        except RuntimeError as error:
            return [asked, str(error), (Path(folder) / "failure").read_text()]
    return [asked, ""]


def vllm_requests(folder):
    """Replica class of vLLM, and what a request of its servers asks for; with fakes of vLLM and of veRL's server."""

    class Server:
        async def generate(self, prompt_ids, sampling_params, request_id, **kwargs):
            return [prompt_ids, sampling_params, request_id, kwargs]

    class Replica:
        def __init__(self, rank):
            self.rank = rank

    async_server = types.ModuleType("vllm_async_server")
    async_server.vLLMHttpServer, async_server.vLLMReplica = Server, Replica
    sampling = types.ModuleType("sampling_params")
    sampling.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY="final")
    fakes = {"verl.workers.rollout.vllm_rollout.vllm_async_server": async_server, "vllm.sampling_params": sampling,
             "vllm": types.ModuleType("vllm")}  # fmt: skip
    with unittest.mock.patch.dict(sys.modules, fakes):
        replica = get_rollout_replica_class("vllm")(3)
        server = sys.modules[type(replica).__module__].FinalOutputServer()
        asked = asyncio.run(server.generate([1], {"top_p": 0.9}, "id", priority=2))
    created = replica.server_class.__ray_metadata__.modified_class.__name__
    return [type(replica).__name__, replica.rank, created, asked]


def identities(folder):
    """Rewards of two steps and of a validation, and of a server with other models after a restart of the training."""
    ppo_trainer = make_trainer()
    ppo_trainer.config.trainer.default_local_dir = str(Path(folder) / "checkpoints")
    PPOTrainerSync._compute_advantage = lambda self, batch, metrics: BATCH
    PPOTrainerSync._val_metrics_update = lambda self, *args, **kwargs: {"reward": 1.0}

    def step(*servers):
        trainer.tq = rollouts(False, False, True, False)
        for extra, server in zip(trainer.tq.columns["extra_fields"], servers, strict=True):
            extra["reward_extra_info"]["reward_server"] = server
        try:
            return ppo_trainer._compute_advantage(BATCH, {})
        except RuntimeError as error:
            return str(error)

    def validate(*servers):
        try:
            return ppo_trainer._val_metrics_update(["x"], ["u"], {"reward_server": list(servers)}, [])
        except RuntimeError as error:
            return str(error)

    mixed_at_first = step("one", "one", "two", "one")
    first = [step("one", "one", "", "one"), validate("one", "")]
    ppo_trainer = make_trainer()  # resumed
    ppo_trainer.config.trainer.default_local_dir = str(Path(folder) / "checkpoints")
    later = [step("one", "one", "one", "two"), validate("two", "two"), step("one", "", "", "one")]
    return [mixed_at_first, *first, *later]


def failed_rollout(folder):
    """A group with a failed rollout, in a step with enough other groups, which veRL would discard as surplus."""
    ppo_trainer = TRAINER(
        config("algorithm.filter_groups.enable=True", "algorithm.filter_groups.metric=reward", by_syllable=False)
    )
    buffer = ppo_trainer.replay_buffer
    partitions = {"train": {"c": {"is_prompt": True, "status": "failure", "global_steps": 1}}}
    for uid, rewards in (("a", (0.0, 1.0)), ("b", (1.0, 0.0))):
        partitions["train"][uid] = {"is_prompt": True, "status": "finished", "global_steps": 0}
        partitions["train"] |= {f"{uid}_{i}_0": {"status": "success", "reward": r} for i, r in enumerate(rewards)}
    found = [{}, {"train": dict(partitions["train"])}]
    replay_buffer.tq = types.SimpleNamespace(
        kv_list=lambda: found[-1], kv_clear=lambda partition_id, keys: None,
        kv_batch_get=lambda keys, **_: {"rm_scores": [torch.tensor([found[-1]["train"][k]["reward"]]) for k in keys]},
    )  # fmt: skip
    try:
        buffer.sample(1, "train", 2)
        return "not noticed"
    except RuntimeError as error:
        failed = str(error)
    del found[-1]["train"]["c"]
    batch, _ = buffer.sample(1, "train", 2)  # does not raise without failures
    return [failed, sorted(batch.keys)]


def failed_validation(folder):
    make_trainer()._val_metrics_update(["x"], ["u"], {"reward": [1.0]}, [], expected_acc_counts={("x", "u"): 2})


def dump(folder):
    """veRL writes to a temporary folder; the file is moved to its final place when veRL has returned."""
    files_during_writing = []
    write = PPOTrainerSync._write_generations

    def watched(*args):
        write(*args)
        files_during_writing.append(
            [path.name for path in Path(folder).rglob("*.jsonl") if path.parent == Path(folder)]
        )

    PPOTrainerSync._write_generations = staticmethod(watched)
    TRAINER._write_generations(["in"], ["out"], ["text"], [0.5], {}, folder, 15)
    names = [path.name for path in Path(folder).glob("*.jsonl")]
    return [files_during_writing, names, (Path(folder) / "15.jsonl").read_text()]


def engines(folder):
    from verl.workers.engine import EngineRegistry

    return EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__


def head_without_a_bias(folder):
    before = FusedLinearForPPO.forward
    return [engine.use_head_bias(str(LLM), True, "torch"), FusedLinearForPPO.forward is before]


def model_with_bias(folder) -> str:
    """Copy the tiny language model to ``folder`` and add a bias; returns the path."""
    shutil.copytree(LLM, Path(folder) / "llm", dirs_exist_ok=True)
    size = json.loads((LLM / "config.json").read_text())["vocab_size"]
    save_file({"lm_head.bias": torch.zeros(size)}, Path(folder) / "llm/head_bias.safetensors")
    return str(Path(folder) / "llm")


def unfused_head_with_a_bias(folder):
    return engine.use_head_bias(model_with_bias(folder), False, "torch")


def other_kernel_with_a_bias(folder):
    return engine.use_head_bias(model_with_bias(folder), True, "triton")


def head_with_a_bias(folder):
    """Calls the engine's ``_build_module`` with a fake of veRL's."""
    before = FusedLinearForPPO.forward
    engine.FSDPEngineWithLMHead._build_module = lambda self: "the model"
    head_bias_engine = object.__new__(engine.HeadBiasEngine)
    head_bias_engine.engine_config = types.SimpleNamespace(seed=42)
    head_bias_engine.model_config = types.SimpleNamespace(
        local_path=model_with_bias(folder), use_fused_kernels=True, fused_kernel_options={"impl_backend": "torch"}
    )
    return [head_bias_engine._build_module(), FusedLinearForPPO.forward is not before]


def gather_from_two_processes(rank: int, folder: str) -> None:
    """Shard a model by FSDP1, as veRL does on GPUs, and write what the engine returns for the rollouts."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    sharded = transformer_impl.FSDP(model, device_id=torch.device("cpu"), device_mesh=mesh)
    kind = transformer_impl.StateDictType.SHARDED_STATE_DICT
    transformer_impl.FSDP.set_state_dict_type(sharded, kind, transformer_impl.ShardedStateDictConfig())
    found = object.__new__(engine.HeadBiasEngine)
    found.module, found._is_offload_param = sharded, False
    found._uses_fsdp2_cpu_offload_policy = found._qat_enabled = False
    found.model_config = types.SimpleNamespace(lora={}, hf_config=types.SimpleNamespace(model_type="qwen2"))
    with (
        unittest.mock.patch.object(transformer_impl, "load_fsdp_model_to_gpu"),
        unittest.mock.patch.object(transformer_impl.DTensor, "full_tensor", side_effect=AssertionError),
    ):
        weights = dict(found.get_per_tensor_param()[0])
    equal = {name: torch.equal(weights[name], value) for name, value in expected.items()}
    after = transformer_impl.FSDP.get_state_dict_type(sharded).state_dict_type
    Path(folder, f"{rank}.json").write_text(json.dumps([equal, len(weights), after == kind]))


def weights_of_fsdp1(folder):
    folder = Path(folder) / "fsdp1"
    folder.mkdir()
    torch.multiprocessing.start_processes(gather_from_two_processes, (str(folder),), nprocs=2, start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def lora_merge(folder):
    """Deviation of a merged weight from W + alpha / rank * B @ A, its change, and other weights that changed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    spec = importlib.util.spec_from_file_location("merge", ROOT / "scripts/merge.py")
    merge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(merge)
    folder = Path(folder) / "merged"
    base = AutoModelForCausalLM.from_pretrained(LLM, dtype=torch.bfloat16)
    base.save_pretrained(folder)
    before = {name: value.float().clone() for name, value in base.state_dict().items()}
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    (name,) = (name for name in before if name.endswith("layers.1.mlp.up_proj.weight"))
    layer = tuned.get_submodule("base_model.model." + name.removesuffix(".weight"))
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    tuned.save_pretrained(folder / "lora_adapter")
    expected = before[name] + 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).float()
    merge.merge_adapter(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    value = merged.state_dict()[name].float()
    others = [n for n, v in merged.state_dict().items() if n != name and not torch.equal(v.float(), before[n])]
    relative = ((value - expected).abs() / expected.abs().clamp(min=1e-2)).max().item()
    config_file = folder / "lora_adapter/adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"lora_alpha": 0}))
    try:
        merge.merge_adapter(folder)
    except ValueError as error:
        return [relative, (value - before[name]).abs().mean().item(), others, str(merged.dtype), str(error)]


def rollout_seeds(folder):
    """Seeds of a prompt's two requests in step 0, in step 1, and in step 1 of a training that was resumed there."""
    from tts_grpo.training.verl_cpu import rollout  # on a CPU, it patches veRL's engine: the last check

    def server():
        one = object.__new__(rollout.TransformersServer)
        one.config, one.global_steps, one.request_counts = types.SimpleNamespace(seed=42), 0, collections.Counter()
        one.model = types.SimpleNamespace(load_state_dict=lambda state, strict: ([], []))
        return one

    def drawn(one, steps: int | None = None):
        if steps:
            asyncio.run(one.update_weights({}, steps))
        return [one.seed((1, 2), rollout.Sampling()) for _ in range(2)]

    first = server()
    return [drawn(first), drawn(first, 1), drawn(server(), 1)]


def gathered_requests(folder):
    """Prompts of the batches that are generated of late requests, with and without an announcement."""
    from tts_grpo.training.verl_cpu import rollout

    def generate(model, prompts, seeds, sampling, on_end):
        batches.append(prompts)
        for i in range(len(prompts)):
            on_end(i, types.SimpleNamespace(token_ids=[], log_probs=[]))

    async def serve(expected: int):
        server = object.__new__(rollout.TransformersServer)
        server.config = types.SimpleNamespace(seed=42, response_length=9, max_num_seqs=8)
        server.model, server.global_steps, server.request_counts = None, 0, collections.Counter()
        server.waiting, server.task, server.expected = [], None, 0
        await server.expect(expected)
        first = asyncio.create_task(server.generate([2], {}, "a"))
        await asyncio.sleep(4 * rollout.GATHER_S)
        await asyncio.gather(first, server.generate([1], {}, "b"))

    rollout.generate, found = generate, []
    for expected in (0, 2, 3):
        rollout.EXPECTED_S = 1.0  # a third request never arrives
        batches = []
        asyncio.run(serve(expected))
        found.append(batches)
    return found


def result(check, folder: str):
    try:
        return check(folder)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    checks = (patched, constructed, refused, not_refused, seconds, advantages, missing_errors, part_statistics,
              algorithms, gdpo,
              wait_for_rewards, shares, checked_servers, identities, failed_rollout, failed_validation, dump, engines,
              head_without_a_bias, unfused_head_with_a_bias, other_kernel_with_a_bias, head_with_a_bias, lora_merge,
              weights_of_fsdp1, rollout_order, rollout_seeds, gathered_requests, vllm_requests)  # fmt: skip
    sys.stdout.write(json.dumps({check.__name__: result(check, sys.argv[1]) for check in checks}) + "\n")
