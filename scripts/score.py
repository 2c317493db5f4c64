"""Transcribe and score the speech of infer_dist.py; writes scores.json, utterances.jsonl and alignment.txt.

Computes error rates by the protocols of tts_grpo/evaluation/protocols.py, and the speech-quality metrics that error
rates miss (tts_grpo/speech/quality.py), each with a 95% interval over utterances. An utterance is scored as all
deletions, and counted as failed, if it has no audio, or if its audio cannot be read or has another length than the
manifest says. No utterance is left out of a score.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import logging
from pathlib import Path

import numpy as np
import torch

from tts_grpo.evaluation.aggregate import ERRORS, JUDGE_ERRORS, quality, rates
from tts_grpo.evaluation.protocols import (
    MAIN_METRIC,
    METRICS,
    align_units,
    count_all,
    prepare_hypothesis,
    set_language,
)
from tts_grpo.speech.asr.loading import load_asr
from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.model_folders import language_fault
from tts_grpo.speech.nets.metrics import NetworkMetrics
from tts_grpo.speech.quality import QUALITY_METRICS, basic_metrics, evenly_spaced, worst_values
from tts_grpo.text.jsonl import read_jsonl, write_json, write_jsonl, write_text
from tts_grpo.text.rules import TextRules, usable_eval_set
from tts_grpo.text.spoken import LANGUAGES
from tts_grpo.text.units import characters, pinyin

OPERATIONS = {"equal": "C", "substitute": "S", "delete": "D", "insert": "I"}  # jiwer's names of the operations
CHUNK = 256  # recordings held in memory at once
MAX_DURATION_ERROR_S = 0.05  # with a larger difference from the manifest, it is another recording or truncated
PACKAGES = ("torch", "funasr", "pypinyin", "jiwer", "rapidfuzz", "zhconv", "zhon", "wetext")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder with seed_*/manifest.jsonl")
    parser.add_argument("--eval-set", type=Path, required=True, help="JSONL of the test set")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to score (default: all in the folder)")
    parser.add_argument("--language", choices=LANGUAGES, default="zh", help="language of utterances without one")
    parser.add_argument("--text-tags", choices=("reject", "remove"), default="reject", help="texts with tags such "
                        "as [laughter]: reject the set, or remove the tags")  # fmt: skip
    parser.add_argument("--asr-dir", type=Path, required=True, help="folder of the evaluation recogniser")
    parser.add_argument("--judge-asr-dir", type=Path, help="folder of a further recogniser, for a second opinion")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--quality-utterances", type=int, default=80, help="number of utterances, evenly "
                        "spaced in the first seed, for speaker similarity, DNSMOS and F0; 0: none")  # fmt: skip
    parser.add_argument("--speaker-model-dir", type=Path, help="WavLMForXVector folder (default: use Resemblyzer)")
    parser.add_argument("--reference-audio", type=Path, help="recording of the voice, or a folder of recordings, "
                        "for utterances without a prompt")  # fmt: skip
    return parser.parse_args(argv)


def utterances_of(manifest: Path, eval_set: list[dict], set_dir: Path) -> list[dict]:
    """One row per utterance of the set, with its manifest entry if there is one; ``audio`` is a path or None.

    Raises:
        SystemExit: an utterance was synthesised from a text that differs from the set's.
    """
    lines = {line["id"]: line for line in read_jsonl(manifest)}
    found = []
    for row in eval_set:
        line = lines.get(row["id"], {"error": "not in the manifest"})
        text = row.get("target_text", row.get("text"))
        if line.get("target_text", text) != text:
            raise SystemExit(
                f"score.py: {manifest}: {row['id']} was synthesised from {line['target_text']!r}, but the set's "
                f"text is {text!r}: run the inference again; it synthesises only what has changed"
            )
        prompt = row.get("prompt_audio")
        found.append({
            "id": row["id"], "target_text": text, **({"language": row["language"]} if "language" in row else {}),
            "audio": str(manifest.parent / line["wav"]) if line.get("wav") else None,
            "prompt_audio": str((set_dir / prompt).absolute()) if prompt else None,
            "error": line.get("error"), "finish_reason": line.get("finish_reason"),
            "num_speech_tokens": line.get("num_speech_tokens", 0), "duration_s": line.get("duration_s", 0.0),
        })  # fmt: skip
    return found


def read_recording(utterance: dict) -> np.ndarray | None:
    """Read an utterance's audio, float32 (T,) at 16 kHz. Without usable audio, returns None and sets ``error``."""
    if utterance["audio"] is None:
        utterance["error"] = utterance["error"] or "no audio"
        return None
    try:
        speech = load_audio(utterance["audio"])
    except ValueError as error:
        utterance["error"] = str(error)
        return None
    seconds = len(speech) / ASR_HZ
    if abs(seconds - utterance["duration_s"]) > MAX_DURATION_ERROR_S:
        utterance["error"] = f"{utterance['audio']}: {seconds:.2f} s, but {utterance['duration_s']} s in the manifest"
        return None
    return speech


