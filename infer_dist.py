#!/usr/bin/env python3
"""Synthesise an evaluation set, with one or several seeds, on one or several processes.

    torchrun --standalone --nproc-per-node 2 infer_dist.py --llm-path assets/tiny/llm \
        --token2wav-dir assets/tiny/token2wav --eval-set set.jsonl --output-dir out

The set is a JSONL of ``id``, ``target_text`` and, for zero-shot prompting, ``prompt_text`` and ``prompt_audio`` (a
path, relative to the set's folder). Written are, for each seed, ``seed_N/wavs/ID.wav`` and ``seed_N/manifest.jsonl``:
one line per utterance of the set, in its order, with ``wav`` (null if there is none, with the reason in ``error``),
``num_speech_tokens``, ``finish_reason`` ("eos", or "length" where it was cut), ``duration_s`` and ``seed``.

The batches are the same for any number of processes, and the random numbers of an utterance depend on the seed and its
id only: so does the result, to the byte on a CPU; on a GPU, waveforms differ by rounding from run to run.

Each utterance is recorded with the fingerprint of its text and prompt and the checksum of its audio, in
``utterances.rankN.jsonl``. Another run with the same model and sampling makes only what is missing: after a crash,
after lines of the set were changed, added or removed, or where a WAV file is gone or is no longer what was written.
Utterances that are made in other batches than before may differ from an undisturbed run by rounding.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="random seeds, one pass over the set each")
    parser.add_argument("--batch-size", type=int, default=32, help="utterances per batch")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Utterances that are generated and decoded together."""

    seed: int
    rows: list[dict]


def load_eval_set(path: Path, max_new_tokens: int, rules: TextRules) -> list[dict]:
    """The utterances of a set, checked whole: nothing is spoken of a set with a fault.

    Raises:
        SystemExit: the set cannot be used, or a recording cannot be read; the faults are named.
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
    """Batches of like text lengths, the longest first, of one seed each."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["target_text"]), i))
    parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return [Batch(seed, [rows[i] for i in part]) for part in parts for seed in seeds]


def synthesise_batch(synthesiser: synthesis.Synthesiser, batch: Batch, output_dir: Path) -> list[dict]:
    """Write a batch's audio; its manifest lines."""
    rate, lines = synthesiser.token2wav.sample_rate_hz, []
    for row, speech in zip(batch.rows, synthesiser.synthesise(batch.rows, batch.seed), strict=True):
        line = row | {
            "seed": batch.seed, "num_speech_tokens": speech.num_speech_tokens,
            "finish_reason": speech.finish_reason, "wav": None, "duration_s": 0.0, "error": "no speech tokens",
        }  # fmt: skip
        if len(speech.waveform):
            line |= {"wav": f"wavs/{row['id']}.wav", "error": None}
            line["duration_s"] = round(len(speech.waveform) / rate, 3)
            save_audio(output_dir / f"seed_{batch.seed}" / line["wav"], speech.waveform, rate)
        lines.append(line)
    return lines


def record_of(lines: list[dict], wanted: dict[str, str], output_dir: Path) -> str:
    """What is noted of a batch that was made, as one line that a crash cuts as a whole; for :func:`finished`."""
    utterances = [
        {"fingerprint": wanted[line["id"]], "wav_sha256": checksum(wav_path(line, output_dir)), "line": line}
        for line in lines
    ]
    return dump_line({"utterances": utterances})


def wav_path(line: dict, output_dir: Path) -> Path | None:
    """Where the audio of a manifest line is."""
    return output_dir / f"seed_{line['seed']}" / line["wav"] if line["wav"] else None


def model_fingerprint(args) -> dict:
    """What all utterances depend on: flags and weights."""
    per_utterance_or_free = ("output_dir", "device", "seeds", "eval_set")
    settings = {name: str(value) for name, value in vars(args).items() if name not in per_utterance_or_free}
    llm = sorted(args.llm_path.resolve().glob("*.safetensors"))
    token2wav = TOKEN2WAV_FILES.get(token2wav_kind(args.token2wav_dir), ())
    return settings | {
        "llm": {path.name: checksum(path) for path in llm},
        "token2wav": {name: checksum(args.token2wav_dir / name) for name in token2wav},
    }


