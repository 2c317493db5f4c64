"""vLLM servers that answer once per rollout, for veRL 0.9.1 and vLLM 0.24.

veRL's server uses the last of a request's outputs only. vLLM's default is one output per token, with the tokens, their
probabilities and their decoded text up to there, made for all running rollouts by the one Python process of the server.
These servers ask for the final output, without text: the agent loop decodes the tokens.
"""

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind


class FinalOutputServer(vLLMHttpServer):
    """veRL's vLLM server, whose requests have one output."""

    async def generate(self, prompt_ids, sampling_params, *args, **kwargs):
        """Generate a rollout as veRL does, but without outputs before the end, and without decoded text."""
        options = {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": False}
        return await super().generate(prompt_ids, sampling_params | options, *args, **kwargs)


class FinalOutputReplica(vLLMReplica):
    """veRL's replica, whose servers are :class:`FinalOutputServer`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(FinalOutputServer)
