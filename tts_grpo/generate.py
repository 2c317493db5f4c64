"""Speech tokens from a language model, in batches whose make-up does not matter."""

import dataclasses
from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tts_grpo.tokens import NUM_SPEECH_TOKENS, speech_token_str


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the likeliest tokens up to this probability; 1.0 keeps all.
        top_k: keep so many of the likeliest tokens; -1 keeps all.
        max_new_tokens: where an utterance that does not end is cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512


@dataclasses.dataclass(frozen=True)
class Utterance:
    """What the model said: its speech tokens, and whether it ended by itself ("eos") or was cut ("length")."""

    speech_tokens: list[int]
    finish_reason: str


class _GumbelNoise(LogitsProcessor):
    """Gumbel noise from a generator for each row: the largest noisy logit is a sample (Gumbel-max trick).

    A row's draws depend on its seed alone, not on the other rows, as ``do_sample`` would make them.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()


def _processors(sampling: Sampling, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_GumbelNoise(seeds, device))
    return processors


def generate_speech_tokens(
    model, tokenizer, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, batch_size: int = 64
) -> list[Utterance]:
    """Continue each prompt until an end token.

    Args:
        model: causal language model; its generation config names the end tokens.
        tokenizer: its tokenizer.
        prompts: rendered prompts (:func:`tts_grpo.prompts.render_prompt`).
        seeds: one a prompt; the same prompt and seed give the same tokens in any batch.
        sampling: how tokens are chosen.
        batch_size: prompts continued at once.

    Returns:
        one utterance a prompt, in order. Tokens that are no speech tokens are left out.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    utterances: list[Utterance | None] = [None] * len(prompts)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        responses = _continue(model, [encoded[i] for i in batch], [seeds[i] for i in batch], sampling)
        for i, response in zip(batch, responses, strict=True):
            utterances[i] = _to_utterance(model, tokenizer, response)
    return utterances


@torch.inference_mode()
def _continue(model, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> torch.Tensor:
    """Responses (B, N), filled with the padding id after their end, to prompts of ids, padded on the left."""
    config, size = model.generation_config, max(map(len, prompts))
    ids = torch.full((len(prompts), size), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, size - len(prompt) :] = torch.tensor(prompt)
        mask[i, size - len(prompt) :] = 1
    sequences = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
        temperature=None, top_p=None, top_k=None, max_new_tokens=sampling.max_new_tokens,
        logits_processor=_processors(sampling, seeds, model.device),
    )  # fmt: skip
    return sequences[:, size:].cpu()


def _to_utterance(model, tokenizer, response: torch.Tensor) -> Utterance:
    first_speech_id = tokenizer.convert_tokens_to_ids(speech_token_str(0))
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])
    end_positions = torch.isin(response, ends).nonzero()
    ended = len(end_positions) > 0
    said = response[: int(end_positions[0])] if ended else response
    tokens = [id_ - first_speech_id for id_ in said.tolist() if 0 <= id_ - first_speech_id < NUM_SPEECH_TOKENS]
    return Utterance(tokens, "eos" if ended else "length")