def checksum(path: Path | None) -> str | None:
    """SHA-256 of a file, None if there is none."""
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fingerprint(args) -> None:
    """Refuse to go on in a folder with speech of another model or of other settings.

    Raises:
        SystemExit: the folder holds such speech.
    """
    path, current = args.output_dir / "settings.json", model_fingerprint(args)
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in current if saved.get(key) != current[key])
        if changed:
            raise SystemExit(
                f"infer_dist.py: {args.output_dir} holds results of other settings (differing: {', '.join(changed)}): "
                "remove it or choose another --output-dir"
            )
    else:
        write_json(path, current)


def fingerprints(rows: list[dict], set_dir: Path) -> dict[str, str]:
    """``id -> fingerprint`` of the utterances: text, prompt text and the content of the prompt's recording."""
    recordings = {row["prompt_audio"] for row in rows if row["prompt_audio"]}
    checksums = {path: checksum(set_dir / path) for path in recordings}
    parts = {row["id"]: [row["target_text"], row["prompt_text"], checksums.get(row["prompt_audio"])] for row in rows}
    return {utt_id: hashlib.sha256(json.dumps(part).encode()).hexdigest() for utt_id, part in parts.items()}


def finished(output_dir: Path, wanted: dict[str, str]) -> dict[tuple[int, str], dict]:
    """Manifest lines of what earlier runs made, by seed and id.

    A line cut short by a crash is none. Left out is also what was made of another text or prompt than ``wanted``
    (``id -> fingerprint``), and what has no longer the audio that was written.
    """
    done = {}
    for path in sorted(output_dir.glob("utterances.rank*.jsonl")):
        for record in path.read_bytes().split(b"\n"):
            try:
                utterances = json.loads(record)["utterances"]
            except ValueError:  # no JSON, or cut within a character
                continue
            for made in utterances:
                line = made["line"]
                known = made["fingerprint"] == wanted.get(line["id"])
                if known and made["wav_sha256"] == checksum(wav_path(line, output_dir)):
                    done[line["seed"], line["id"]] = line
    return done


def to_do(batches: list[Batch], done: dict[tuple[int, str], dict]) -> list[Batch]:
    """What of the batches is not done; a batch of which nothing is done stays as it is."""
    left = [
        dataclasses.replace(batch, rows=[row for row in batch.rows if (batch.seed, row["id"]) not in done])
        for batch in batches
    ]
    return [batch for batch in left if batch.rows]


def write_manifests(rows: list[dict], seeds: list[int], done: dict[tuple[int, str], dict], output_dir: Path) -> None:
    """One manifest per seed.

    Raises:
        RuntimeError: an utterance is missing.
    """
    for seed in seeds:
        missing = [row["id"] for row in rows if (seed, row["id"]) not in done]
        if missing:
            raise RuntimeError(f"seed {seed}: {len(missing)} utterances were not synthesised, the first: {missing[0]}")
        lines = (done[seed, row["id"]] | row for row in rows)  # a prompt's file may have moved
        write_jsonl(output_dir / f"seed_{seed}" / "manifest.jsonl", lines)


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
    distributed.barrier()  # all have read what is done before anyone adds to it
    mine = todo[rank::world_size]
    if mine:
        synthesiser = synthesis.Synthesiser(args, device, args.eval_set.parent)
        try:
            synthesiser.check(rows)
        except ValueError as error:
            raise SystemExit(f"infer_dist.py: {args.eval_set}: {error}") from error
        progress = tqdm(mine, desc=f"{args.output_dir.name}, process {rank}", unit="batch", disable=rank > 0)
        with (args.output_dir / f"utterances.rank{rank}.jsonl").open("a", encoding="utf-8") as record:
            record.write("\n")  # after a line that a crash cut short
            for batch in progress:
                lines = synthesise_batch(synthesiser, batch, args.output_dir)
                record.write(record_of(lines, wanted, args.output_dir))
                record.flush()
    distributed.barrier()
    if rank == 0:
        write_manifests(rows, args.seeds, finished(args.output_dir, wanted), args.output_dir)
        print(f"{len(rows)} utterances x {len(args.seeds)} seeds: {args.output_dir}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
