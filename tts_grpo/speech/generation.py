"""Sample speech tokens from a language model in batches; results do not depend on the composition of a batch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tts_grpo.speech.head_bias import add_head_bias, load_head_bias
from tts_grpo.text.prompts import load_tokenizer
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, speech_token_str


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 means greedy decoding.
        top_p: keep the most probable tokens up to this cumulative probability; 1.0 keeps all.
        top_k: keep this many of the most probable tokens; -1 keeps all.
        max_new_tokens: length at which a response without an end token is truncated.
        repetition_penalty: if above 1, the logits of ids that occur in the prompt or the response are divided by it
            if positive and multiplied by it if negative (CTRL, arXiv 1909.05858), as in Transformers' ``generate``.
        repetition_window: if not 0, a token that is among this many last ones is replaced by one drawn from all others:
            CosyVoice's repetition aware sampling (``ras_sampling`` in cosyvoice/utils/common.py at ace7c47, after
            VALL-E 2, arXiv 2406.05370) with tau_r = 1 / window. CosyVoice2 itself uses top_p 0.8, top_k 25, window 10.
        min_token_text_ratio: minimum number of tokens per token of the text before the first end token can be drawn.
        max_token_text_ratio: if not 0, the maximum number of tokens per token of the text, instead of
            ``max_new_tokens``. (Both ratios as in ``Qwen2LM.inference`` in cosyvoice/llm/llm.py at ace7c47, which uses
            2 and 20, and whose ``eos_token`` is the first of three end tokens.)
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 512
    repetition_window: int = 0
    min_token_text_ratio: float = 0.0
    max_token_text_ratio: float = 0.0
    repetition_penalty: float = 1.0

    def limits(self, text_len: int | None) -> tuple[int, int]:
        """Minimum and maximum number of tokens of a response to a text of ``text_len`` tokens.

        Raises:
            ValueError: the limits depend on ``text_len``, and it is None.
        """
        if not (self.min_token_text_ratio or self.max_token_text_ratio):
            return 0, self.max_new_tokens
        if text_len is None:
            raise ValueError(f"the length limits of {self} depend on the text of each prompt: pass texts or text_lens")
        maximum = int(text_len * self.max_token_text_ratio) if self.max_token_text_ratio else self.max_new_tokens
        return int(text_len * self.min_token_text_ratio), maximum


LM_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# from cosyvoice2.yaml of CosyVoice2-0.5B and the defaults of Qwen2LM.inference
OFFICIAL = Sampling(
    top_p=0.8, top_k=25, repetition_window=10, min_token_text_ratio=2.0, max_token_text_ratio=20.0
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Response:
    """The model's response to one prompt.

    Attributes:
        token_ids: vocabulary ids, including the end token.
        log_probs: log-probability of each id in the distribution that it was sampled from.
        finish_reason: "eos" if it ends with an end token, "length" if it was truncated.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Generated speech tokens; ``finish_reason`` is "eos" (end token) or "length" (truncated)."""

    speech_tokens: list[int]
    finish_reason: str


def load_lm(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None):
    """``(model, tokenizer)`` of a Hugging Face folder, by default in float32 on a CPU and in bfloat16 on a GPU.

    If the folder has a bias of the LM head, it is added to the model (tts_grpo/speech/head_bias.py).

    On a GPU, attention is "eager": with "sdpa", rounding errors in the logits differ from run to run, which changed 8
    of 128 sampled responses of 100 tokens on an H100.
    """
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    attention = "sdpa" if device == "cpu" else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device).eval()
    tokenizer = load_tokenizer(folder)
    bias = load_head_bias(folder, tokenizer)
    if bias is not None:
        add_head_bias(model, bias)
    return model, tokenizer


def _uniform_numbers(seeds: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """float64 (B, 2, max(counts)) in [0, 1): each row has its own seed and count and is independent of the others."""
    numbers = torch.zeros(len(seeds), 2, max(counts), dtype=torch.float64)
    for row, seed, count in zip(numbers, seeds, counts, strict=True):
        generator = torch.Generator().manual_seed(seed)
        row[:, :count] = torch.rand(2 * count, generator=generator, dtype=torch.float64).view(2, count)
    return numbers


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    if sampling.temperature == 0:
        return LogitsProcessorList()
    filters = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
    if sampling.top_p < 1.0:
        # vLLM and Transformers apply top_p after top_k, CosyVoice's nucleus_sampling applies it to all tokens
        filters.insert(0 if sampling.repetition_window else len(filters), TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature)), *filters])


def _choose(scores: torch.Tensor, uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Next ids (B,) and their log-probabilities (B,), by inverse transform sampling; greedy if ``uniform`` is None."""
    log_probs = scores.float().log_softmax(-1)
    if uniform is None:
        choice = log_probs.argmax(-1, keepdim=True)
    else:
        cumulative = log_probs.double().exp_().cumsum_(-1)
        # right=True: an id of probability 0 is never chosen. The last sum replaces 1, which rounding may miss.
        choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return choice[:, 0], log_probs.gather(1, choice)[:, 0]


