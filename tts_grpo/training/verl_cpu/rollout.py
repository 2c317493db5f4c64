"""Rollouts with Transformers on the CPU, and the patches of veRL's FSDP engine. Registers itself when imported.

One Ray actor holds the model that generates. It collects the requests of a step into batches; the actor worker sends it
the new weights after each update. The random seed of a request depends on the step, the prompt, and the number of
earlier requests with the same prompt, so that a resumed training draws the same tokens as an uninterrupted one.

Log-probabilities are equal to the last bit only in equal batches. Requests may arrive in any order and with gaps, so
the trainer announces how many will come (:meth:`TransformersServer.expect`), and they are sorted.
"""

import asyncio
import collections
import logging
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from verl.utils.device import get_device_name
from verl.workers.rollout import base as rollout_base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from tts_grpo.speech.generation import Sampling, generate, load_lm
from tts_grpo.training import engine  # noqa: F401  # registers itself, as on a GPU
from tts_grpo.training.verl_cpu.log_probs import fused_linear

logger = logging.getLogger(__name__)

NAME = "transformers_cpu"
GATHER_S = 0.1  # a batch is closed when no request arrives for this long
EXPECTED_S = 60.0  # the same, while announced requests are missing, which have failed on their way
# Not sent after an update: weights of a head that is tied to the embedding, and its bias, which is not trained.
NOT_UPDATED = {"lm_head.weight", "lm_head.bias"}


class TransformersServer:
    """Serves token-in, token-out requests; concurrent requests are generated as one batch."""

    def __init__(self, config, model_path: str):
        # Half of the cores are for the reward server, which scores finished rollouts in the meantime.
        torch.set_num_threads(max(1, int(os.environ["OMP_NUM_THREADS"]) // 2))
        self.config = config
        self.model = load_lm(model_path)[0]
        self.global_steps = 0
        self.waiting, self.task, self.expected = [], None, 0
        self.request_counts = collections.Counter()

    async def expect(self, count: int) -> None:
        """Announce that ``count`` requests will arrive. Their generation begins when the last of them has arrived."""
        self.expected += count

    async def generate(self, prompt_ids, sampling_params, request_id, **_):
        """Handle one request of veRL's agent loop."""
        prompt, params = tuple(prompt_ids), sampling_params
        sampling = Sampling(
            temperature=float(params.get("temperature", 1.0)), top_p=float(params.get("top_p", 1.0)),
            top_k=int(params.get("top_k", -1)),
            max_new_tokens=int(params.get("max_tokens") or self.config.response_length),
        )  # fmt: skip
        self.expected = max(0, self.expected - 1)
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt, sampling, self.seed(prompt, sampling), future))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._drain())
        response = await future
        return TokenOutput(
            token_ids=response.token_ids,
            log_probs=response.log_probs if params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    def seed(self, prompt: tuple[int, ...], sampling: Sampling) -> int:
        """Seed of a request, from the step, the prompt, and the number of its requests in this step."""
        key = (prompt, sampling)
        self.request_counts[key] += 1
        digest = zlib.crc32(np.array(prompt, np.int64).tobytes())
        entropy = [int(self.config.seed), self.global_steps, digest, self.request_counts[key]]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)

    async def _drain(self) -> None:
        while self.waiting:
            await self._gather()
            sampling = self.waiting[0][1]
            same_sampling = sorted((r for r in self.waiting if r[1] == sampling), key=lambda r: (len(r[0]), r[0], r[2]))
            batch = same_sampling[: self.config.max_num_seqs]
            taken = {id(request) for request in batch}
            self.waiting = [request for request in self.waiting if id(request) not in taken]
            prompts, seeds, futures = ([request[i] for request in batch] for i in (0, 2, 3))
            loop = asyncio.get_running_loop()
            on_end = lambda i, response: loop.call_soon_threadsafe(futures[i].set_result, response)  # noqa: E731, B023
            try:
                await asyncio.to_thread(generate, self.model, prompts, seeds, sampling, on_end)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

    async def _gather(self) -> None:
        """Wait until the requests of a step, which arrive in a burst, have arrived."""
        count, quiet_s = len(self.waiting), 0.0
        while quiet_s < (EXPECTED_S if self.expected else GATHER_S):
            await asyncio.sleep(GATHER_S)
            quiet_s = quiet_s + GATHER_S if count == len(self.waiting) else 0.0
            count = len(self.waiting)
        if self.expected:
            logger.warning("%d announced requests did not arrive: weights may differ from another run's", self.expected)
            self.expected = 0

    async def update_weights(self, state: dict[str, torch.Tensor], global_steps: int | None = None) -> None:
        """Load the trained weights.

        Raises:
            RuntimeError: names or shapes differ from the model's.
        """
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - NOT_UPDATED:
            raise RuntimeError(f"weights do not fit the model: missing {missing}, unexpected {unexpected}")
        self.global_steps = self.global_steps if global_steps is None else global_steps
        self.request_counts.clear()

    async def noop(self, *args, **kwargs) -> None:
        """Nothing to do on a CPU."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = noop
    abort_all_requests = resume_generation = start_profile = stop_profile = noop


class TransformersReplica(RolloutReplica):
    """Starts the server actor."""

    async def launch_servers(self):
        self._server_address = f"{NAME}_{self.replica_rank}"
        actor = ray.remote(TransformersServer).options(
            name=self._server_address, max_concurrency=self.max_concurrency, num_cpus=1
        )
        self._server_handle = actor.remote(self.config, str(Path(self.model_config.path).expanduser()))
        self.servers = [self._server_handle]


class TransformersAdapter(BaseRollout):
    """Part of the actor worker that sends the trained weights to the server."""

    def __init__(self, config, model_config, device_mesh, **kwargs):
        super().__init__(config, model_config, device_mesh)
        self.server_name = f"{NAME}_{os.environ['RANK']}"

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **kwargs):
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in weights}
        await ray.get_actor(self.server_name).update_weights.remote(state, global_steps)


def _register_rollout() -> None:
    rollout_base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.TransformersAdapter"
    RolloutReplicaRegistry.register(NAME, lambda: TransformersReplica)


def _patch_engine() -> None:
    """Replace code of veRL's FSDP engine that needs a GPU, and for which there is no setting or registry."""
    from verl.utils.distributed import initialize_global_process_group_ray
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers import engine_workers
    from verl.workers.engine.fsdp import transformer_impl

    # veRL asks for "cpu:gloo,<device>:<backend>", which torch rejects when the device is the CPU as well.
    engine_workers.initialize_global_process_group_ray = partial(
        initialize_global_process_group_ray, backend="cpu:gloo"
    )
    transformer_impl.load_fsdp_model_to_gpu = lambda model: None  # the model stays on the CPU
    offload = transformer_impl.CPUOffloadPolicy  # of the reference model; only a GPU needs pinned memory
    transformer_impl.CPUOffloadPolicy = lambda pin_memory: offload(pin_memory=False)
    FusedLinearForPPO.forward = fused_linear  # faster on a CPU; a head bias wraps it (tts_grpo/training/engine.py)


_register_rollout()
if get_device_name() == "cpu":
    _patch_engine()
