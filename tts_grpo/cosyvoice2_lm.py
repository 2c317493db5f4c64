"""The official CosyVoice2 language model as a Transformers class: Qwen2 whose head has a bias.

Stock Qwen2 has no bias there, and no exact substitute for one: the head sees the output of an RMSNorm, in which no
component is constant. So the model has a type of its own, ``cosyvoice2_lm``, registered when this module is imported;
programs that do not know it stop with an error, where a Qwen2 would load without its bias.

The bias does a second thing: ids that the model never says have ``UNREACHABLE`` there. It is finite, because
0 * -inf in an entropy is not a number; the softmax of such an id is exactly 0 in float32 and bfloat16.
"""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

UNREACHABLE = -1e4


class CosyVoice2LMConfig(Qwen2Config):
    """Configuration of :class:`CosyVoice2LMForCausalLM`: Qwen2's own."""

    model_type = "cosyvoice2_lm"


class CosyVoice2LMForCausalLM(Qwen2ForCausalLM):
    """Qwen2 with ``logits = lm_head.weight @ hidden + lm_head.bias``."""

    config_class = CosyVoice2LMConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()


AutoConfig.register("cosyvoice2_lm", CosyVoice2LMConfig, exist_ok=True)
AutoModelForCausalLM.register(CosyVoice2LMConfig, CosyVoice2LMForCausalLM, exist_ok=True)