def _next(logits, warpers, recent, uniform, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Next ids (B,) and their log-probabilities (B,) in the distribution that they were drawn from.

    Args:
        logits: (B, V).
        warpers: logits processors for ``sampling``.
        recent: (B, window) last ids, -1 where there are none yet; used with a repetition window.
        uniform: (B, 2) numbers in [0, 1), the second for a repeated draw; None for greedy decoding.
        sampling: sampling settings.
    """
    first_uniform = None if uniform is None else uniform[:, 0]
    if uniform is not None and sampling.top_k > 0 and not sampling.repetition_window:
        # Sorting the whole vocabulary for top_p would take longer than the network. More candidates than top_k: ids
        # whose logit equals the last one's are kept, as by TopKLogitsWarper.
        likely = logits.topk(min(4 * sampling.top_k, logits.shape[1])).indices.sort().values
        choice, log_probs = _choose(warpers(None, logits.gather(1, likely)), first_uniform)
        return likely.gather(1, choice[:, None])[:, 0], log_probs
    choice, log_probs = _choose(warpers(None, logits), first_uniform)
    if sampling.repetition_window and uniform is not None:
        repeated = (recent == choice[:, None]).any(1)
        other, other_log_probs = _choose(logits.scatter(1, choice[:, None], -torch.inf), uniform[:, 1])
        choice, log_probs = torch.where(repeated, other, choice), torch.where(repeated, other_log_probs, log_probs)
    return choice, log_probs


def _left_padded(prompts: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (B, L) ids and attention mask of prompts, padded on the left."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, ids.shape[1] - len(prompt) :] = torch.tensor(prompt)
        mask[i, ids.shape[1] - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _penalise_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Apply the repetition penalty to the logits (B, V) of the ids in ``seen``, bool (B, V)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@torch.inference_mode()
def generate(
    model, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling,
    on_end: Callable[[int, Response], None] = lambda i, response: None, text_lens: Sequence[int] | None = None,
) -> list[Response]:  # fmt: skip
    """Generate a response to each prompt of one batch.

    A row is removed from the batch when its response ends; ``model.generate`` would compute it until the longest ends.

    Args:
        model: causal language model; its generation config has the end tokens.
        prompts: B prompts as vocabulary ids, of any lengths.
        seeds: one seed per prompt; the same prompt and seed give the same response in any batch.
        sampling: sampling settings.
        on_end: called with the index of a prompt and its response as soon as the response is complete.
        text_lens: number of tokens of each prompt's text; required if the limits of ``sampling`` depend on it.
    """
    device = model.device
    ids, mask = _left_padded(prompts, device)
    ends = torch.as_tensor(model.generation_config.eos_token_id, device=device).reshape(-1)
    limits = [sampling.limits(text_len) for text_len in text_lens or [None] * len(prompts)]
    minimum, maximum = torch.tensor(limits, device=device).unbind(1)
    uniform = _uniform_numbers(seeds, maximum.tolist()).to(device) if sampling.temperature > 0 else None
    recent = torch.full((len(prompts), max(1, sampling.repetition_window)), -1, device=device)
    warpers, cache = _warpers(sampling), DynamicCache(config=model.config)
    seen = None  # ids that occur in prompt or response
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
    responses = [Response([], [], "length") for _ in prompts]
    rows = torch.arange(len(prompts), device=device)  # indices of unfinished responses
    for step in range(int(maximum.max())):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        logits = output.logits[:, -1]
        if seen is not None:
            logits = _penalise_repetition(logits, seen, sampling.repetition_penalty)
        if sampling.min_token_text_ratio:
            logits[step < minimum[rows], ends[0]] = -torch.inf
        numbers = None if uniform is None else uniform[rows, :, step]
        choice, log_probs = _next(logits, warpers, recent, numbers, sampling)
        recent = torch.cat([recent[:, 1:], choice[:, None]], 1)
        if seen is not None:
            seen.scatter_(1, choice[:, None], True)
        ended = torch.isin(choice, ends)
        unfinished = ~ended & (step + 1 < maximum[rows])
        for row, *token in zip(*(t.tolist() for t in (rows, choice, log_probs, ended, unfinished)), strict=True):
            _append_token(responses, row, *token, on_end)
        if not unfinished.all():
            rows, choice, mask, recent = (x[unfinished] for x in (rows, choice, mask, recent))
            if not len(rows):
                break
            cache.batch_select_indices(unfinished.nonzero()[:, 0])
            seen = None if seen is None else seen[unfinished]
        ids, mask = choice[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return responses


def _append_token(
    responses: list[Response], row: int, id_: int, log_prob: float, ended: bool, unfinished: bool, on_end
) -> None:
    """Append a token to a response, and call ``on_end`` if it is the last one."""
    responses[row].token_ids.append(id_)
    responses[row].log_probs.append(log_prob)
    if ended:
        responses[row] = dataclasses.replace(responses[row], finish_reason="eos")
    if not unfinished:
        on_end(row, responses[row])


def generate_speech_tokens(
    model, tokenizer, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, batch_size: int = 64,
    texts: Sequence[str] = (),
) -> list[Utterance]:  # fmt: skip
    """Generate an utterance for each prompt.

    Args:
        model: causal language model; its generation config has the end tokens.
        tokenizer: the tokenizer of the model.
        prompts: rendered prompts (:func:`tts_grpo.text.prompts.render_prompt`).
        seeds: one seed per prompt; the same prompt and seed give the same tokens in any batch.
        sampling: sampling settings.
        batch_size: maximum number of prompts per batch.
        texts: the text of each prompt; required if the limits of ``sampling`` depend on its length.

    Returns:
        One utterance per prompt, in order, with the speech tokens only; all other tokens are removed.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    text_lens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    first_speech_id = tokenizer.convert_tokens_to_ids(speech_token_str(0))
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    utterances: list[Utterance | None] = [None] * len(prompts)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        responses = generate(
            model, [encoded[i] for i in batch], [seeds[i] for i in batch], sampling,
            text_lens=[text_lens[i] for i in batch] if texts else None,
        )  # fmt: skip
        for i, response in zip(batch, responses, strict=True):
            utterances[i] = utterance_of(response, first_speech_id)
    return utterances


def utterance_of(response: Response, first_speech_id: int) -> Utterance:
    """The speech tokens of a response; ``first_speech_id`` is the vocabulary id of speech token 0."""
    tokens = [id_ - first_speech_id for id_ in response.token_ids]
    return Utterance([token for token in tokens if 0 <= token < NUM_SPEECH_TOKENS], response.finish_reason)
