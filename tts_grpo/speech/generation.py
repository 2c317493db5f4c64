"""Speech tokens from a language model, in batches whose make-up does not matter."""

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
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the likeliest tokens up to this probability; 1.0 keeps all.
        top_k: keep so many of the likeliest tokens; -1 keeps all.
        max_new_tokens: where an utterance that does not end is cut.
        repetition_penalty: above 1, the logits of ids that the prompt or the response already has are divided by it
            where they are positive and multiplied where they are negative (CTRL, arXiv 1909.05858), as Transformers'
            ``generate`` does.
        repetition_window: 0, or a token that is among so many last ones is replaced by one drawn from all others:
            CosyVoice's repetition aware sampling (``ras_sampling`` in cosyvoice/utils/common.py at ace7c47, after
            VALL-E 2, arXiv 2406.05370) with tau_r = 1 / window. CosyVoice2 itself uses top_p 0.8, top_k 25, window 10.
        min_token_text_ratio: the first end token is not drawn before so many tokens for each token of the text.
        max_token_text_ratio: 0, or an utterance is cut at so many tokens for each token of the text, instead of at
            ``max_new_tokens``. (Both as in ``Qwen2LM.inference`` in cosyvoice/llm/llm.py at ace7c47, which uses 2 and
            20 and knows the first of three end tokens as ``eos_token``.)
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
        """The least and the largest number of tokens of a response to a text of ``text_len`` tokens.

        Raises:
            ValueError: they depend on a length that is not known.
        """
        if not (self.min_token_text_ratio or self.max_token_text_ratio):
            return 0, self.max_new_tokens
        if text_len is None:
            raise ValueError(f"the limits of {self} need the text of each prompt: pass texts or text_lens")
        largest = int(text_len * self.max_token_text_ratio) if self.max_token_text_ratio else self.max_new_tokens
        return int(text_len * self.min_token_text_ratio), largest


LM_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# cosyvoice2.yaml of CosyVoice2-0.5B, and the defaults of Qwen2LM.inference
OFFICIAL = Sampling(
    top_p=0.8, top_k=25, repetition_window=10, min_token_text_ratio=2.0, max_token_text_ratio=20.0
)  # fmt: skip


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


def load_lm(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None):
    """``(model, tokenizer)`` of a Hugging Face folder, by default in float32 on a CPU and in bfloat16 on a GPU.

    A bias of the head that is in the folder becomes the model's (tts_grpo/speech/head_bias.py).

    There, attention is the plain one: the logits of PyTorch's own differ by rounding from run to run, and so do some of
    the tokens drawn (8 of 128 responses of 100 tokens on an H100).
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
    """float64 (B, 2, max(counts)) in [0, 1): each row of its own seed and count, so that it depends on no other."""
    numbers = torch.zeros(len(seeds), 2, max(counts), dtype=torch.float64)
    for row, seed, count in zip(numbers, seeds, counts, strict=True):
        generator = torch.Generator().manual_seed(seed)
        row[:, :count] = torch.rand(2 * count, generator=generator, dtype=torch.float64).view(2, count)
    return numbers


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    if sampling.temperature == 0:
        return LogitsProcessorList()
    cuts = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
    if sampling.top_p < 1.0:
        # vLLM and Transformers take top_p of what top_k leaves, CosyVoice's nucleus_sampling of all tokens
        cuts.insert(0 if sampling.repetition_window else len(cuts), TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature)), *cuts])


def _choose(scores: torch.Tensor, uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Next ids (B,) and their log-probabilities (B,), by inverse transform sampling; without numbers the likeliest."""
    log_probs = scores.float().log_softmax(-1)
    if uniform is None:
        choice = log_probs.argmax(-1, keepdim=True)
    else:
        cumulative = log_probs.double().exp_().cumsum_(-1)
        # right: an id of probability 0 is never chosen; the last sum stands for 1, from which rounding keeps it
        choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return choice[:, 0], log_probs.gather(1, choice)[:, 0]


