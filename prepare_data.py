#!/usr/bin/env python3
"""Prepare GRPO data: JSONL, or a JSON array, of objects with a ``text`` -> train.parquet and test.parquet for veRL.

JSONL is streamed, and memory grows by one integer per text. Unusable lines (not JSON, no text, no word, tags such as
<|im_end|>, another language, too long a prompt) are skipped, counted, and listed with line number and reason in
rejects.jsonl (for an array, with the number of the element). The run stops without writing parquet files if too many
lines are unusable, if there are fewer texts than a batch has, if too many test texts are also training texts, or if the
evaluation set has a fault. A line may have a ``language`` of its own, zh or en, and an instruction how to speak,
``instruct``; other keys are ignored.

Columns: ``data_source``, ``prompt`` (chat messages; the checkpoint's template renders them), ``ability``,
``reward_model`` (``ground_truth`` is the text), ``extra_info`` (split, index, text, language; see below for
speech_prefix).

A rollout can continue speech. With --speech-prefix recording, the prompt ends with the first 1 to 5 s, and at most
half, of the text's own recording, whose ``speech_tokens`` each line must have; the reward decodes prefix and response
together. With --speech-prefix voice, the prompt has transcript and speech of one of --voices, drawn per text as the
reward server draws its voices; the reward decodes the response alone, in that voice.

    python prepare_data.py --preview 20 --train-file train.jsonl

prints the readings of the first 20 texts and writes nothing.
"""

import argparse
import collections
import functools
import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from tts_grpo.speech.model_folders import language_fault
from tts_grpo.text.input_files import (
    LANGUAGES,
    checked_instruct,
    checked_speech_tokens,
    checked_text,
    read_known_answers,
)
from tts_grpo.text.jsonl import as_object, dump_line, numbered_rows
from tts_grpo.text.prompts import before_text, chat_messages, choose, load_tokenizer, render_prompt, with_speech_role
from tts_grpo.text.rules import (
    TextRules,
    comparison_key,
    is_plain,
    model_text,
    spoken_text,
    usable_eval_set,
    usable_text,
    warnings_of,
)
from tts_grpo.text.tags import control_tokens, find_control_tokens, find_tags
from tts_grpo.text.tokens import TOKEN_HZ

SPLITS = ("train", "test")
BATCH_LINES = 4096
NUM_EXAMPLES = 10
PREFIX_LENGTHS = range(TOKEN_HZ, 5 * TOKEN_HZ + 1)  # 1 to 5 s, as in mair-hub (prepare_data.py:54 at 374bc49)
CHANGED = "changed"
EXTRA_INFO = [("split", pa.string()), ("index", pa.int64()), ("text", pa.string()), ("language", pa.string())]
COLUMNS = [
    ("data_source", pa.string()),
    ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ("ability", pa.string()),
    ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
]
SCHEMA = pa.schema([*COLUMNS, ("extra_info", pa.struct(EXTRA_INFO))])
SCHEMA_WITH_PREFIX = pa.schema(
    [*COLUMNS, ("extra_info", pa.struct([*EXTRA_INFO, ("speech_prefix", pa.list_(pa.int32()))]))]
)
CONTENT_PATTERNS = {"digits": re.compile(r"\d"), "Latin letters": re.compile("[A-Za-zＡ-Ｚａ-ｚ]")}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", type=Path, required=True, help="JSONL or JSON array to train on")
    parser.add_argument("--test-file", type=Path, help="JSONL or JSON array to validate on")
    parser.add_argument("--output-dir", type=Path, help="folder for the parquet and rejects files")
    parser.add_argument("--llm-path", type=Path, help="checkpoint whose template and tokenizer are used")
    parser.add_argument("--eval-set", type=Path, nargs="+", default=[], help="evaluation sets to check as well")
    parser.add_argument("--data-source", default="text-to-speech", help="name of the data in veRL's metrics")
    parser.add_argument("--language", choices=LANGUAGES, default="zh", help="language of lines without one")
    parser.add_argument("--asr-dirs", type=Path, nargs="*", default=[], help="recognisers of the reward: texts in a "
                        "language that one of them does not know are left out")  # fmt: skip
    parser.add_argument("--text-tags", choices=("reject", "remove"), default="reject", help="texts with tags such "
                        "as [laughter]: leave them out, or remove the tags")  # fmt: skip
    parser.add_argument("--llm-text", choices=("raw", "spoken"), default="raw", help="what the language model reads: "
                        "the text as it is, or its numbers in words")  # fmt: skip
    parser.add_argument("--speech-prefix", choices=("none", "recording", "voice"), default="none", help="what the "
                        "rollout of a text continues: nothing, the text's recording, or one of --voices")  # fmt: skip
    parser.add_argument("--voices", type=Path, help="JSONL of voices, of scripts/encode_prompts.py")
    parser.add_argument("--seed", type=int, default=0, help="seed of the reward server, for the choice of a voice")
    parser.add_argument("--max-prompt-length", type=int, default=512, help="maximum prompt length in tokens")
    parser.add_argument(
        "--max-new-tokens", type=int, default=2048, help="maximum number of tokens per utterance in the evaluation"
    )
    parser.add_argument("--max-bad-ratio", type=float, default=0.01, help="largest tolerated share of unusable lines")
    parser.add_argument("--max-test-overlap", type=float, default=0.1, help="largest tolerated share of test "
                        "texts that are also training texts")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=1, help="minimum number of training texts")
    parser.add_argument("--check", action="store_true", help="check all files, and write none")
    parser.add_argument("--preview", type=int, default=0, help="print the readings of this many texts, and exit")
    args = parser.parse_args(argv)
    needed = ("test_file", "llm_path", *(() if args.check else ("output_dir",)))
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]
    if missing and not args.preview:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return args