def units_of(text: str, language: str) -> list[str]:
    """The units for speech rate and repetition: syllables and words of the text's spoken form."""
    return pinyin(text, tones=False, language=language)


def measure(utterance: dict, speech: np.ndarray | None, language: str, networks: NetworkMetrics | None) -> None:
    """Add ``errors`` and ``quality`` to an utterance that has its ``hypothesis``, and ``judge_errors`` likewise.

    ``language`` is that of the set. The judge's errors are clipped at the length of the text: Whisper repeats the same
    words without end after a few recordings, which is its own fault, and would outweigh hundreds of utterances.
    """
    spoken = utterance.get("language", language)
    for hypothesis, errors in (("hypothesis", ERRORS), ("judge_hypothesis", JUDGE_ERRORS)):
        if hypothesis not in utterance:
            continue
        try:
            counts = count_all(utterance["target_text"], utterance[hypothesis], spoken, language)
        except ValueError as error:
            raise ValueError(f"{utterance['id']}: {error}") from error
        if errors == JUDGE_ERRORS:
            counts = {metric: count.clipped() for metric, count in counts.items()}
        utterance[errors] = {metric: vars(count) for metric, count in counts.items()}
    if speech is None:
        utterance["quality"] = worst_values(networks)
        return
    units = [units_of(text, spoken) for text in (utterance["target_text"], utterance["hypothesis"])]
    utterance["quality"] = basic_metrics(speech, *units, utterance["finish_reason"])
    if networks:
        utterance["quality"] |= networks.measure(speech, utterance["prompt_audio"])


def score(
    utterances: list[dict], asr, language: str, networks: NetworkMetrics | None, network_positions: set[int], judge=None
) -> None:
    """Add ``hypothesis``, ``errors`` and ``quality`` to the utterances; network metrics at ``network_positions``.

    ``language`` is that of the set; the recognisers are told the language of each utterance.

    With a further recogniser ``judge``, also ``judge_hypothesis`` and ``judge_errors``.
    """
    for first in range(0, len(utterances), CHUNK):
        part = utterances[first : first + CHUNK]
        recordings = [read_recording(utterance) for utterance in part]
        usable = [speech for speech in recordings if speech is not None]
        languages = [utterance.get("language", language) for utterance in part]
        told = [spoken for spoken, speech in zip(languages, recordings, strict=True) if speech is not None]
        transcripts = {"hypothesis": iter(asr.transcribe(usable, told))}
        if judge:
            transcripts["judge_hypothesis"] = iter(judge.transcribe(usable, told))
        for position, (utterance, speech) in enumerate(zip(part, recordings, strict=True), first):
            for name, texts in transcripts.items():
                text = "" if speech is None else next(texts)
                utterance[name] = prepare_hypothesis(text, utterance.get("language", language))
            measure(utterance, speech, language, networks if position in network_positions else None)


