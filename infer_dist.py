#!/usr/bin/env python3
"""Synthesise an evaluation set with one or several seeds, on one or several processes.

    torchrun --standalone --nproc-per-node 2 infer_dist.py --llm-path assets/tiny/llm \
        --token2wav-dir assets/tiny/token2wav --eval-set set.jsonl --output-dir out

The set is a JSONL file with ``id``, ``target_text`` and, for zero-shot prompting, ``prompt_text`` and ``prompt_audio``
(a path relative to the set's folder). The outputs for each seed are ``seed_N/wavs/ID.wav`` and
``seed_N/manifest.jsonl``. The manifest has one line per utterance, in the order of the set, with ``wav`` (null if there
is no audio; ``error`` has the reason), ``num_speech_tokens``, ``finish_reason`` ("eos", or "length" if truncated),
``duration_s`` and ``seed``.

An utterance's random numbers depend only on the seed and its id. On a GPU, continuous batching generates the speech
tokens (--engine continuous, tts_grpo/speech/continuous_batching.py): they do not depend on the number of processes, on
interruptions or on the rest of the set, but the waveforms, which are decoded in batches, differ by rounding. On a CPU,
whole batches are generated (--engine batches), which are the same for any number of processes, so that the audio is
reproducible to the byte.

``utterances.rankN.jsonl`` records each utterance with a fingerprint of its text and prompt, and the checksum of its
audio. Another run with the same model and sampling synthesises only the missing utterances: after a crash, after lines
of the set were changed, added or removed, or if a WAV file was deleted or modified. With --engine batches, an utterance
synthesised in another batch than before may differ by rounding from an uninterrupted run.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tts_grpo.speech import distributed, synthesis
from tts_grpo.speech.audio import check_audio, save_audio
from tts_grpo.speech.model_folders import TOKEN2WAV_FILES, token2wav_kind
from tts_grpo.text.jsonl import dump_line, write_json, write_jsonl
from tts_grpo.text.rules import TextRules, usable_eval_set, warnings_of

logger = logging.getLogger(__name__)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    synthesis.add_arguments(parser)
    parser.add_argument("--eval-set", type=Path, required=True, help="JSONL of the test set")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for audio and manifests")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="random seeds; the set is synthesised once per seed"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="utterances per batch")
    parser.add_argument(
        "--engine",
        choices=("auto", "continuous", "batches"),
        default="auto",
        help="generation: continuous batching, or whole batches; auto: continuous on a GPU, batches on a CPU",
    )
    args = parser.parse_args(argv)
    if args.engine == "auto":
        args.engine = "batches" if args.device == "cpu" else "continuous"
    return args


@dataclasses.dataclass(frozen=True)
class Batch:
    """Utterances that are synthesised together with --engine batches."""

    seed: int
    rows: list[dict]


def load_eval_set(path: Path, max_new_tokens: int, rules: TextRules) -> list[dict]:
    """Read and check a whole evaluation set; a set with a fault is not synthesised.

    Raises:
        SystemExit: the set cannot be used, or a recording cannot be read; the message lists the faults.
    """
    try:
        rows = usable_eval_set(path, rules)
        for audio in sorted({row["prompt_audio"] for row in rows if row["prompt_audio"]}):
            check_audio(path.parent / audio)
    except (ValueError, OSError) as error:
        raise SystemExit(f"infer_dist.py: {error}") from error
    for warning in warnings_of(rows, path, max_new_tokens, rules):
        logger.warning("%s", warning)
    return rows


def make_batches(rows: list[dict], seeds: list[int], batch_size: int) -> list[Batch]:
    """Return batches of utterances with similar text lengths, the longest first; a batch has one seed."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["target_text"]), i))
    parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return [Batch(seed, [rows[i] for i in part]) for part in parts for seed in seeds]


def finished_batches(
    args, synthesiser: synthesis.Synthesiser, batches: list[Batch]
) -> Iterator[tuple[int, list[dict], list[synthesis.Synthesised]]]:
    """Synthesise batches, and yield the seed, the utterances and the speech of what is finished."""
    if args.engine == "continuous":
        utterances = [(batch.seed, row) for batch in batches for row in batch.rows]
        yield from synthesiser.synthesise_all(utterances, args.batch_size)
    else:
        for batch in batches:
            yield batch.seed, batch.rows, synthesiser.synthesise(batch.rows, batch.seed)


