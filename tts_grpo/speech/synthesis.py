"""Texts -> speech: language model and token2wav as the evaluation uses them, for infer_dist.py and infer_single.py.

An utterance is an entry of an evaluation set: ``id``, ``target_text`` and, for zero-shot prompting, ``prompt_text`` and
``prompt_audio``. Its random numbers depend on the seed and its id only, so the same utterance synthesised alone is the
one of the evaluation; in another batch it may differ by rounding.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tts_grpo.speech.continuous_batching import ContinuousBatching
from tts_grpo.speech.decoder import PromptVoice
from tts_grpo.speech.distributed import cores_per_process
from tts_grpo.speech.generation import (
    LM_PRECISIONS,
    Sampling,
    Utterance,
    generate_speech_tokens,
    load_lm,
    utterance_of,
)
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.prompts import before_text, render_prompt
from tts_grpo.text.rules import TextRules, model_text
from tts_grpo.text.spoken import LANGUAGES
from tts_grpo.text.tags import find_control_tokens
from tts_grpo.text.tokens import speech_token_str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a :class:`Synthesiser`."""
    parser.add_argument("--llm-path", type=Path, required=True, help="Hugging Face folder of the language model")
    parser.add_argument("--token2wav-dir", type=Path, required=True, help="folder of the token2wav weights")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: one GPU per process")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision of CosyVoice2's token2wav"
    )
    parser.add_argument(
        "--lm-precision",
        choices=LM_PRECISIONS,
        help="precision of the language model; by default fp32 on a CPU and bf16 on a GPU",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling threshold; 1.0: off")
    parser.add_argument("--top-k", type=int, default=-1, help="sample from the K most likely tokens only; -1: off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="penalty on earlier token ids; 1.0: off")
    parser.add_argument("--repetition-window", type=int, default=0, help="repetition aware sampling, as CosyVoice's: a "
                        "token among this many last ones is replaced; 0: off")  # fmt: skip
    parser.add_argument("--min-token-text-ratio", type=float, default=0.0, help="minimum number of tokens per token of "
                        "the text; 0: none")  # fmt: skip
    parser.add_argument("--max-token-text-ratio", type=float, default=0.0, help="maximum number of tokens per token of "
                        "the text; 0: --max-new-tokens")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=512, help="maximum number of tokens per utterance")
    parser.add_argument("--language", choices=LANGUAGES, default="zh", help="language of texts without one")
    parser.add_argument(
        "--text-tags",
        choices=("reject", "remove"),
        default="reject",
        help="texts with tags such as [laughter]: reject them, or remove the tags",
    )
    parser.add_argument(
        "--llm-text",
        choices=("raw", "spoken"),
        default="raw",
        help="what the language model reads: texts as they are, or with numbers and signs in words",
    )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How tokens are chosen, from the flags of :func:`add_arguments`."""
    names = (field.name for field in dataclasses.fields(Sampling))
    return Sampling(**{name: getattr(args, name) for name in names})


def utterance_seed(seed: int, utt_id: str) -> int:
    """Seed of one utterance's sampling."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{utt_id}".encode()).digest()[:7], "big")


@dataclasses.dataclass(frozen=True)
class Synthesised:
    """One utterance's speech.

    Attributes:
        waveform: float32 (T,); empty if the model generated no speech token.
        finish_reason: "eos" if the model ended by itself, "length" if the utterance was cut.
    """

    waveform: np.ndarray
    num_speech_tokens: int
    finish_reason: str


class Synthesiser:
    """Language model and token2wav of this process.

    Args:
        args: the flags of :func:`add_arguments`.
        device: torch device.
        prompt_dir: folder that the paths of prompt recordings are relative to.

    Attributes:
        seconds: total time so far in ``prompts``, ``generation`` and ``token2wav``, in seconds.
    """

    def __init__(self, args: argparse.Namespace, device: str, prompt_dir: Path):
        dtype = args.lm_precision and LM_PRECISIONS[args.lm_precision]
        self.model, self.tokenizer = load_lm(args.llm_path, device, dtype)
        self.token2wav = load_token2wav(args.token2wav_dir, device, args.precision)
        self.sampling = sampling_of(args)
        self.rules = TextRules(args.language, args.text_tags, args.llm_text)
        self.prompt_dir, self.voices = prompt_dir, {}
        self.seconds = dict.fromkeys(("prompts", "generation", "token2wav"), 0.0)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Context whose duration is added to a part of ``seconds``."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def texts(self, row: dict) -> tuple[str, str]:
        """An utterance's texts of prompt and target, as the language model reads them."""
        rules = self.rules.of(row)
        return model_text(row["prompt_text"], rules), model_text(row["target_text"], rules)

    def check(self, utterances: Sequence[dict]) -> None:
        """Refuse utterances without the prompt that this token2wav needs, and texts with control tokens.

        Raises:
            ValueError: there are some; the first is named.
        """
        found = find_control_tokens(self.tokenizer, ["".join(self.texts(row)) for row in utterances])
        for row, token in zip(utterances, found, strict=True):
            if token:
                raise ValueError(f"the text of {row['id']} contains the control token {token}: remove it")
        for row in utterances:
            try:
                before_text(self.tokenizer, row.get("instruct", ""))
            except ValueError as error:
                raise ValueError(f"{row['id']}: {error}") from None
        without = [row["id"] for row in utterances if not row["prompt_audio"]]
        if self.token2wav.needs_voice and without:
            raise ValueError(
                f"{len(without)} utterances have no prompt, {without[0]} first, and this token2wav needs one: add "
                "prompt_audio and prompt_text to them, or remove them"
            )

    def voice(self, row: dict) -> PromptVoice | None:
        """The prompt voice of an utterance, or None; each is read once."""
        if not row["prompt_audio"]:
            return None
        key = (row["prompt_audio"], row["prompt_text"])
        if key not in self.voices:
            voice = load_prompt_voice(self.token2wav, self.prompt_dir / key[0], key[1])
            self.token2wav.prepare_voice(voice)
            self.voices[key] = voice
        return self.voices[key]

    def prompts(self, utterances: Sequence[dict]) -> list[str]:
        """What the language model reads for each utterance."""
        with self.timed("prompts"), ThreadPoolExecutor(cores_per_process()) as pool:
            distinct = {(row["prompt_audio"], row["prompt_text"]): row for row in utterances}
            list(pool.map(self.voice, distinct.values()))
            voices = [self.voice(row) for row in utterances]
            return [
                render_prompt(
                    self.tokenizer, target, prompt, voice.prompt_speech_tokens if voice else (), row.get("instruct", "")
                )
                for row, (prompt, target), voice in zip(utterances, map(self.texts, utterances), voices, strict=True)
            ]

    def synthesise(self, utterances: Sequence[dict], seed: int) -> list[Synthesised]:
        """Synthesise utterances as one batch."""
        prompts = self.prompts(utterances)
        seeds = [utterance_seed(seed, row["id"]) for row in utterances]
        with self.timed("generation"):
            generated = generate_speech_tokens(
                self.model, self.tokenizer, prompts, seeds, self.sampling, len(prompts),
                texts=[self.texts(row)[1] for row in utterances],
            )  # fmt: skip
        return self.decode(utterances, generated, seed)

    def synthesise_all(
        self, utterances: Sequence[tuple[int, dict]], batch_size: int
    ) -> Iterator[tuple[int, list[dict], list[Synthesised]]]:
        """Synthesise utterances with continuous batching, which replaces the attention of this object's model.

        Args:
            utterances: seeds and utterances; similar lengths should follow one another.
            batch_size: number of utterances that are generated at the same time, and that are decoded as a batch.

        Yields:
            Batches of finished utterances: their seed, the utterances and their speech.
        """
        prompts = self.prompts([row for _, row in utterances])
        encoded = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        seeds = [utterance_seed(seed, row["id"]) for seed, row in utterances]
        targets = [self.texts(row)[1] for _, row in utterances]
        text_lens = [len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in targets]
        longest = max(self.sampling.limits(text_len)[1] for text_len in text_lens)
        with self.timed("generation"):
            engine = ContinuousBatching(self.model, self.sampling, batch_size, max(map(len, encoded)), longest)
        first_speech_id = self.tokenizer.convert_tokens_to_ids(speech_token_str(0))
        responses, ended = engine.generate(encoded, seeds, text_lens), defaultdict(list)
        while True:
            with self.timed("generation"):
                i, response = next(responses, (None, None))
            if i is None:
                break
            seed, row = utterances[i]
            ended[seed].append((row, utterance_of(response, first_speech_id)))
            if len(ended[seed]) == batch_size:
                yield self._finished(seed, ended.pop(seed))
        for seed, batch in ended.items():
            yield self._finished(seed, batch)

    def _finished(
        self, seed: int, batch: Sequence[tuple[dict, Utterance]]
    ) -> tuple[int, list[dict], list[Synthesised]]:
        """A batch of :meth:`synthesise_all`."""
        rows, generated = map(list, zip(*batch, strict=True))
        return seed, rows, self.decode(rows, generated, seed)

    def decode(self, utterances: Sequence[dict], generated: Sequence[Utterance], seed: int) -> list[Synthesised]:
        """Decode the speech tokens of utterances, as one batch."""
        voices = [self.voice(row) for row in utterances]
        tokens = [utterance.speech_tokens for utterance in generated]
        with self.timed("token2wav"):
            waveforms = decode(self.token2wav, tokens, voices, seed, len(tokens))
        return [
            Synthesised(waveform, len(utterance.speech_tokens), utterance.finish_reason)
            for utterance, waveform in zip(generated, waveforms, strict=True)
        ]
