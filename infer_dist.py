#!/usr/bin/env python3
"""Speak a test set, with one or several seeds, on one or several processes.

    torchrun --standalone --nproc-per-node 2 infer_dist.py --llm-path ... --eval-set set.jsonl --output-dir out

The set is a JSONL of ``id``, ``target_text`` and, for zero-shot prompting, ``prompt_text`` and ``prompt_audio`` (a
path, relative to the set's folder). Written are, for each seed, ``seed_N/wavs/ID.wav`` and ``seed_N/manifest.jsonl``:
a line an utterance of the set, in its order, with ``wav`` (null if there is none, with the reason in ``error``),
``num_speech_tokens``, ``finish_reason`` ("eos", or "length" where it was cut), ``duration_s`` and ``seed``.

The batches are the same for any number of processes, and what an utterance draws depends on the seed and its id only:
so does the result, to the byte on a CPU; on a GPU, waveforms differ by rounding from run to run. A run that was stopped
goes on where it was, batch by batch.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from tqdm import tqdm

from tts_grpo.speech import distributed, synthesis
from tts_grpo.speech.audio import save_audio
from tts_grpo.text.jsonl import dump_line, read_jsonl, write_json, write_jsonl

logger = logging.getLogger(__name__)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    synthesis.add_arguments(parser)
    parser.add_argument("--eval-set", type=Path, required=True, help="JSONL of the test set")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for audio and manifests")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the set is spoken once with each")
    parser.add_argument("--batch-size", type=int, default=32, help="utterances generated and decoded at once")
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Utterances that are generated and decoded together."""

    name: str
    seed: int
    rows: list[dict]


def load_eval_set(path: Path) -> list[dict]:
    """The utterances of a set.

    Raises:
        ValueError: one lacks its id or text, or an id is not fit for a file name or comes twice; it is named.
    """
    rows, seen = [], set()
    for number, row in enumerate(read_jsonl(path), 1):
        utt_id, text = row.get("id"), row.get("target_text", row.get("text"))
        if not utt_id or not text:
            raise ValueError(f"{path}, utterance {number}: needs id and target_text")
        if utt_id in seen or "/" in utt_id or utt_id.startswith("."):
            raise ValueError(f"{path}, utterance {number}: the id {utt_id!r} comes twice or is no file name")
        if bool(row.get("prompt_text")) != bool(row.get("prompt_audio")):
            raise ValueError(f"{path}, utterance {utt_id}: a prompt needs both prompt_text and prompt_audio")
        seen.add(utt_id)
        rows.append({"id": utt_id, "target_text": text, "prompt_text": row.get("prompt_text") or "",
                     "prompt_audio": row.get("prompt_audio")})  # fmt: skip
    if not rows:
        raise ValueError(f"{path}: no utterance")
    return rows


def make_batches(rows: list[dict], seeds: list[int], batch_size: int) -> list[Batch]:
    """Batches of like text lengths, the longest first, of one seed each."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["target_text"]), i))
    parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return [
        Batch(f"seed_{seed}/batch_{number}", seed, [rows[i] for i in part])
        for number, part in enumerate(parts)
        for seed in seeds
    ]


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


def fingerprint(args) -> dict:
    """What the result depends on."""
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "device", "seeds")}
    weights = sorted(args.llm_path.resolve().glob("*.safetensors"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    eval_set = hashlib.sha256(args.eval_set.read_bytes()).hexdigest()
    return {name: str(value) for name, value in settings.items()} | {"weights": digests, "eval_set_sha256": eval_set}


def check_fingerprint(args) -> None:
    """Refuse to go on with another run's folder.

    Raises:
        SystemExit: the folder holds results of other settings.
    """
    path, current = args.output_dir / "settings.json", fingerprint(args)
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


def finished(output_dir: Path) -> dict[str, list[dict]]:
    """Manifest lines of the batches that earlier runs finished; a line cut short by a crash is none."""
    done = {}
    for path in sorted(output_dir.glob("batches.rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[row["batch"]] = row["lines"]
    return done


def write_manifests(rows: list[dict], seeds: list[int], output_dir: Path) -> None:
    """One manifest a seed.

    Raises:
        RuntimeError: an utterance is missing.
    """
    lines = {(line["seed"], line["id"]): line for batch in finished(output_dir).values() for line in batch}
    for seed in seeds:
        missing = [row["id"] for row in rows if (seed, row["id"]) not in lines]
        if missing:
            raise RuntimeError(f"seed {seed}: {len(missing)} utterances were not spoken, the first: {missing[0]}")
        write_jsonl(output_dir / f"seed_{seed}" / "manifest.jsonl", (lines[seed, row["id"]] for row in rows))


def main(argv=None):
    args = get_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    rank, world_size, device = distributed.setup(args.device)
    rows = load_eval_set(args.eval_set)
    if rank == 0:
        check_fingerprint(args)
    distributed.barrier()
    done = finished(args.output_dir)
    todo = [batch for batch in make_batches(rows, args.seeds, args.batch_size) if batch.name not in done]
    distributed.barrier()  # all have read what is done before anyone adds to it
    mine = todo[rank::world_size]
    if mine:
        synthesiser = synthesis.Synthesiser(args, device, args.eval_set.parent)
        try:
            synthesiser.check_voices(rows)
        except ValueError as error:
            raise SystemExit(f"infer_dist.py: {args.eval_set}: {error}") from error
        progress = tqdm(mine, desc=f"{args.output_dir.name}, process {rank}", unit="batch", disable=rank > 0)
        with (args.output_dir / f"batches.rank{rank}.jsonl").open("a", encoding="utf-8") as record:
            record.write("\n")  # after a line that a crash cut short
            for batch in progress:
                lines = synthesise_batch(synthesiser, batch, args.output_dir)
                record.write(dump_line({"batch": batch.name, "lines": lines}))
                record.flush()
    distributed.barrier()
    if rank == 0:
        write_manifests(rows, args.seeds, args.output_dir)
        print(f"{len(rows)} utterances x {len(args.seeds)} seeds: {args.output_dir}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