def save_batch(
    seed: int, rows: list[dict], speeches: list[synthesis.Synthesised], sample_rate_hz: int, output_dir: Path
) -> list[dict]:
    """Write the audio of finished utterances, and return their manifest lines."""
    lines = []
    for row, speech in zip(rows, speeches, strict=True):
        line = row | {
            "seed": seed, "num_speech_tokens": speech.num_speech_tokens,
            "finish_reason": speech.finish_reason, "wav": None, "duration_s": 0.0, "error": "no speech tokens",
        }  # fmt: skip
        if len(speech.waveform):
            line |= {"wav": f"wavs/{row['id']}.wav", "error": None}
            line["duration_s"] = round(len(speech.waveform) / sample_rate_hz, 3)
            save_audio(output_dir / f"seed_{seed}" / line["wav"], speech.waveform, sample_rate_hz)
        lines.append(line)
    return lines


def record_of(lines: list[dict], wanted: dict[str, str], output_dir: Path) -> str:
    """Return the record of a finished batch for :func:`finished`.

    It is one line, so that a crash while it is written loses the whole batch and never a part of it.
    """
    utterances = [
        {"fingerprint": wanted[line["id"]], "wav_sha256": checksum(wav_path(line, output_dir)), "line": line}
        for line in lines
    ]
    return dump_line({"utterances": utterances})


def wav_path(line: dict, output_dir: Path) -> Path | None:
    """Return the path of the audio of a manifest line, or None if it has none."""
    return output_dir / f"seed_{line['seed']}" / line["wav"] if line["wav"] else None


def model_fingerprint(args) -> dict:
    """Return the flags and checksums of weights on which all utterances depend."""
    per_utterance_or_free = ("output_dir", "device", "seeds", "eval_set")
    settings = {name: str(value) for name, value in vars(args).items() if name not in per_utterance_or_free}
    llm = sorted(args.llm_path.resolve().glob("*.safetensors"))
    token2wav = TOKEN2WAV_FILES.get(token2wav_kind(args.token2wav_dir), ())
    return settings | {
        "llm": {path.name: checksum(path) for path in llm},
        "token2wav": {name: checksum(args.token2wav_dir / name) for name in token2wav},
    }


def checksum(path: Path | None) -> str | None:
    """Return the SHA-256 of a file, or None if there is no file."""
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fingerprint(args) -> None:
    """Check that the output folder has no audio from another model or other settings.

    Raises:
        SystemExit: the folder has such audio.
    """
    path, current = args.output_dir / "settings.json", model_fingerprint(args)
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in current if saved.get(key) != current[key])
        if changed:
            raise SystemExit(
                f"infer_dist.py: {args.output_dir} has results of other settings (different: {', '.join(changed)}): "
                "remove it or choose another --output-dir"
            )
    else:
        write_json(path, current)


def fingerprints(rows: list[dict], set_dir: Path) -> dict[str, str]:
    """Return ``id -> fingerprint``: a hash of what the utterance is made from.

    This is text, language, prompt text, the content of the prompt's recording and, if there is one, the instruction.
    """
    recordings = {row["prompt_audio"] for row in rows if row["prompt_audio"]}
    checksums = {path: checksum(set_dir / path) for path in recordings}
    keys = ("target_text", "language", "prompt_text")
    parts = {
        row["id"]: [*(row[key] for key in keys), checksums.get(row["prompt_audio"])]
        + ([row["instruct"]] if "instruct" in row else [])
        for row in rows
    }
    return {utt_id: hashlib.sha256(json.dumps(part).encode()).hexdigest() for utt_id, part in parts.items()}


def finished(output_dir: Path, wanted: dict[str, str]) -> dict[tuple[int, str], dict]:
    """Return the manifest lines of the utterances that earlier runs finished, by seed and id.

    Skipped are lines that a crash truncated, utterances whose text or prompt differs from ``wanted`` (``id ->
    fingerprint``), and utterances whose audio was deleted or modified.
    """
    done = {}
    for path in sorted(output_dir.glob("utterances.rank*.jsonl")):
        for record in path.read_bytes().split(b"\n"):
            try:
                utterances = json.loads(record)["utterances"]
            except ValueError:  # not JSON, or truncated within a character
                continue
            for made in utterances:
                line = made["line"]
                known = made["fingerprint"] == wanted.get(line["id"])
                if known and made["wav_sha256"] == checksum(wav_path(line, output_dir)):
                    done[line["seed"], line["id"]] = line
    return done