def alignment_text(utterances: list[dict], language: str) -> str:
    """Alignments by the units of the set's main metric, as Kaldi's wer_per_utt_details.pl writes them.

    Each utterance has four lines: ref, hyp, op, #csid.
    """
    units, lines = METRICS[language][MAIN_METRIC[language]].units, []
    for utterance in utterances:
        found = align_units(units(utterance["target_text"]), units(utterance["hypothesis"]))
        places = [  # (reference unit, hypothesis unit, operation) per aligned position
            (*pair, OPERATIONS[part.type])
            for part in found.alignments[0]
            for pair in itertools.zip_longest(
                found.references[0][part.ref_start_idx : part.ref_end_idx],
                found.hypotheses[0][part.hyp_start_idx : part.hyp_end_idx], fillvalue="***",
            )
        ]  # fmt: skip
        csid = map(str, (found.hits, found.substitutions, found.insertions, found.deletions))
        rows = zip(("ref", "hyp", "op", "#csid"), (*zip(*places, strict=True), csid), strict=True)
        lines += [f"{utterance['id']} {name} {' '.join(row)}\n" for name, row in rows]
    return "".join(lines)


def describe(utterances: list[dict], language: str) -> dict:
    """The entry for one seed in scores.json."""
    num_characters = sum(len(characters(u["target_text"])) for u in utterances)
    return {
        **rates(utterances, language),
        "utterances": len(utterances),
        "failed": sum(bool(u["error"]) for u in utterances),
        "eos_share": sum(u["quality"]["eos_share"] for u in utterances) / len(utterances),
        "tokens_per_character": sum(u["num_speech_tokens"] for u in utterances) / num_characters,
        "quality": quality(utterances),
    }