def _next(logits, warpers, recent, uniform, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Next ids (B,) and their log-probabilities (B,) as they were drawn.

    Args:
        logits: (B, V).
        warpers: of ``sampling``.
        recent: (B, window) ids said last, -1 where there are none yet; used with a repetition window.
        uniform: (B, 2) numbers in [0, 1), the second for a second draw; None without sampling.
        sampling: how tokens are chosen.
    """
    choice, log_probs = _choose(warpers(None, logits), None if uniform is None else uniform[:, 0])
    if sampling.repetition_window and uniform is not None:
        again = (recent == choice[:, None]).any(1)
        other, other_log_probs = _choose(logits.scatter(1, choice[:, None], -torch.inf), uniform[:, 1])
        choice, log_probs = torch.where(again, other, choice), torch.where(again, other_log_probs, log_probs)
    return choice, log_probs


def _padded(prompts: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (B, L) ids and (B, L) mask of prompts that end together; what stands before a prompt is masked."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, ids.shape[1] - len(prompt) :] = torch.tensor(prompt)
        mask[i, ids.shape[1] - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, V) with the repetition penalty on the ids ``seen``, bool (B, V)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@torch.inference_mode()
def generate(
    model, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling,
    on_end: Callable[[int, Response], None] = lambda i, response: None, text_lens: Sequence[int] | None = None,
) -> list[Response]:  # fmt: skip
    """Continue each prompt of one batch until an end token.

    A row leaves the batch when it ends: ``model.generate`` would compute it on until the longest has ended.

    Args:
        model: causal language model; its generation config names the end tokens.
        prompts: B prompts as vocabulary ids, of any lengths.
        seeds: one a prompt; the same prompt and seed give the same response in any batch.
        sampling: how tokens are chosen.
        on_end: called with a prompt's place and its response as soon as that is whole.
        text_lens: tokens of each prompt's text, for a ``sampling`` whose limits depend on it.
    """
    device = model.device
    ids, mask = _padded(prompts, device)
    ends = torch.as_tensor(model.generation_config.eos_token_id, device=device).reshape(-1)
    limits = [sampling.limits(text_len) for text_len in text_lens or [None] * len(prompts)]
    least, largest = torch.tensor(limits, device=device).unbind(1)
    uniform = _uniform_numbers(seeds, largest.tolist()).to(device) if sampling.temperature > 0 else None
    recent = torch.full((len(prompts), max(1, sampling.repetition_window)), -1, device=device)
    warpers, cache = _warpers(sampling), DynamicCache(config=model.config)
    seen = None  # ids of prompt and response, where they count
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
    responses = [Response([], [], "length") for _ in prompts]
    rows = torch.arange(len(prompts), device=device)  # prompts that have not ended
    for step in range(int(largest.max())):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        logits = output.logits[:, -1]
        if seen is not None:
            logits = _penalised(logits, seen, sampling.repetition_penalty)
        if sampling.min_token_text_ratio:
            logits[step < least[rows], ends[0]] = -torch.inf
        numbers = None if uniform is None else uniform[rows, :, step]
        choice, log_probs = _next(logits, warpers, recent, numbers, sampling)
        recent = torch.cat([recent[:, 1:], choice[:, None]], 1)
        if seen is not None:
            seen.scatter_(1, choice[:, None], True)
        ended = torch.isin(choice, ends)
        going = ~ended & (step + 1 < largest[rows])
        for row, *token in zip(*(t.tolist() for t in (rows, choice, log_probs, ended, going)), strict=True):
            _add(responses, row, *token, on_end)
        if not going.all():
            rows, choice, mask, recent = rows[going], choice[going], mask[going], recent[going]
            if not len(rows):
                break
            cache.batch_select_indices(going.nonzero()[:, 0])
            seen = None if seen is None else seen[going]
        ids, mask = choice[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return responses


def _add(responses: list[Response], row: int, id_: int, log_prob: float, ended: bool, going: bool, on_end) -> None:
    """Add a token to a response, and report the response if that was its last one."""
    responses[row].token_ids.append(id_)
    responses[row].log_probs.append(log_prob)
    if ended:
        responses[row] = dataclasses.replace(responses[row], finish_reason="eos")
    if not going:
        on_end(row, responses[row])


def generate_speech_tokens(
    model, tokenizer, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, batch_size: int = 64,
    texts: Sequence[str] = (),
) -> list[Utterance]:  # fmt: skip
    """Say each prompt.

    Args:
        model: causal language model; its generation config names the end tokens.
        tokenizer: its tokenizer.
        prompts: rendered prompts (:func:`tts_grpo.text.prompts.render_prompt`).
        seeds: one a prompt; the same prompt and seed give the same tokens in any batch.
        sampling: how tokens are chosen.
        batch_size: prompts continued at once.
        texts: the text of each prompt, for a ``sampling`` whose limits depend on its length.

    Returns:
        one utterance a prompt, in order. Tokens that are no speech tokens are left out.
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
            tokens = [id_ - first_speech_id for id_ in response.token_ids]
            tokens = [token for token in tokens if 0 <= token < NUM_SPEECH_TOKENS]
            utterances[i] = Utterance(tokens, response.finish_reason)
    return utterances
