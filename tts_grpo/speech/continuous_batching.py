"""Sample responses with continuous batching: a response that ends frees its slot for the next prompt.

The network always runs on the same number of slots, so that a GPU replays one CUDA graph per token instead of launching
a thousand kernels. The keys and values of all slots are in tensors of fixed size.

A response depends only on its prompt and seed, to the bit, for a given number of slots: the shapes of all matrix
products are fixed (a prompt is computed in a batch of fixed size, which depends on the prompt's length only), and
attention does not read beyond the end of a slot. It does not depend on the other prompts, their order or the number of
processes. :func:`tts_grpo.speech.generation.generate` draws the same responses up to rounding.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from transformers import AttentionInterface

from tts_grpo.speech.generation import Response, Sampling, _next, _penalise_repetition, _uniform_numbers, _warpers
from tts_grpo.speech.head_bias import UNREACHABLE

NAME = "slots"  # of the attention, in Transformers
BUCKET = 128  # lengths of prompts are rounded up to a multiple of it
PREFILL_TOKENS = 8192  # tokens in a batch of prompts, at most
STEPS_PER_CHECK = 8  # tokens between two checks for ended responses; each check waits for the GPU


def slot_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of prompts, or of one new token per slot; an attention function of Transformers.

    Args:
        module: attention layer, not used.
        query: (B, H, T, D) with H heads; T is 1 for new tokens.
        key: (B, G, K, D), where H is a multiple of G.
        value: as ``key``.
        attention_mask: int64 (B,), the number of keys that each row attends to; None: causal attention of prompts.
        scaling: factor of the attention scores, None for 1 / sqrt(D).
        kwargs: not used.

    Returns:
        The output (B, T, H, D), and None in place of the attention weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None and query.is_cuda:
        from tts_grpo.speech.decode_attention import decode_attention  # needs Triton

        return decode_attention(query[:, :, 0], key, value, attention_mask, scaling)[:, None], None
    heads, groups = query.shape[1], key.shape[1]
    if attention_mask is None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        visible = visible.repeat(heads // groups, 1)
    else:
        visible = (torch.arange(key.shape[2], device=query.device) < attention_mask[:, None])[:, None, None]
    scores = (query.reshape(len(query), groups, -1, query.shape[-1]) @ key.transpose(2, 3)).float() * scaling
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(value.dtype)
    return (weights @ value).view(query.shape).transpose(1, 2), None


AttentionInterface.register(NAME, slot_attention)


class SlotCache:
    """Keys and values of all slots, in Transformers' interface of a cache.

    Args:
        config: config of the language model.
        slots: number of slots.
        capacity: number of tokens per slot.
        like: tensor with the dtype and device to use.
    """

    def __init__(self, config, slots: int, capacity: int, like: torch.Tensor):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, size)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.rows = torch.arange(slots, device=like.device)
        self.positions = None  # int64 (slots,), of the new tokens; None while prompts are computed
        self.prompt_slots = None  # int64 (N,), slots of the first N prompts of a batch

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs):
        """Store keys and values (B, G, T, D), and return those to attend to."""
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            if self.positions is None:
                stored[self.prompt_slots, :, : new.shape[2]] = new[: len(self.prompt_slots)]
            else:
                stored[self.rows, :, self.positions] = new[:, :, 0]
        return (key, value) if self.positions is None else (self.keys[layer], self.values[layer])

    def get_seq_length(self, layer: int = 0) -> int:
        """Part of the interface; positions are always passed."""
        return 0


class ContinuousBatching:
    """A language model that generates on a fixed number of slots.

    Args:
        model: causal language model of Transformers with full attention, such as Qwen2; its attention is replaced. Its
            generation config has the end tokens.
        sampling: sampling settings.
        slots: number of responses that are generated at the same time.
        longest_prompt: number of tokens of the longest prompt.
        longest: number of tokens of the longest response, if it depends on the text; None: ``max_new_tokens``.

    Raises:
        ValueError: the model's attention is not supported.
    """

    def __init__(self, model, sampling: Sampling, slots: int, longest_prompt: int, longest: int | None = None):
        if set(getattr(model.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise ValueError("continuous batching supports full attention only: use --engine batches")
        model.set_attn_implementation(NAME)
        self.model, self.sampling, self.warpers = model, sampling, _warpers(sampling)
        device, longest = model.device, longest or sampling.max_new_tokens
        self.capacity = -(-(longest_prompt + longest) // BUCKET) * BUCKET
        self.cache = SlotCache(model.config, slots, self.capacity, model.lm_head.weight)
        self.slots = self.cache.rows
        self.last_ids, self.positions, self.lens, self.minimum, self.maximum = torch.zeros(
            5, slots, dtype=torch.long, device=device
        ).unbind()
        self.active, self.ended = torch.zeros(2, slots, dtype=torch.bool, device=device).unbind()
        # One more column, which takes the tokens that follow the end of a response until the next check.
        self.tokens = torch.zeros(slots, longest + 1, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(slots, longest + 1, device=device)
        self.uniform = None
        if sampling.temperature > 0:
            self.uniform = torch.zeros(slots, 2, longest + 1, dtype=torch.float64, device=device)
        self.seen = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(slots, model.config.vocab_size, dtype=torch.bool, device=device)
        self.ends = torch.as_tensor(model.generation_config.eos_token_id, device=device).reshape(-1)
        # Repetition aware sampling sorts and sums all ids, so those that the head's bias excludes are left out: for
        # CosyVoice's own models, 24 of 25.
        self.ids = None
        if sampling.repetition_window and model.lm_head.bias is not None:
            self.ids = (model.lm_head.bias > UNREACHABLE / 2).nonzero()[:, 0]
            self.index_of = torch.full((model.config.vocab_size,), -1, device=device)
            self.index_of[self.ids] = torch.arange(len(self.ids), device=device)
        self.graph = None

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], text_lens: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Response]]:
        """Generate a response to each prompt, in the given order.

        Args:
            prompts: prompts as vocabulary ids; similar lengths should follow one another.
            seeds: one seed per prompt; the same prompt and seed give the same response.
            text_lens: number of tokens of each prompt's text; required if the limits of the sampling depend on it.

        Yields:
            The index of a prompt and its response, soon after the response is complete.

        Raises:
            ValueError: a prompt is empty, or there is no room for it and its longest response.
        """
        limits = [self.sampling.limits(text_len) for text_len in text_lens or [None] * len(prompts)]
        for i, (prompt, (_, most)) in enumerate(zip(prompts, limits, strict=True)):
            if not prompt or len(prompt) + most > self.capacity or most >= self.tokens.shape[1]:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and its response up to {most}; there is room for "
                    f"{self.capacity} in all, and for {self.tokens.shape[1] - 1} of a response"
                )
        waiting, free, indices = deque(range(len(prompts))), deque(self.slots.tolist()), {}
        refill = -(-len(free) // 4)  # computing a few prompts takes as long as many tokens
        while waiting or indices:
            if waiting and len(free) >= min(refill, len(waiting)):
                new = {free.popleft(): waiting.popleft() for _ in range(min(len(free), len(waiting)))}
                indices |= new
                self._admit(list(new), *([values[i] for i in new.values()] for values in (prompts, seeds, limits)))
            for slot, response in self._advance(list(indices)):
                free.append(slot)
                yield indices.pop(slot), response

    @torch.inference_mode()
    def _admit(
        self, slots: list[int], prompts: list[Sequence[int]], seeds: list[int], limits: list[tuple[int, int]]
    ) -> None:
        """Start responses in free slots."""
        device = self.slots.device
        order = sorted(range(len(slots)), key=lambda i: self._bucket(prompts[i]))
        for bucket, group in itertools.groupby(order, key=lambda i: self._bucket(prompts[i])):
            members, rows = list(group), max(1, PREFILL_TOKENS // max(1, bucket))
            for first in range(0, len(members) if bucket else 0, rows):
                self._prefill([(slots[i], prompts[i]) for i in members[first : first + rows]], rows, bucket)
        at = torch.tensor(slots, device=device)
        self.last_ids[at] = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        self.positions[at] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.lens[at], self.active[at], self.ended[at] = 0, True, False
        self.minimum[at], self.maximum[at] = torch.tensor(limits, device=device).unbind(1)
        if self.uniform is not None:
            numbers = _uniform_numbers(seeds, [most for _, most in limits])
            self.uniform[at, :, : numbers.shape[2]] = numbers.to(device)
        if self.seen is not None:
            self.seen[at] = False
            rows = torch.tensor([slot for slot, prompt in zip(slots, prompts, strict=True) for _ in prompt])
            ids = torch.tensor(list(itertools.chain.from_iterable(prompts)))
            self.seen[rows.to(device), ids.to(device)] = True

    @staticmethod
    def _bucket(prompt: Sequence[int]) -> int:
        """Padded length of a prompt without its last token, which is the first one that is computed in its slot."""
        return -(-(len(prompt) - 1) // BUCKET) * BUCKET

    def _prefill(self, members: list[tuple[int, Sequence[int]]], rows: int, length: int) -> None:
        """Compute keys and values of prompts, in a batch of ``rows`` prompts of ``length`` tokens."""
        device = self.slots.device
        ids = torch.zeros(rows, length, dtype=torch.long)
        for row, (_, prompt) in zip(ids, members, strict=False):
            row[: len(prompt) - 1] = torch.tensor(prompt[:-1])
        self.cache.positions, self.cache.prompt_slots = None, torch.tensor([slot for slot, _ in members], device=device)
        self.model.model(
            ids.to(device), attention_mask={"full_attention": None}, past_key_values=self.cache, use_cache=True,
            position_ids=torch.arange(length, device=device)[None],
        )  # fmt: skip

    @torch.inference_mode()
    def _advance(self, occupied: list[int]) -> list[tuple[int, Response]]:
        """Generate some tokens in all slots, and return the responses that ended in the occupied ones."""
        for _ in range(STEPS_PER_CHECK):
            self._step()
        active = self.active.tolist()
        slots = [slot for slot in occupied if not active[slot]]
        if not slots:
            return []
        at = torch.tensor(slots, device=self.slots.device)
        lens = self.lens[at].tolist()
        rows = (value[at, : max(lens)].tolist() for value in (self.tokens, self.log_probs))
        return [
            (slot, Response(ids[:length], log_probs[:length], "eos" if ended else "length"))
            for slot, length, ended, ids, log_probs in zip(slots, lens, self.ended[at].tolist(), *rows, strict=True)
        ]

    def _step(self) -> None:
        """Generate a token in each slot. Nothing here waits for the GPU."""
        logits = self._logits()
        if self.seen is not None:
            logits = _penalise_repetition(logits, self.seen, self.sampling.repetition_penalty)
        if self.sampling.min_token_text_ratio:
            end = self.ends[0]
            logits[:, end] = torch.where(self.lens < self.minimum, -torch.inf, logits[:, end])
        numbers = None if self.uniform is None else self.uniform[self.slots, :, self.lens]
        recent = self._recent() if self.sampling.repetition_window else None
        if self.ids is None:
            choice, log_probs = _next(logits, self.warpers, recent, numbers, self.sampling)
        else:
            recent = torch.where(recent < 0, recent, self.index_of[recent])
            choice, log_probs = _next(logits[:, self.ids], self.warpers, recent, numbers, self.sampling)
            choice = self.ids[choice]
        self.tokens[self.slots, self.lens], self.log_probs[self.slots, self.lens] = choice, log_probs
        if self.seen is not None:
            self.seen.scatter_(1, choice[:, None], True)
        self.lens += self.active
        ended = torch.isin(choice, self.ends) & self.active
        self.ended |= ended
        self.active &= ~ended & (self.lens < self.maximum)
        self.positions += self.active
        self.last_ids.copy_(choice)

    def _recent(self) -> torch.Tensor:
        """The last ids of each response, int64 (slots, window), -1 where there are none yet."""
        places = self.lens[:, None] - 1 - torch.arange(self.sampling.repetition_window, device=self.lens.device)
        return torch.where(places < 0, -1, self.tokens.gather(1, places.clamp(min=0)))

    def _logits(self) -> torch.Tensor:
        """Logits (slots, V) of the next tokens; on a GPU, valid until the next call."""
        if not self.slots.is_cuda:
            return self._forward()
        if self.graph is None:
            self.graph, self.static_logits = self._capture()
        self.graph.replay()
        return self.static_logits

    def _forward(self) -> torch.Tensor:
        self.cache.positions = self.positions
        hidden = self.model.model(
            self.last_ids[:, None], attention_mask={"full_attention": self.positions + 1}, use_cache=True,
            past_key_values=self.cache, position_ids=self.positions[:, None],
        ).last_hidden_state  # fmt: skip
        return self.model.lm_head(hidden[:, -1])

    def _capture(self):
        """Capture :meth:`_forward` as a CUDA graph. Returns the graph and its output."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # computing the same token again stores the same keys and values
            self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward()
        return graph, logits