def system_scores(by_seed: dict[str, list[dict]], args, networks: NetworkMetrics | None, language: str) -> dict:
    """The contents of scores.json, except for the ASR model; ``language`` is that of the set."""
    pooled = [utterance for utterances in by_seed.values() for utterance in utterances]
    measured = quality(pooled)
    for name, entry in measured.items():
        metric = QUALITY_METRICS[name]
        entry |= {"title": metric.title, "unit": metric.unit, "better": metric.better,
                  "model": networks.model(name) if networks else None}  # fmt: skip
    size = len(pooled) // len(by_seed)
    sample = {"seed": next(iter(by_seed)), "utterances": len(evenly_spaced(args.quality_utterances, size))}
    return {
        "language": language,
        "metrics": {n: {"title": m.title, "mean": m.mean} for n, m in METRICS[language].items()},
        "pooled": rates(pooled, language), "quality": measured, "quality_sample": sample if networks else None,
        "seeds": {seed: describe(utterances, language) for seed, utterances in by_seed.items()},
        "eval_set_sha256": hashlib.sha256(args.eval_set.read_bytes()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }  # fmt: skip


def table(scores: dict) -> str:
    """Format error rates and quality metrics with their intervals as a readable table."""
    lines = []
    for name, metric in scores["metrics"].items():
        entry = scores["pooled"][name]
        low, high = entry["ci"]
        counts = ", ".join(f"{entry[kind]} {kind}" for kind in ("substitutions", "deletions", "insertions"))
        lines.append(f"{metric['title']:36} {entry['rate']:7.2%} ({low:.2%} to {high:.2%})  {counts}, "
                     f"{entry['length']} units")  # fmt: skip
        if "judge" in scores:
            entry, title = scores["judge"]["pooled"][name], f"  by {scores['judge']['asr']['model']}"
            lines.append(f"{title:36} {entry['rate']:7.2%} ({entry['ci'][0]:.2%} to {entry['ci'][1]:.2%})")
    for entry in scores["quality"].values():
        ci = f"({entry['ci'][0]:.3f} to {entry['ci'][1]:.3f})" if entry["ci"] else ""
        model = f"  by {entry['model']}" if entry["model"] else ""
        lines.append(f"{entry['title']:36} {entry['value']:8.3f} {ci} {entry['unit']}, {entry['n']} values{model}")
    return "\n".join(lines)


def references(path: Path | None) -> list[Path]:
    """Reference recordings of the voice: one file, or the audio files in a folder.

    Raises:
        ValueError: there is no recording.
    """
    if path is None or path.is_file():
        return [path] if path else []
    found = sorted(p for p in path.glob("*") if p.suffix in (".wav", ".flac", ".ogg", ".mp3"))
    if not found:
        raise ValueError(f"{path}: no recording to compare the voice with")
    return found


def manifests_of(output_dir: Path, seeds: list[int] | None) -> list[Path]:
    """The manifests of the given seeds, or of all seeds.

    Scores of other seeds are removed, because programs that read the folder pool the scores of all seeds in it.

    Raises:
        SystemExit: a manifest is missing.
    """
    paths = {int(path.parent.name[5:]): path for path in output_dir.glob("seed_*/manifest.jsonl")}
    seeds = sorted(paths if seeds is None else set(seeds))
    missing = [seed for seed in seeds if seed not in paths]
    if missing or not seeds:
        names = ", ".join(f"seed_{seed}" for seed in missing) or "seed_*"
        raise SystemExit(f"score.py: no {names}/manifest.jsonl in {output_dir}: run the inference first")
    for path in (path for seed, path in paths.items() if seed not in seeds):
        (path.parent / "utterances.jsonl").unlink(missing_ok=True)
        (path.parent / "alignment.txt").unlink(missing_ok=True)
    return [paths[seed] for seed in seeds]


def check_languages(eval_set: list[dict], args) -> None:
    """Check that the recognisers know the languages of a set.

    Raises:
        SystemExit: one does not know a language.
    """
    for name, folder in (("eval_asr_dir (or eval_asr_dir_en)", args.asr_dir), ("judge_asr_dir", args.judge_asr_dir)):
        for language in sorted({row["language"] for row in eval_set}):
            if folder and (fault := language_fault(folder, language)):
                raise SystemExit(f"score.py: {args.eval_set}: {fault}: set {name} to the folder of another one")


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)  # silences funasr's log messages
    manifests = manifests_of(args.output_dir, args.seeds)
    try:
        eval_set = usable_eval_set(args.eval_set, TextRules(args.language, args.text_tags))
    except (ValueError, OSError) as error:
        raise SystemExit(f"score.py: {error}") from error
    check_languages(eval_set, args)
    language, first = set_language(row["language"] for row in eval_set), eval_set[0]["language"]
    asr = load_asr(args.asr_dir, args.device, first)
    judge = load_asr(args.judge_asr_dir, args.device, first) if args.judge_asr_dir else None
    reference, networks = references(args.reference_audio), None
    if args.quality_utterances:
        networks = NetworkMetrics(args.device, args.speaker_model_dir, reference)
    by_seed = {}
    for manifest in manifests:
        utterances = utterances_of(manifest, eval_set, args.eval_set.parent)
        network_positions = set() if by_seed else set(evenly_spaced(args.quality_utterances, len(utterances)))
        opinion = judge.recogniser if judge else None
        score(utterances, asr.recogniser, language, networks, network_positions, opinion)
        write_jsonl(manifest.parent / "utterances.jsonl", utterances)
        write_text(manifest.parent / "alignment.txt", alignment_text(utterances, language))
        by_seed[manifest.parent.name[5:]] = utterances
    scores = system_scores(by_seed, args, networks, language)
    about = asr.describe()
    scores |= {"asr": about, "asr_dir": str(args.asr_dir), "asr_sha256": about["sha256"]}
    if judge:
        pooled = [utterance for utterances in by_seed.values() for utterance in utterances]
        scores["judge"] = {"asr": judge.describe(), "pooled": rates(pooled, language, JUDGE_ERRORS)}
    write_json(args.output_dir / "scores.json", scores)
    print(table(scores))
    failed = sum(seed["failed"] for seed in scores["seeds"].values())
    print(f"{len(eval_set)} utterances x {len(by_seed)} seeds, {failed} without usable audio: {args.output_dir}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
