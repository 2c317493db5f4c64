"""vLLM rollouts for a model whose LM head has a bias (tts_grpo/speech/head_bias.py), for veRL 0.9.1 and vLLM 0.24.

vLLM's workers load the class by ``actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls``.
"""

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from tts_grpo.speech.head_bias import add_to_logits, load_head_bias


class HeadBiasExtension(vLLMColocateWorkerExtension):
    """veRL's extension of vLLM's workers, which also adds the LM head's bias to the logits, if there is one."""

    def monkey_patch_model(self, *args, **kwargs):
        """Add the bias. veRL calls this method before the first request, to mask ids without a token."""
        super().monkey_patch_model(*args, **kwargs)
        model = self.model_runner.model
        bias = load_head_bias(self.model_runner.vllm_config.model_config.model)
        if bias is not None:
            add_to_logits(model, bias.to(next(model.parameters()).device))
