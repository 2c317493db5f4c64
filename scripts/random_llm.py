"""A language model of the full profile's shape with random weights, to measure speed and memory without a download.

    python scripts/random_llm.py --output DIR [--mean-tokens 124]

It is a Qwen2 of 0.5B with the vocabulary, template and special tokens of the SFT model that the full profile trains.
What it says means nothing, but it says speech tokens only, and ends after ``--mean-tokens`` of them on average (the
lengths are geometric), so that its rollouts fill a trainer and a reward server as real ones do. Text is split into
bytes: prompts are about three times as long as with the real vocabulary.

How: one component of every token's embedding outweighs the others and no layer writes enough to change that, so it is
nearly constant where the head sees it. The head's weights there decide what is said and how often the end token.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tts_grpo.prompts import GENERATION_END, GENERATION_START, IM_END, IM_START, LLASA_CHAT_TEMPLATE
from tts_grpo.tokens import NUM_SPEECH_TOKENS, speech_token_str

TEXT_TOKENS = 151_643  # of Qwen2's vocabulary
PAD = "<|endoftext|>"
ROW_MULTIPLE = 128
SHAPES = {  # Qwen2-0.5B; "tiny" is for tests
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 128},
}  # fmt: skip
NEVER = -50.0  # logit of what is never said


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b", help="size of the network")
    parser.add_argument("--mean-tokens", type=float, default=124.0, help="speech tokens before the end, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args(argv)


def make_tokenizer(text_tokens: int) -> PreTrainedTokenizerFast:
    """Bytes, as many stand-ins as make up ``text_tokens``, and the SFT model's special and speech tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = letters + [f"\u0120text{i}" for i in range(text_tokens - len(letters))]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=GENERATION_END)
    tokenizer.add_tokens([IM_START, IM_END, GENERATION_START, GENERATION_END], special_tokens=True)
    # veRL decodes without special tokens: as such, speech tokens would be gone
    tokenizer.add_tokens([speech_token_str(i) for i in range(NUM_SPEECH_TOKENS)])
    tokenizer.chat_template = LLASA_CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, shape: dict[str, int], mean_tokens: float, seed: int) -> Qwen2ForCausalLM:
    """A model that says speech tokens, each of the same probability, and ends each time with ``1 / mean_tokens``."""
    rows, end = -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE, tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=rows, tie_word_embeddings=False, max_position_embeddings=32768, rope_theta=1e6,
                    bos_token_id=None, eos_token_id=end, pad_token_id=tokenizer.pad_token_id, **shape)
    )  # fmt: skip
    first, size = tokenizer.convert_tokens_to_ids(speech_token_str(0)), shape["hidden_size"]
    logits = torch.full((rows,), NEVER)
    logits[first : first + NUM_SPEECH_TOKENS] = 0.0
    logits[end] = math.log(NUM_SPEECH_TOKENS / (mean_tokens - 1))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0
        for layer in model.model.layers:  # what a layer adds has no part in it, and all of them together add little
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(0.01)
                weight[0] = 0.0
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[:, 0] = logits / math.sqrt(size)  # RMSNorm: an outweighing component becomes sqrt(size)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, tokenizer.convert_tokens_to_ids(IM_END)], pad_token_id=tokenizer.pad_token_id
    )
    return model.to(torch.bfloat16)


def main(argv=None):
    args = get_args(argv)
    tokenizer = make_tokenizer(TEXT_TOKENS if args.shape == "0.5b" else 300)
    model = make_model(tokenizer, SHAPES[args.shape], args.mean_tokens, args.seed)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(json.dumps({"output": str(args.output), "parameters": model.num_parameters(), "vocabulary": len(tokenizer)}))


if __name__ == "__main__":
    main()