def to_do(batches: list[Batch], done: dict[tuple[int, str], dict]) -> list[Batch]:
    """Remove finished utterances and empty batches; a batch without finished utterances is unchanged."""
    left = [
        dataclasses.replace(batch, rows=[row for row in batch.rows if (batch.seed, row["id"]) not in done])
        for batch in batches
    ]
    return [batch for batch in left if batch.rows]


def write_manifests(rows: list[dict], seeds: list[int], done: dict[tuple[int, str], dict], output_dir: Path) -> None:
    """Write one manifest per seed.

    Raises:
        RuntimeError: an utterance was not synthesised.
    """
    for seed in seeds:
        missing = [row["id"] for row in rows if (seed, row["id"]) not in done]
        if missing:
            raise RuntimeError(f"seed {seed}: {len(missing)} utterances were not synthesised, the first: {missing[0]}")
        lines = (done[seed, row["id"]] | row for row in rows)  # the path of a prompt's file may have changed
        write_jsonl(output_dir / f"seed_{seed}" / "manifest.jsonl", lines)


def share_of(args, todo: list[Batch], rank: int, world_size: int) -> list[Batch]:
    """The part of the work of one process: utterances with --engine continuous, whole batches otherwise."""
    if args.engine == "continuous":
        todo = [Batch(batch.seed, [row]) for batch in todo for row in batch.rows]
        todo.sort(key=lambda batch: args.seeds.index(batch.seed))  # fewer unfinished batches after a crash
    return todo[rank::world_size]


def synthesise(args, synthesiser: synthesis.Synthesiser, batches: list[Batch], wanted: dict[str, str], rank: int):
    """Synthesise the work of one process, and record each utterance as soon as its audio is written."""
    started, rate = time.perf_counter(), synthesiser.token2wav.sample_rate_hz
    total = sum(len(batch.rows) for batch in batches)
    progress = tqdm(total=total, desc=f"{args.output_dir.name}, process {rank}", disable=rank > 0)
    with (
        progress,
        (args.output_dir / f"utterances.rank{rank}.jsonl").open("a", encoding="utf-8") as record,
        ThreadPoolExecutor(1) as writer,  # files are written while the next utterances are synthesised
    ):
        record.write("\n")  # ends a line that a crash truncated

        def save(*batch) -> None:
            lines = save_batch(*batch, rate, args.output_dir)
            record.write(record_of(lines, wanted, args.output_dir))
            record.flush()
            progress.update(len(lines))

        saves = deque()
        for batch in finished_batches(args, synthesiser, batches):
            saves.append(writer.submit(save, *batch))
            if len(saves) > 2:
                saves.popleft().result()
        for saved in saves:
            saved.result()
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in synthesiser.seconds.items())
    elapsed_s = time.perf_counter() - started
    logger.info("process %d: %d utterances in %.1f s (%s); --engine %s", rank, total, elapsed_s, parts, args.engine)


def main(argv=None):
    args = get_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    rank, world_size, device = distributed.setup(args.device)
    rules = TextRules(args.language, args.text_tags, args.llm_text)
    rows = load_eval_set(args.eval_set, args.max_new_tokens, rules)
    if rank == 0:
        check_fingerprint(args)
    distributed.barrier()
    wanted = fingerprints(rows, args.eval_set.parent)
    todo = to_do(make_batches(rows, args.seeds, args.batch_size), finished(args.output_dir, wanted))
    distributed.barrier()  # all processes read the records before any process appends to them
    mine = share_of(args, todo, rank, world_size)
    if mine:
        synthesiser = synthesis.Synthesiser(args, device, args.eval_set.parent)
        try:
            synthesiser.check(rows)
        except ValueError as error:
            raise SystemExit(f"infer_dist.py: {args.eval_set}: {error}") from error
        synthesise(args, synthesiser, mine, wanted, rank)
    distributed.barrier()
    if rank == 0:
        write_manifests(rows, args.seeds, finished(args.output_dir, wanted), args.output_dir)
        print(f"{len(rows)} utterances x {len(args.seeds)} seeds: {args.output_dir}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
