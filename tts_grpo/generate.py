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
class Response:
    """What the model wrote after one prompt.

    Attributes:
        token_ids: vocabulary ids, the end token included.
        log_probs: of each id, under the logits as they were sampled from.
        finish_reason: "eos" if it ended by itself, "length" if it was cut.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Utterance:
    """What the model said: its speech tokens, and whether it ended by itself ("eos") or was cut ("length")."""

    speech_tokens: list[int]
    finish_reason: str


class _Sampler(LogitsProcessor):
    """Chooses each row's next token by inverse transform sampling, with uniform numbers of the row's own seed.

    So a row's draws do not depend on the other rows, as those of ``do_sample`` would. Without seeds the likeliest
    token is chosen. Keeps the log-probability of each choice.
    """

    def __init__(self, seeds: Sequence[int] | None, max_new_tokens: int):
        self.uniform = None
        if seeds is not None:
            generators = (torch.Generator().manual_seed(seed) for seed in seeds)
            draws = [torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
            self.uniform = torch.stack(draws)
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_probs = scores.float().log_softmax(-1)
        if self.uniform is None:
            choice = log_probs.argmax(-1, keepdim=True)
        else:
            cumulative = log_probs.double().exp().cumsum(-1)
            uniform = self.uniform[:, len(self.log_probs), None].to(scores.device)
            # right: an id of probability 0 is never chosen; the last sum stands for 1, from which rounding keeps it
            choice = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        self.log_probs.append(log_probs.gather(1, choice)[:, 0])
        return torch.full_like(log_probs, -torch.inf).scatter_(1, choice, 0.0)  # generate() takes the largest


def _processors(sampling: Sampling, sampler: _Sampler) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(sampler)
    return processors


@torch.inference_mode()
def generate(model, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
    """Continue each prompt of one batch until an end token.

    Args:
        model: causal language model; its generation config names the end tokens and the padding.
        prompts: B prompts as vocabulary ids, of any lengths.
        seeds: one a prompt; the same prompt and seed give the same response in any batch.
        sampling: how tokens are chosen.
    """
    config, size = model.generation_config, max(map(len, prompts))
    ids = torch.full((len(prompts), size), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, size - len(prompt) :] = torch.tensor(prompt)
        mask[i, size - len(prompt) :] = 1
    sampler = _Sampler(seeds if sampling.temperature > 0 else None, sampling.max_new_tokens)
    sequences = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
        temperature=None, top_p=None, top_k=None, max_new_tokens=sampling.max_new_tokens,
        logits_processor=_processors(sampling, sampler),
    )  # fmt: skip
    log_probs = torch.stack(sampler.log_probs, dim=1).tolist()
    return [
        _until_end(row, row_log_probs, config.eos_token_id)
        for row, row_log_probs in zip(sequences[:, size:].tolist(), log_probs, strict=True)
    ]


def _until_end(token_ids: list[int], log_probs: list[float], ends: int | list[int]) -> Response:
    """One row of a batch up to its end token."""
    ends = ends if isinstance(ends, list) else [ends]
    length = next((i + 1 for i, id_ in enumerate(token_ids) if id_ in ends), None)
    return Response(token_ids[:length], log_probs[:length], "length" if length is None else "eos")


def generate_speech_tokens(
    model, tokenizer, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, batch_size: int = 64
) -> list[Utterance]:
    """Say each prompt.

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
    first_speech_id = tokenizer.convert_tokens_to_ids(speech_token_str(0))
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    utterances: list[Utterance | None] = [None] * len(prompts)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        responses = generate(model, [encoded[i] for i in batch], [seeds[i] for i in batch], sampling)
        for i, response in zip(batch, responses, strict=True):
            tokens = [id_ - first_speech_id for id_ in response.token_ids]
            tokens = [token for token in tokens if 0 <= token < NUM_SPEECH_TOKENS]
            utterances[i] = Utterance(tokens, response.finish_reason)
    return utterances