def rules_of(args) -> TextRules:
    return TextRules(args.language, args.text_tags, args.llm_text)


def rows_with_progress(path: Path) -> Iterator[tuple[int, Any]]:
    """:func:`tts_grpo.text.jsonl.numbered_rows`, with a progress bar in bytes on a terminal."""
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        try:
            yield from numbered_rows(path, bar.update)
        except ValueError as error:
            raise SystemExit(f"prepare_data.py: {error}") from error


def unknown_languages(folders: Iterable[Path]) -> dict[str, str]:
    """Return the languages that a recogniser does not know, each with a message."""
    faults = {(language, language_fault(folder, language)) for folder in folders for language in LANGUAGES}
    return {language: fault for language, fault in sorted(faults, reverse=True) if fault}


def parse_row(row: Any, rules: TextRules) -> tuple[str, TextRules]:
    """Return the text of a usable row, and the rules in its language.

    Raises:
        ValueError: the row cannot be used; the message is the reason.
    """
    rules = rules.of(as_object(row))
    return usable_text(checked_text(row, "text"), rules), rules


class Prefixes:
    """What the rollouts of texts continue; the prefix of a text depends on the text and the seed only."""

    def __init__(self, args):
        self.kind, self.seed, self.voices = args.speech_prefix, args.seed, []
        if self.kind == "voice" and not (args.check and not args.voices.is_file()):  # stage 0 makes the file
            self.voices = read_known_answers(args.voices)

    def of(self, row: dict, text: str) -> tuple[str, list[int]]:
        """Return the transcript that precedes a text in its prompt, and the speech tokens that a rollout continues.

        Raises:
            ValueError: the text's recording is to be continued, and the line has none.
        """
        if self.kind == "recording":
            tokens = checked_speech_tokens(row)
            return "", tokens[: min(choose(PREFIX_LENGTHS, text), len(tokens) // 2)]
        voice = choose(self.voices, text, self.seed)
        return (voice["text"], voice["speech_tokens"]) if voice else ("", [])


class Prompts:
    """Checks the prompts of texts for length and control tokens, with one tokenizer."""

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer, self.max_length, self.control = tokenizer, max_length, frozenset(control_tokens(tokenizer))
        # the template is rendered once per instruction, because rendering is slow and only the text differs
        self.around = functools.cache(
            lambda instruct: render_prompt(tokenizer, "TEXT", instruct=instruct).rsplit("TEXT", 1)
        )
        self.num_control_before = functools.cache(lambda instruct: self._num_control(self._ids([("", instruct)])[0]))

    def _ids(self, texts: list[tuple[str, str]]) -> list[list[int]]:
        prompts = [text.join(self.around(instruct)) for text, instruct in texts]
        return self.tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []

    def _num_control(self, ids: list[int]) -> int:
        return sum(i in self.control for i in ids)

    def faults(self, usable: list["Usable"]) -> list[str]:
        """Return the fault of each text's prompt, or "" if it has none; speech tokens are added to its length."""
        encoded = self._ids([(one.prompt_text, one.instruct) for one in usable])
        return [self._fault(*found) for found in zip(usable, encoded, strict=True)]

    def _fault(self, usable: "Usable", ids: list[int]) -> str:
        if self._num_control(ids) > self.num_control_before(usable.instruct):
            (token,) = find_control_tokens(self.tokenizer, [usable.prompt_text])
            return f"the prompt would contain the control token {token}"
        length = len(ids) + len(usable.speech)
        return f"the prompt has more than {self.max_length} tokens" if length > self.max_length else ""


class Tally:
    """Statistics of the texts of a split, and of its unusable lines."""

    def __init__(self):
        self.kept = self.repeated = 0
        self.bad, self.content_counts, self.keys = collections.Counter(), collections.Counter(), set()
        self.languages = collections.Counter()
        self.first_fault, self.examples = "", []

    def add(self, raw: Any, usable: "Usable | None") -> None:
        """Add a line to the statistics: its raw text, and the usable text if it has one."""
        if not isinstance(raw, str) or is_plain(raw):
            return
        self.content_counts.update(name for name, pattern in CONTENT_PATTERNS.items() if pattern.search(raw))
        self.content_counts["tags"] += bool(find_tags(raw))
        reading = spoken_text(usable.text, usable.rules) if usable else ""
        if usable and reading.replace(" ", "").lower() != without_punctuation(raw):
            self.content_counts[CHANGED] += 1
            if len(self.examples) < NUM_EXAMPLES:
                self.examples.append(f"{raw} -> {reading}")

    def reject(self, number: int, reason: str) -> None:
        self.bad[re.split(r": | \(|, ", reason)[0]] += 1
        self.first_fault = self.first_fault or f"the first: {number}, {reason}"

    def keep(self, texts: list["Usable"]) -> None:
        for usable in texts:
            key = hash(comparison_key(usable.text, usable.rules))
            self.repeated += key in self.keys
            self.keys.add(key)
            self.languages[usable.rules.language] += 1
        self.kept += len(texts)

    def lines(self, name: str) -> Iterator[str]:
        """Yield the lines of the summary."""
        yield f"{name}: {self.kept} samples, {self.bad.total()} lines left out" + (
            f": {dict(self.bad.most_common(5))}" if self.bad else ""
        )
        if len(self.languages) > 1:
            yield f"  languages: {', '.join(f'{name} {count}' for name, count in sorted(self.languages.items()))}"
        counts = [f"{what} {count}" for what, count in self.content_counts.items() if count and what != CHANGED]
        yield f"  number of texts with: {', '.join(counts) or 'digits, Latin letters or tags 0'}"
        if self.repeated:
            yield f"  {self.repeated} texts have the same reading as an earlier one"
        if self.content_counts[CHANGED]:
            yield f"  {self.content_counts[CHANGED]} texts have a reading that differs from the text, such as"
            yield from (f"    {example}" for example in self.examples)


def without_punctuation(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()


class Usable(NamedTuple):
    """A usable text.

    Attributes:
        text: the text.
        rules: the rules in its language.
        prompt_text: what the language model reads.
        speech: speech tokens at the end of the prompt.
        own_speech: those of them that are speech of the text itself.
        instruct: how to speak, or "".
    """

    text: str
    rules: TextRules
    prompt_text: str
    speech: list[int]
    own_speech: list[int]
    instruct: str = ""


def sample(tokenizer, usable: Usable, split: str, index: int, data_source: str) -> dict:
    """Return one row of the parquet file."""
    text = usable.text
    return {
        "data_source": data_source,
        "prompt": chat_messages(tokenizer, usable.prompt_text, speech=usable.speech, instruct=usable.instruct),
        "ability": "text-to-speech",
        "reward_model": {"style": "rule", "ground_truth": text},
        "extra_info": {"split": split, "index": index, "text": text, "language": usable.rules.language}
        | ({"speech_prefix": usable.own_speech} if usable.own_speech else {}),
    }


class Converter:
    """Converts one split after the other to parquet, and counts the unusable lines."""

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.rules = args, tokenizer, rules_of(args)
        self.prompts, self.prefixes = Prompts(tokenizer, args.max_prompt_length), Prefixes(args)
        self.tallies = {split: Tally() for split in SPLITS}
        self.unknown_languages = unknown_languages(args.asr_dirs)

    def convert(self, path: Path, split: str, output: Path, rejects) -> None:
        """Stream one file to ``output``; rejected lines are written to the file object ``rejects``."""
        tally, schema = self.tallies[split], SCHEMA_WITH_PREFIX if self.prefixes.kind == "recording" else SCHEMA
        with pq.ParquetWriter(output, schema) as writer:
            for batch in batched(rows_with_progress(path), BATCH_LINES):
                texts = self._usable(batch, path, tally, rejects)
                rows = [
                    sample(self.tokenizer, usable, split, tally.kept + i, self.args.data_source)
                    for i, usable in enumerate(texts)
                ]
                tally.keep(texts)
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))

    def _parse(self, row: Any) -> tuple[Usable | None, str]:
        """Return ``(usable, "")`` for a usable line, or ``(None, reason)``; its prompt has not been checked."""
        try:
            text, rules = parse_row(row, self.rules)
            if fault := self.unknown_languages.get(rules.language):
                return None, fault
            instruct = checked_instruct(row)
            before_text(self.tokenizer, instruct)
            # a voice's recording would fix the manner of speaking (tts_grpo/text/prompts.py)
            before, speech = ("", []) if instruct and self.prefixes.kind == "voice" else self.prefixes.of(row, text)
        except ValueError as error:
            return None, str(error)
        own_speech = [] if before else speech
        return Usable(text, rules, model_text(before + text, rules), speech, own_speech, instruct), ""

    def _usable(self, batch, path: Path, tally: Tally, rejects) -> list[Usable]:
        """Return the usable texts of a batch."""
        parsed = [(number, row, *self._parse(row)) for number, row in batch]
        found = [usable for _, _, usable, _ in parsed if usable]
        faults = iter(self.prompts.faults(found))
        texts = []
        for number, row, usable, reason in parsed:
            fault = next(faults) if usable else reason
            tally.add(row.get("text") if isinstance(row, dict) else None, None if fault else usable)
            if fault:
                tally.reject(number, fault)
                rejects.write(dump_line({"file": str(path), "line": number, "reason": fault}))
            else:
                texts.append(usable)
        return texts

    def check(self, split: str, path: Path, rejects_path: Path) -> None:
        """Check the number of usable lines of a split.

        Raises:
            SystemExit: too many lines are unusable, or none is usable.
        """
        tally, most = self.tallies[split], self.args.max_bad_ratio
        bad, total = tally.bad.total(), tally.bad.total() + tally.kept
        if bad > most * total:
            raise SystemExit(
                f"prepare_data.py: {bad} of {total} lines of {path} cannot be used ({dict(tally.bad.most_common(5))}, "
                f"{tally.first_fault}), more than --max-bad-ratio {most} allows"
                + ("" if self.args.check else f". They are listed in {rejects_path}")
            )
        if not tally.kept:
            raise SystemExit(f"prepare_data.py: {path} has no usable line")

    def check_size(self) -> None:
        """Check the number of training texts.

        Raises:
            SystemExit: there are fewer texts than a batch has.
        """
        if self.tallies["train"].kept < self.args.batch_size:
            raise SystemExit(
                f"prepare_data.py: {self.args.train_file} has {self.tallies['train'].kept} usable texts, fewer than "
                f"the {self.args.batch_size} of a training step: add texts, or lower train_batch_size"
            )

    def check_overlap(self, path: Path, keys: set[int]) -> str:
        """Return a message with the number of a test file's texts that are also training texts.

        Raises:
            SystemExit: there are too many of them.
        """
        both = len(keys & self.tallies["train"].keys)
        message = f"{both} of the {len(keys)} texts of {path} are training texts as well"
        if both > self.args.max_test_overlap * len(keys):
            raise SystemExit(
                f"prepare_data.py: {message}, more than max_test_overlap={self.args.max_test_overlap} allows: take "
                f"them out of {self.args.train_file}, or set max_test_overlap"
            )
        return message


def check_eval_set(path: Path, args, prompts: Prompts) -> tuple[set[int], list[str]]:
    """Return the hashes of an evaluation set's comparison keys, and warnings about the set.

    Raises:
        SystemExit: an utterance cannot be synthesised; the message lists the faults.
    """
    rules = rules_of(args)
    try:
        rows = usable_eval_set(path, rules)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_data.py: {error}") from error
    texts = [model_text(row["prompt_text"] + row["target_text"], rules.of(row)) for row in rows]
    token = find_control_tokens(prompts.tokenizer, texts)
    if wrong := next((row["id"] for row, token in zip(rows, token, strict=True) if token), None):
        raise SystemExit(f"prepare_data.py: {path}: the prompt of {wrong} would contain a control token")
    for row in rows:
        try:
            before_text(prompts.tokenizer, row.get("instruct", ""))
        except ValueError as error:
            raise SystemExit(f"prepare_data.py: {path}: {row['id']}: {error}") from error
    return {hash(comparison_key(row["target_text"], rules.of(row))) for row in rows}, warnings_of(
        rows, path, args.max_new_tokens, rules
    )


def preview(args) -> None:
    """Print the readings of the first texts."""
    from tts_grpo.text.units import sentence

    rules = rules_of(args)
    for number, row in itertools.islice(numbered_rows(args.train_file), args.preview):
        try:
            text, its_rules = parse_row(row, rules)
        except ValueError as reason:
            print(f"{number}  {reason}")
            continue
        print(f"{number}  {text}")
        print(f"   model   {model_text(text, its_rules)}\n   spoken  {spoken_text(text, its_rules)}")
        print(f"   units   {' '.join(unit.written[0] for unit in sentence(text, its_rules.language).units)}")


def batched(items: Iterator, size: int) -> Iterator[tuple]:
    """Yield ``items`` in tuples of ``size``; the last one may be shorter (itertools has this from Python 3.12 on)."""
    items = iter(items)
    while batch := tuple(itertools.islice(items, size)):
        yield batch


def convert_all(args, converter: Converter) -> None:
    """Write both parquet files if all checks pass."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rejects_path = args.output_dir / "rejects.jsonl"
    parts = {split: args.output_dir / f"{split}.parquet.part" for split in SPLITS}
    try:
        with rejects_path.open("w", encoding="utf-8") as rejects:
            for split, path in (("test", args.test_file), ("train", args.train_file)):
                converter.convert(path, split, parts[split], rejects)
                rejects.flush()
                converter.check(split, path, rejects_path)
        converter.check_size()
        messages = [converter.check_overlap(args.test_file, converter.tallies["test"].keys)]
        for path in args.eval_set:
            keys, warnings = check_eval_set(path, args, converter.prompts)
            messages += [converter.check_overlap(path, keys), *warnings]
        for split, part in parts.items():
            part.replace(args.output_dir / f"{split}.parquet")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    for split in SPLITS:
        print("\n".join(converter.tallies[split].lines(split)))
    print("\n".join(messages))


def main(argv=None):
    args = get_args(argv)
    try:
        if args.preview:
            preview(args)
            return
        if fault := unknown_languages(args.asr_dirs).get(args.language):
            raise SystemExit(f"prepare_data.py: language={args.language}: {fault}: set reward_asr_dir to another one")
        for path in (args.train_file, args.test_file):
            if not path.is_file():
                raise SystemExit(f"prepare_data.py: {path} is missing")
        tokenizer = load_tokenizer(args.llm_path)
        if args.speech_prefix != "none":
            tokenizer.chat_template = with_speech_role(tokenizer.chat_template)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_data.py: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        if args.check:
            args.output_dir = Path(scratch)
        convert_all(args, Converter(args, tokenizer))


if __name__ == "__main__":
    main()
