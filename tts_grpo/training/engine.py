"""FSDP engine of veRL 0.9.1, faster on GPUs, and for a model whose LM head has a bias.

``actor_rollout_ref.model.external_lib`` imports this module in the actor's process. The engine is registered for the
vendor of this machine's device, which veRL prefers to its own entry for the device type.

``FusedLinearForPPO.forward``, which computes log-probabilities and entropies, is replaced on a GPU
(tts_grpo/training/gpu_log_probs.py), and wrapped if the LM head has a bias (tts_grpo/speech/head_bias.py): veRL's model
forward instantiates this class for each micro-batch and has no setting or registry for it
(verl/models/transformers/dense_common.py). The actor and the reference model in this process have the same bias.
"""

import inspect

import torch
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers import AutoTokenizer
from verl.utils.device import get_device_name, get_vendor
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from tts_grpo.speech.head_bias import load_head_bias, restrict_to_sampleable_ids
from tts_grpo.training import varlen  # noqa: F401  # registers its attention

FUSED_LINEAR_BACKENDS = ("torch", "liger")  # backends that use FusedLinearForPPO


def use_head_bias(folder: str, use_fused_kernels: bool, backend: str | None) -> bool:
    """Include the LM head's bias in log-probabilities and entropies, if the model in ``folder`` has one.

    Args:
        folder: Hugging Face folder of the model to train.
        use_fused_kernels: veRL's ``actor_rollout_ref.model.use_fused_kernels``.
        backend: veRL's ``actor_rollout_ref.model.fused_kernel_options.impl_backend``.

    Returns:
        Whether the head has a bias.

    Raises:
        ValueError: these settings would ignore the bias, or the model needs a bias and has none.
    """
    bias = load_head_bias(folder, AutoTokenizer.from_pretrained(folder))
    if bias is None:
        return False
    if not use_fused_kernels or backend not in FUSED_LINEAR_BACKENDS:
        raise ValueError(
            f"the head of {folder} has a bias, which training would ignore with use_fused_kernels={use_fused_kernels} "
            f"and fused_kernel_options.impl_backend={backend}: set use_fused_kernels=True and impl_backend=torch"
        )
    FusedLinearForPPO.forward = restrict_to_sampleable_ids(inspect.unwrap(FusedLinearForPPO.forward), bias)
    return True


@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], get_device_name(), get_vendor())
class HeadBiasEngine(FSDPEngineWithLMHead):
    """veRL's FSDP engine, with this recipe's LM head on GPUs and the bias of the LM head in the model's folder."""

    def _build_module(self):
        torch.manual_seed(self.engine_config.seed)  # veRL initialises LoRA adapters after this method
        module = super()._build_module()
        options = self.model_config.fused_kernel_options or {}
        if get_device_name() == "cuda" and options.get("impl_backend") == "torch":
            from tts_grpo.training.gpu_log_probs import fused_linear  # needs Triton, which a CPU build of torch lacks

            FusedLinearForPPO.forward = fused_linear
        use_head_bias(self.model_config.local_path, self.model_config.use_fused_kernels, options.get("impl_backend"))
        return module

    def get_per_tensor_param(self, **kwargs):
        """Return the names and full tensors of the weights, as veRL does.

        FSDP1's sharded state dict, which veRL reads here, gathers each layer, shards its tensors again, and gathers
        them one by one: hundreds of small transfers. With the full state dict, each layer is gathered once; it holds
        all weights in float32 at a time. A model with LoRA adapters is left to veRL, which reads its state dict only
        after this call, while the adapters are merged.
        """
        if not isinstance(self.module, FullyShardedDataParallel) or hasattr(self.module, "peft_config"):
            return super().get_per_tensor_param(**kwargs)
        with FullyShardedDataParallel.state_dict_type(
            self.module, StateDictType.FULL_STATE_DICT, FullStateDictConfig()
        ):
            return super().get_per_tensor_param(**kwargs)
