"""Load the folder of an experiment: summary, utterances with the samples of both models, and training curves."""

import dataclasses
import json
import math
from pathlib import Path

from tts_grpo.text.errors import ErrorCounts
from tts_grpo.text.jsonl import read_jsonl

MODELS = ("sft", "grpo")
MODEL_TITLES = {"sft": "SFT", "grpo": "GRPO"}
MAIN_METRICS = ("pinyin_error_rate_toneless", "wer")  # the report's main metric is the first one that was measured
METRIC_TITLES = {  # used if summary.json has no titles
    "cer": "CER",
    "pinyin_error_rate": "pinyin error rate",
    "pinyin_error_rate_toneless": "pinyin error rate, toneless",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Speech of one model for one utterance, sampled with one seed.

    Attributes:
        audio: path, or None.
        fault: why there is no usable audio, or None.
        hypothesis: transcript by the evaluation recogniser.
        errors: by the main metric.
        published, spoken: by micro CER (English: WER; a set of several languages: MER), and by the spoken protocol.
    """

    audio: Path | None
    fault: str | None
    hypothesis: str
    errors: int
    duration_s: float
    published: int = 0
    spoken: int = 0


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One text of the test set.

    Attributes:
        length: number of units by the main metric.
        samples: samples by model and seed.
        prompt_audio: path of the prompt recording, or None.
        language: language of the text.
    """

    utt_id: str
    target_text: str
    length: int
    samples: dict[str, dict[str, Sample]]
    prompt_audio: Path | None = None
    language: str = "zh"

    def errors(self, model: str) -> int:
        """Errors of a model over all seeds."""
        return sum(sample.errors for sample in self.samples[model].values())

    @property
    def change(self) -> int:
        """Errors of GRPO minus errors of SFT, over all seeds."""
        return self.errors("grpo") - self.errors("sft")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A finished experiment.

    Attributes:
        metrics: ``name -> title``, in display order.
        main_metric: the metric for comparing utterances.
        scalars: ``tag -> [(step, value)]`` of the training; empty if there is no TensorBoard log.
    """

    name: str
    summary: dict
    scores: dict[str, dict]
    metrics: dict[str, str]
    main_metric: str
    utterances: list[Utterance]
    seeds: list[str]
    scalars: dict[str, list[tuple[int, float]]]


def read_json(path: Path) -> dict:
    """Read a JSON file of the evaluation.

    Raises:
        ValueError: the file is missing.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: run bash run.sh 4 4")
    return json.loads(path.read_text(encoding="utf-8"))


def load_experiment(exp_dir: Path, eval_set: str = "") -> Experiment:
    """Load an experiment's folder.

    Args:
        exp_dir: the folder.
        eval_set: name of an evaluation set with results in ``eval/NAME``; by default, the results in ``eval``, which
            are those of the first set.

    Raises:
        ValueError: a file of the evaluation is missing, or the utterances or seeds of the two models differ.
    """
    summary = read_json(exp_dir / "summary.json")
    summary |= summary.get("sets", {}).get(eval_set, {})
    eval_dir = exp_dir / "eval" / eval_set
    scores = {model: read_json(eval_dir / model / "scores.json") for model in MODELS}
    titles = {name: entry["title"] for name, entry in summary.get("metrics", {}).items()} or METRIC_TITLES
    metrics = {name: title for name, title in titles.items() if name in summary["relative_drop"]}
    main_metric = next((name for name in MAIN_METRICS if name in metrics), None)
    if main_metric is None:
        raise ValueError(f"{exp_dir}/summary.json has none of {', '.join(MAIN_METRICS)}: run bash run.sh 4 4")
    rows = {model: _rows_by_seed(eval_dir / model) for model in MODELS}
    utterances = _utterances(rows, main_metric, scores["sft"].get("language", "zh"))
    name = " ".join(filter(None, (exp_dir.resolve().name, eval_set)))
    return Experiment(name, summary, scores, metrics, main_metric, utterances, list(rows["sft"]),
                      load_scalars(exp_dir / "tensorboard"))  # fmt: skip


def _rows_by_seed(output_dir: Path) -> dict[str, dict[str, dict]]:
    """``seed -> id -> row of utterances.jsonl``, with audio paths in this folder, as it may have been moved."""
    paths = sorted(output_dir.glob("seed_*/utterances.jsonl"), key=lambda path: int(path.parent.name[5:]))
    if not paths:
        raise ValueError(f"{output_dir}: no seed_*/utterances.jsonl: run bash run.sh 4 4")
    by_seed = {}
    for path in paths:
        rows = read_jsonl(path)
        for row in rows:
            row["audio"] = path.parent / "wavs" / Path(row["audio"]).name if row["audio"] else None
        by_seed[path.parent.name[5:]] = {row["id"]: row for row in rows}
    return by_seed


def _utterances(rows: dict[str, dict[str, dict[str, dict]]], metric: str, language: str) -> list[Utterance]:
    id_sets = {(seed, frozenset(by_id)) for by_seed in rows.values() for seed, by_id in by_seed.items()}
    if len(id_sets) != len(rows["sft"]) or rows["sft"].keys() != rows["grpo"].keys():
        raise ValueError("SFT and GRPO were not scored on the same utterances and seeds: run force=1 bash run.sh 4 4")
    utterances = []
    for utt_id, row in next(iter(rows["sft"].values())).items():
        samples = {m: {seed: _sample(by_id[utt_id], metric) for seed, by_id in rows[m].items()} for m in MODELS}
        prompt = row.get("prompt_audio")
        length = row["errors"][metric]["length"]
        utterances.append(Utterance(
            utt_id, row["target_text"], length, samples, Path(prompt) if prompt else None, row.get("language", language)
        ))  # fmt: skip
    return utterances


def _sample(row: dict, metric: str) -> Sample:
    errors = {name: ErrorCounts(**counts).errors for name, counts in row["errors"].items()}
    published = next((errors[name] for name in ("cer", "wer", "mer") if name in errors), 0)
    return Sample(
        row["audio"], row["error"], row["hypothesis"], errors[metric], row["duration_s"], published,
        errors.get("spoken", published),
    )  # fmt: skip


def load_scalars(tensorboard_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of TensorBoard's event files; the later value if a resumed training repeated a step."""
    if not any(tensorboard_dir.glob("*tfevents*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(tensorboard_dir), size_guidance={"scalars": 0})
    log.Reload()
    curves = {}
    for tag in log.Tags()["scalars"]:
        by_step = {event.step: event.value for event in log.Scalars(tag)}
        curves[tag] = sorted((step, value) for step, value in by_step.items() if math.isfinite(value))
    return curves
