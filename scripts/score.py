"""Transcribe and score what infer_dist.py spoke: scores.json, utterances.jsonl, alignment.txt.

Units of the error rates: characters (CER) and pinyin syllables with and without tones, both texts normalised alike
(tts_grpo/text.py). Rates are total errors over total units (micro). An utterance of the set without audio, or with
audio that cannot be read, is scored as all deletions and counted: it can never make a score better.
"""

import argparse
import hashlib
import importlib.metadata
import logging
from pathlib import Path

import torch

from tts_grpo.asr import SenseVoice
from tts_grpo.audio import load_audio
from tts_grpo.jsonl import read_jsonl, write_json, write_jsonl, write_text
from tts_grpo.metrics import UNITS, ErrorCounts, align, count_errors
from tts_grpo.text import characters

CHUNK = 256  # recordings in memory at once


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder with seed_*/manifest.jsonl")
    parser.add_argument("--eval-set", type=Path, required=True, help="JSONL of the test set")
    parser.add_argument("--asr-dir", type=Path, required=True, help="SenseVoice folder of the evaluation recogniser")
    parser.add_argument("--device", default="cpu", help="torch device")
    return parser.parse_args(argv)


def utterances_of(manifest: Path, eval_set: list[dict]) -> list[dict]:
    """A line for each utterance of the set, from the manifest where it is there; ``audio`` is a path or None."""
    lines = {line["id"]: line for line in read_jsonl(manifest)}
    found = []
    for row in eval_set:
        line = lines.get(row["id"], {"error": "not in the manifest"})
        wav = manifest.parent / line["wav"] if line.get("wav") else None
        found.append({
            "id": row["id"], "target_text": row.get("target_text", row.get("text")), "audio": wav,
            "error": line.get("error"), "finish_reason": line.get("finish_reason"),
            "num_speech_tokens": line.get("num_speech_tokens", 0), "duration_s": line.get("duration_s", 0.0),
        })  # fmt: skip
    return found


def transcribe(asr: SenseVoice, utterances: list[dict]) -> None:
    """Add ``hypothesis`` to each utterance; unreadable audio gives an empty one and a reason in ``error``."""
    for utterance in utterances:
        utterance["hypothesis"] = ""
    for first in range(0, len(utterances), CHUNK):
        readable, recordings = [], []
        for utterance in utterances[first : first + CHUNK]:
            if utterance["audio"] is None:
                utterance["error"] = utterance["error"] or "no audio"
                continue
            try:
                recordings.append(load_audio(utterance["audio"]))
                readable.append(utterance)
            except ValueError as error:
                utterance["error"] = str(error)
        for utterance, hypothesis in zip(readable, asr.transcribe(recordings), strict=True):
            utterance["hypothesis"] = hypothesis


def score(utterances: list[dict]) -> dict[str, ErrorCounts]:
    """Add error counts to each utterance (``errors``: by metric, substitutions, deletions, insertions, length).

    Returns:
        their sums by metric.
    """
    totals = {metric: ErrorCounts() for metric in UNITS}
    for utterance in utterances:
        utterance["errors"] = {}
        for metric, units in UNITS.items():
            counts = count_errors(units(utterance["target_text"]), units(utterance["hypothesis"]))
            totals[metric] += counts
            utterance["errors"][metric] = vars(counts)
    return totals


def alignment_text(utterances: list[dict]) -> str:
    """Alignments by character, as Kaldi's wer_per_utt_details.pl writes them: ref, hyp, op, #csid."""
    lines = []
    for utterance in utterances:
        pairs = align(characters(utterance["target_text"]), characters(utterance["hypothesis"]))
        operations = ["I" if ref is None else "D" if hyp is None else "C" if ref == hyp else "S" for ref, hyp in pairs]
        rows = {
            "ref": [ref or "***" for ref, _ in pairs], "hyp": [hyp or "***" for _, hyp in pairs], "op": operations,
            "#csid": [str(operations.count(kind)) for kind in "CSID"],
        }  # fmt: skip
        lines += [f"{utterance['id']} {name} {' '.join(row)}\n" for name, row in rows.items()]
    return "".join(lines)


def rates(totals: dict[str, ErrorCounts]) -> dict:
    """Rates and counts by metric, for scores.json."""
    return {metric: {"rate": counts.rate, **vars(counts)} for metric, counts in totals.items()}


def describe(utterances: list[dict]) -> dict:
    """What else a seed's utterances tell: failures, ends, and length against the text."""
    num_characters = sum(len(characters(u["target_text"])) for u in utterances)
    return {
        "utterances": len(utterances),
        "failed": sum(bool(u["error"]) for u in utterances),
        "eos_share": sum(u["finish_reason"] == "eos" for u in utterances) / len(utterances),
        "tokens_per_character": sum(u["num_speech_tokens"] for u in utterances) / num_characters,
    }


def score_seed(manifest: Path, eval_set: list[dict], asr: SenseVoice) -> tuple[dict[str, ErrorCounts], dict]:
    """Score one manifest and write its details beside it; the sums and the entry of scores.json."""
    utterances = utterances_of(manifest, eval_set)
    transcribe(asr, utterances)
    totals = score(utterances)
    for utterance in utterances:
        utterance["audio"] = str(utterance["audio"]) if utterance["audio"] else None
    write_jsonl(manifest.parent / "utterances.jsonl", utterances)
    write_text(manifest.parent / "alignment.txt", alignment_text(utterances))
    return totals, {**rates(totals), **describe(utterances)}


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # funasr's
    manifests = sorted(args.output_dir.glob("seed_*/manifest.jsonl"), key=lambda p: int(p.parent.name[5:]))
    if not manifests:
        raise SystemExit(f"score.py: no seed_*/manifest.jsonl in {args.output_dir}: run the inference first")
    eval_set = read_jsonl(args.eval_set)
    asr = SenseVoice(args.asr_dir, args.device)
    seeds, pooled = {}, {metric: ErrorCounts() for metric in UNITS}
    for manifest in manifests:
        totals, seeds[manifest.parent.name[5:]] = score_seed(manifest, eval_set, asr)
        pooled = {metric: pooled[metric] + totals[metric] for metric in UNITS}
    result = {
        "pooled": rates(pooled), "seeds": seeds, "asr_dir": str(args.asr_dir),
        "asr_sha256": hashlib.sha256((args.asr_dir / "model.pt").read_bytes()).hexdigest(),
        "eval_set_sha256": hashlib.sha256(args.eval_set.read_bytes()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "funasr", "pypinyin", "rapidfuzz")},
    }  # fmt: skip
    write_json(args.output_dir / "scores.json", result)
    for metric, counts in pooled.items():
        print(f"{metric}: {counts.rate:.2%} ({counts.substitutions} substitutions, {counts.deletions} deletions, "
              f"{counts.insertions} insertions, {counts.length} units)")  # fmt: skip
    failed = sum(seed["failed"] for seed in seeds.values())
    print(f"{len(eval_set)} utterances x {len(seeds)} seeds, {failed} without usable audio: {args.output_dir}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
