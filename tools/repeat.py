"""Train settings with several seeds each, evaluate all runs, and compare them: a table with intervals over the seeds.

    python tools/repeat.py SETTINGS_FILE [--seeds 1 2 3 4 5] [--output FILE.json]

Each line of SETTINGS_FILE is a name with shell variables of run.sh: ``utterance credit=utterance learning_rate=2e-4``.
A line with a name only has the default settings; ``#`` begins a comment.

The runs are trained (bash run.sh 0 3) in exp/NAME/SETTING-SEED, --jobs of them at a time. Each is evaluated on every
set with every sampling; the SFT model is evaluated once. The commands are those of stage 4, and get settings of the
environment such as ``seeds``, ``judge_asr_dir`` and ``http_port``. After a crash, the same command continues: what is
finished is not repeated. Logs are in exp/NAME/log. With several jobs, each has an equal part of the processor's cores,
and ports for its reward server that are 10 above those of the job before.

The primary comparison is that of the first setting with the SFT model, on the first set with the first sampling, by the
toneless pinyin error rate of the evaluation recogniser (of an English set: the word error rate of the spoken form). The
p-values of all others are corrected (Holm). All intervals are 95%, by bootstrap over training seeds and utterances
(tts_grpo/evaluation/bootstrap.py); with one seed, they do not contain the variation of the training. The JSON file has
the form of docs/results, and the tables are printed.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tts_grpo.evaluation import bootstrap
from tts_grpo.evaluation.aggregate import ERRORS, JUDGE_ERRORS, compare_quality, error_fractions, read_utterances
from tts_grpo.evaluation.processes import processes_with
from tts_grpo.evaluation.provenance import ROOT, provenance, replace_tables
from tts_grpo.text.jsonl import read_jsonl, write_json, write_text

MARK = "TTS_GRPO_REPEAT"  # environment variable of all processes that work on a folder
METRICS = ("pinyin_error_rate_toneless", "spoken")  # the first one that a set has; an English set has no pinyin
SETS = ("assets/tiny/data/hard.jsonl", "assets/tiny/data/test.jsonl")
QUALITY = ("speech_rate", "f0_std_semitones", "dnsmos_ovrl", "speaker_similarity")
RECOGNISERS = {ERRORS: "evaluation", JUDGE_ERRORS: "judge"}  # names of the recognisers by the key of their errors
# Variables that this program sets, or that would change the SFT model; those of stage 4 are refused, too.
RESERVED = {
    "profile", "evaluation", "exp_name", "exp_dir", "seed", "force", "sft_path", "llm", "llm_pt", "sft_checkpoint",
}  # fmt: skip


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings_file", type=Path, help="a line per setting: NAME [VARIABLE=VALUE ...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="training seeds")
    parser.add_argument("--sets", type=Path, nargs="+", default=[ROOT / path for path in SETS], help="test sets; the "
                        "name of a set is that of its file")  # fmt: skip
    parser.add_argument("--samplings", nargs="+", default=["temperature=1.0"], metavar="SAMPLING", help="variables of "
                        "run.sh for each sampling of the evaluation: 'temperature=0.6 top_p=0.9'")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the tiny profile needs 2 cores and 7 GiB "
                        "for each")  # fmt: skip
    parser.add_argument("--name", default="repeat", help="folder of all results below exp/")
    parser.add_argument("--keep-audio", action="store_true", help="keep the speech of the evaluations")
    parser.add_argument("--output", type=Path, help="JSON file for the figures (default: exp/NAME/results.json)")
    parser.add_argument("--title", default="Settings over several training seeds", help="title of the figures")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced, see --table")
    parser.add_argument("--table", default="repeat", help="the tables follow <!-- table: TABLE --> and "
                        "<!-- table: TABLE runs --> in the page")  # fmt: skip
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose run.sh is run")
    args = parser.parse_args(argv)
    args.folder = args.root / "exp" / args.name
    args.output = args.output or args.folder / "results.json"
    return args


@dataclass(frozen=True)
class Run:
    """A training run of a setting with one seed."""

    setting: str
    variables: dict[str, str]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.seed}"


@dataclass(frozen=True)
class Evaluation:
    """A test set and a sampling, and the commands of stage 4 for them."""

    test_set: Path
    sampling: str
    infer: list[str] = field(compare=False, default_factory=list)
    score: list[str] = field(compare=False, default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.test_set.stem}-{re.sub(r'[^A-Za-z0-9.=]+', '-', self.sampling)}"


def assignments(text: str, where: str) -> dict[str, str]:
    """``NAME=VALUE ...`` in shell syntax as a dict.

    Raises:
        ValueError: a word has another form.
    """
    found = {}
    for word in shlex.split(text, comments=True):
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{where}: {word!r} is not of the form variable=value")
        found[name] = value
    return found


def declared() -> dict[str, set[str]]:
    """The stages of each variable of run.sh, as conf/settings.sh declares them."""
    lines = (ROOT / "conf/settings.sh").read_text(encoding="utf-8").splitlines()
    words = [shlex.split(line) for line in lines if re.match(" *setting [a-z]", line)]
    return {name: set(stages.split()) for _, name, _, stages, *_ in words}


def read_settings(path: Path) -> dict[str, dict[str, str]]:
    """Variables of each setting by its name.

    Raises:
        ValueError: a line has another form, a name is used twice, a variable is unknown or cannot be set per setting,
            or there is no line.
    """
    settings: dict[str, dict[str, str]] = {}
    stages = declared()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith("#"):
            continue
        where = f"{path}:{number}"
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name == "sft" or name in settings:
            raise ValueError(f"{where}: {name!r} is not a new name of letters, digits, '_', '.' and '-'")
        settings[name] = assignments(rest, where)
        for variable in settings[name]:
            if variable not in stages:
                raise ValueError(f"{where}: run.sh has no variable {variable}: bash run.sh --settings lists all")
            if variable in RESERVED or stages[variable] & {"4", "4s"}:
                raise ValueError(
                    f"{where}: {variable} cannot be set per setting, because the evaluation and the SFT model are the "
                    "same for all: use --seeds, --sets and --samplings, or set it in the environment"
                )
    if not settings:
        raise ValueError(f"{path} has no setting: write a line such as: default")
    return settings


def stage_4_commands(root: Path, environment: dict[str, str]) -> tuple[list[str], list[str]]:
    """The first inference and the first scoring command that stage 4 would run, as words.

    Raises:
        RuntimeError: run.sh prints none.
    """
    done = subprocess.run(
        ["bash", "run.sh", "--dry-run", "4"], cwd=root, env=os.environ | environment, capture_output=True, text=True
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines() if "infer_dist.py" in line or "compute_wer" in line]
    infer = next((line for line in lines if any(word.endswith("infer_dist.py") for word in line)), None)
    score = next((line for line in lines if any(word.endswith("compute_wer.sh") for word in line)), None)
    if not infer or not score:
        raise RuntimeError(f"bash run.sh --dry-run 4 printed no commands: {done.stderr.strip()[-500:]}")
    return infer, score


def evaluations_of(args) -> list[Evaluation]:
    """All test sets with all samplings, in order.

    Raises:
        ValueError: a variable is not one of the evaluation's speech, or two evaluations have the same name.
    """
    found, stages = [], declared()
    for sampling in args.samplings:
        variables = assignments(sampling, "--samplings")
        if wrong := [name for name in variables if "4" not in stages.get(name, ())]:
            raise ValueError(f"--samplings: {wrong[0]} is no variable of sampling, such as temperature or top_p")
        for test_set in args.sets:
            given = variables | {
                "eval_jsonl": str(test_set.absolute()), "eval_jsonls": "", "exp_dir": str(args.folder)
            }  # fmt: skip
            found.append(Evaluation(test_set, sampling, *stage_4_commands(args.root, given)))
    found.sort(key=lambda one: args.sets.index(one.test_set))
    if len({one.name for one in found}) < len(found):
        raise ValueError("two test sets or two samplings have the same name: rename one")
    return found


def replaced(command: list[str], values: dict[str, str]) -> list[str]:
    """A command with other values after these flags."""
    return [values.get(before, word) for before, word in zip(["", *command], command, strict=False)]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Lock the folder of the results, and end processes that a killed call has left behind: they would go on writing.

    Raises:
        RuntimeError: another call works on the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[MARK] = str(folder.resolve())  # all children inherit it
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another call works on {folder}: wait for it, or set another --name") from None
        for process in processes_with(MARK, os.environ[MARK]):
            if process.name != str(os.getpid()):
                with contextlib.suppress(OSError):  # it has ended
                    os.kill(int(process.name), signal.SIGKILL)
        yield


def execute(command: list[str], log: Path, cwd: Path, environment: dict[str, str], what: str) -> None:
    """Run a command, with its output appended to a file.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        file.flush()
        code = subprocess.run(command, cwd=cwd, env=os.environ | environment, stdout=file, stderr=file).returncode
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise RuntimeError("\n".join([*lines[-5:], f"{what} failed ({code}), see {log}; the same command continues"]))


def from_environment(*stages: str) -> dict[str, str]:
    """The variables of the environment on which results of these stages depend, but not those set here."""
    own = {"exp_name", "exp_dir", "seed", "force", "eval_jsonl", "eval_jsonls"}
    names = {name for name, found in declared().items() if found & set(stages)} | {"profile", "recipe"}
    return {name: os.environ[name] for name in sorted(names - own) if name in os.environ}


def train(args, run: Run, variables: dict[str, str]) -> None:
    """Stages 0 to 3 of a run, unless they are recorded as done; ``variables`` are those of its job.

    Raises:
        RuntimeError: a stage failed, or the run was trained with other variables.
    """
    exp_dir = args.folder / run.name
    record, wanted = exp_dir / "trained.json", {"variables": run.variables, "seed": run.seed}
    wanted["environment"] = {k: v for k, v in from_environment("0", "2", "3").items() if k not in run.variables}
    started = exp_dir / "settings.json"
    if started.exists():
        found = json.loads(started.read_text(encoding="utf-8"))
        if changed := [key for key in found if found[key] != wanted[key]]:
            raise RuntimeError(
                f"{exp_dir} was trained with other variables ({changed[0]}: {found[changed[0]]}, now "
                f"{wanted[changed[0]]}): give the setting another name, or set --name"
            )
    if record.exists():
        return
    write_json(started, wanted)
    environment = run.variables | variables | {
        "exp_dir": str(exp_dir), "exp_name": f"{args.name}-{run.name}", "seed": str(run.seed)
    }  # fmt: skip
    log = args.folder / "log" / f"{run.name}.log"
    execute(["bash", "run.sh", "0", "3"], log, args.root, environment, f"training {run.name}")
    write_json(record, wanted)


def train_seconds(exp_dir: Path) -> int | None:
    """Seconds of stages 0 to 3 of a run, including interrupted ones."""
    path = exp_dir / "stage_seconds.jsonl"
    return round(sum(row["seconds"] for row in read_jsonl(path) if row["stage"] <= 3)) if path.exists() else None


@functools.cache
def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def outdated(output_dir: Path, test_set: Path, model: Path) -> str:
    """What has changed since a finished evaluation, by the checksums in its results; "" if nothing has."""
    scores, made = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                    for path in (output_dir / "scores.json", output_dir / "settings.json"))  # fmt: skip
    if checksum(test_set) != scores.get("eval_set_sha256", checksum(test_set)):
        return str(test_set)
    weights = {path.name: checksum(path) for path in model.resolve().glob("*.safetensors")}
    return str(model) if weights and weights != made.get("llm", weights) else ""


def trained_commit(exp_dir: Path) -> str | None:
    """The git commit with which a run was trained, as run.sh recorded it; runs of one call may differ after a crash."""
    path = exp_dir / ".done/2"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.removeprefix("commit ") for line in lines if line.startswith("commit ")), None)


def evaluate(args, one: Evaluation, model: Path, name: str) -> Path:
    """Synthesise and score a test set with a model, unless that is done; return the folder of the scores.

    Raises:
        RuntimeError: a command failed, or the folder was evaluated with other settings, another model or another set.
    """
    output_dir = args.folder / "eval" / one.name / name
    infer = replaced(one.infer, {"--llm-path": str(model), "--output-dir": str(output_dir)})
    score = [*one.score[:-2], str(output_dir), one.score[-1]]
    record, commands = output_dir / "commands.json", [infer, score]
    if record.exists() and json.loads(record.read_text(encoding="utf-8")) != commands:
        raise RuntimeError(f"{output_dir} was evaluated with other settings: set another --name, or delete the folder")
    if (output_dir / "seconds").exists():
        if changed := outdated(output_dir, one.test_set, model):
            raise RuntimeError(f"{changed} has changed since it was evaluated: delete {output_dir}, or set --name")
        return output_dir
    write_json(record, commands)
    began = time.monotonic()
    log = args.folder / "log" / f"{name}.log"
    path = os.pathsep.join(filter(None, [str(args.root), os.environ.get("PYTHONPATH")]))
    for command in commands:
        execute(command, log, args.root, {"PYTHONPATH": path}, f"evaluation of {name} on {one.name}")
    if not args.keep_audio:
        for wavs in output_dir.glob("seed_*/wavs"):
            shutil.rmtree(wavs)
    write_text(output_dir / "seconds", f"{time.monotonic() - began:.0f}\n")
    return output_dir


def eval_seconds(args, name: str) -> int:
    """Seconds of all evaluations of a model, without interrupted ones."""
    return sum(int(path.read_text()) for path in (args.folder / "eval").glob(f"*/{name}/seconds"))


def jobs_of(number: int) -> list[tuple[set[int], dict[str, str]]]:
    """Cores and variables of run.sh for each job; a single one has those of this program.

    Raises:
        ValueError: there are not as many cores.
    """
    cores, first = sorted(os.sched_getaffinity(0)), int(os.environ.get("http_port", 8000))  # noqa: SIM112
    if not 1 <= number <= len(cores):
        raise ValueError(f"--jobs {number}: at least 1, and at most as many as there are cores ({len(cores)})")
    if number == 1:
        return [(set(cores), {})]
    each = len(cores) // number
    return [
        (set(cores[each * job : each * (job + 1)]), {"http_port": str(port), "grpc_port": str(port + 1),
         "metrics_port": str(port + 2), "server_urls": f"http://127.0.0.1:{port}"})
        for job, port in enumerate(range(first, first + 10 * number, 10))
    ]  # fmt: skip


def run_one(args, run: Run, evaluations: list[Evaluation], with_sft: bool, variables: dict[str, str]) -> str:
    """Train and evaluate a run, as far as that is not done, and return a line about it."""
    train(args, run, variables)
    models = {run.name: args.folder / run.name / "merged_hf_model"}
    if with_sft:
        models = {"sft": args.folder / run.name / "sft_model"} | models
    for name, model in models.items():
        for one in evaluations:
            evaluate(args, one, model, name)
    first = args.folder / "eval" / evaluations[0].name
    rates = {name: bootstrap.ratio(fractions(first / name, ERRORS)) for name in models}
    shown = ", ".join(f"{'SFT' if name == 'sft' else 'GRPO'} {rate:.2%}" for name, rate in rates.items())
    return (
        f"{run.setting}, seed {run.seed}: {shown} on {evaluations[0].name}; training "
        f"{train_seconds(args.folder / run.name)} s, evaluation {eval_seconds(args, run.name)} s"
    )


def run_all(args, runs: list[Run], evaluations: list[Evaluation]) -> None:
    """Train and evaluate everything that is not done, with one line of output per run.

    After an error, no further run begins, and those that have begun are finished.
    """
    free, thread = queue.SimpleQueue(), threading.local()
    for job in jobs_of(args.jobs):
        free.put(job)

    def occupy():
        cores, thread.variables = free.get()
        os.sched_setaffinity(0, cores)  # of this thread, from which its processes inherit them

    def work(run: Run) -> str:
        return run_one(args, run, evaluations, run == runs[0], thread.variables)

    with ThreadPoolExecutor(args.jobs, initializer=occupy) as pool:
        futures = [pool.submit(work, run) for run in runs]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                print(f"{time.strftime('%F %T')} {number}/{len(runs)} {future.result()}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fractions(output_dir: Path, key: str) -> np.ndarray:
    """Errors and units of each utterance, (N, 2), in the order of the ids; by one metric and one recogniser."""
    rows = read_utterances(output_dir)
    metric = next(metric for metric in METRICS if metric in rows[0][key])
    found = error_fractions(rows, metric, False, key)
    return np.array([found[utt_id] for utt_id in sorted(found)])


def failed_share(output_dir: Path) -> float:
    """Share of the utterances without usable audio."""
    return float(np.mean([bool(row["error"]) for row in read_utterances(output_dir)]))


def stack(folder: Path, names: list[str], key: str) -> np.ndarray:
    """Errors and units of runs, (S, N, 2)."""
    return np.stack([fractions(folder / name, key) for name in names])


def pairs(settings: list[str]) -> Iterator[tuple[str, str]]:
    """What is compared: each setting with the SFT model, and with the first setting."""
    yield from (("sft", setting) for setting in settings)
    yield from ((settings[0], setting) for setting in settings[1:])


def comparisons(args, settings: list[str], evaluations: list[Evaluation]) -> list[dict]:
    """The figures of all comparisons; the first is the primary one."""
    names = {setting: [f"{setting}-{seed}" for seed in args.seeds] for setting in settings} | {"sft": ["sft"]}
    found = []
    for one in evaluations:
        folder = args.folder / "eval" / one.name
        scores = json.loads((folder / "sft" / "scores.json").read_text(encoding="utf-8"))
        for key in (ERRORS, JUDGE_ERRORS)[: 2 if "judge" in scores else 1]:
            for first, second in pairs(settings):
                change = bootstrap.compare_runs(stack(folder, names[first], key), stack(folder, names[second], key))
                failed = [np.mean([failed_share(folder / run) for run in names[name]]) for name in (first, second)]
                rates, ci = map(bootstrap.ratio, stack(folder, names[second], key)), change["relative_drop_ci"]
                found.append({
                    "set": one.test_set.stem, "sampling": one.sampling, "recogniser": RECOGNISERS[key],
                    "before": first, "after": second, "rate_before": percent(change["before"]),
                    "rate_after": percent(change["after"]), "rates_after": list(map(percent, rates)),
                    "relative_change_percent": percent(change["relative_drop"], -1, 1),
                    "ci95": ci and [percent(bound, -1, 1) for bound in ci[::-1]],
                    "p": change["p"], "conclusion": bootstrap.verdict(change["ci"], "lower", failed[1] > failed[0]),
                })  # fmt: skip
    adjusted = bootstrap.holm([figure["p"] for figure in found[1:]])
    for figure, p in zip(found, [found[0]["p"], *adjusted], strict=True):
        figure |= {"p_holm": p, "primary": figure is found[0]}
        if p >= 0.05:
            figure["conclusion"] = bootstrap.NOT_SIGNIFICANT
    return found


def percent(value: float | None, sign: int = 1, digits: int = 2) -> float | None:
    return None if value is None else round(100 * sign * value, digits)


def quality_of(folder: Path, name: str) -> dict[str, dict]:
    """Change of the speech-quality metrics of a run against the SFT model, that were measured."""
    changes = compare_quality(read_utterances(folder / "sft"), read_utterances(folder / name))
    return {
        metric: {
            "difference": round(changes[metric]["difference"], 3),
            "ci95": changes[metric]["ci"] and [round(bound, 3) for bound in changes[metric]["ci"]],
            "conclusion": changes[metric]["verdict"],
        }
        for metric in QUALITY if metric in changes
    }  # fmt: skip


def run_figures(args, runs: list[Run], evaluations: list[Evaluation]) -> list[dict]:
    """Seconds, error rates and quality of each run."""
    found = []
    for run in runs:
        folders = {one.name: args.folder / "eval" / one.name for one in evaluations}
        found.append({
            "setting": run.setting, "seed": run.seed, "train_seconds": train_seconds(args.folder / run.name),
            "eval_seconds": eval_seconds(args, run.name), "commit": trained_commit(args.folder / run.name),
            "rates": {
                name: percent(bootstrap.ratio(fractions(folder / run.name, ERRORS))) for name, folder in folders.items()
            },
            "quality": {name: quality_of(folder, run.name) for name, folder in folders.items()},
        })  # fmt: skip
    return found


def results(args, settings: dict[str, dict[str, str]], runs: list[Run], evaluations: list[Evaluation]) -> dict:
    """The contents of the JSON file."""
    shown = "; ".join(" ".join([name, *map("=".join, found.items())]) for name, found in settings.items())
    common = [f"{k}={v}" for k, v in from_environment("0", "2", "3", "4", "4s").items() if "/" not in v]  # no paths
    shown += f"; for all: {' '.join(common)}" if common else ""
    infer = evaluations[0].infer
    seeds = " ".join(itertools.takewhile(str.isdecimal, infer[infer.index("--seeds") + 1 :]))
    return {
        **provenance(args.title, ["tools/repeat.py", *sys.argv[1:]]),
        "conditions": f"settings: {shown}; seeds {' '.join(map(str, args.seeds))}; toneless pinyin error rate (of an "
        f"English set: spoken-form WER), evaluation seeds {seeds}; 95% intervals by bootstrap over training seeds and "
        "utterances; p-values of all comparisons but the primary one corrected by Holm's method",
        "settings": settings,
        "figures": comparisons(args, list(settings), evaluations),
        "runs": run_figures(args, runs, evaluations),
    }


def change_text(figure: dict) -> str:
    """Format a change as "-33.0% (-40.1% to -25.1%)"."""
    if figure["relative_change_percent"] is None:
        return "-"
    ci = figure["ci95"]
    return f"{figure['relative_change_percent']:+.1f}%" + (f" ({ci[0]:+.1f}% to {ci[1]:+.1f}%)" if ci else "")


def comparison_table(recorded: dict) -> list[str]:
    """Lines of the table of comparisons."""
    lines = ["| Set | Sampling | Recogniser | Compared | Error rates | Change (95% interval) | p | Conclusion |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for figure in recorded["figures"]:
        cells = (
            figure["set"], figure["sampling"], figure["recogniser"],
            f"{figure['before']} → {figure['after']}{' (primary)' if figure['primary'] else ''}",
            f"{figure['rate_before']:.2f}% → {figure['rate_after']:.2f}%",
            change_text(figure), f"{figure['p_holm']:.2g}", figure["conclusion"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run_table(recorded: dict) -> list[str]:
    """Lines of the table of runs; quality is that of the first set and sampling."""
    names = list(recorded["runs"][0]["rates"])
    lines = [f"| Setting | Seed | Training, s | Evaluation, s | {' | '.join(names)} | Changes of quality (95%) |",
             f"|{' --- |' * (5 + len(names))}"]  # fmt: skip
    for run in recorded["runs"]:
        rates = " | ".join(f"{run['rates'][name]:.2f}%" for name in names)
        changed = [
            f"{metric} {found['difference']:+.3f}"
            for metric, found in run["quality"][names[0]].items() if found["conclusion"] != bootstrap.NOT_SIGNIFICANT
        ]  # fmt: skip
        seconds = f"{run['train_seconds']} | {run['eval_seconds']}"
        lines.append(f"| {run['setting']} | {run['seed']} | {seconds} | {rates} | {', '.join(changed) or 'none'} |")
    return lines


def tables(recorded: dict, name: str) -> dict[str, list[str]]:
    """Lines of each table by the name in its comment, from the contents of the JSON file."""
    return {name: comparison_table(recorded), f"{name} runs": run_table(recorded)}


def main(argv=None):
    args = get_args(argv)
    try:
        if len(set(args.seeds)) < len(args.seeds):
            raise ValueError("a training seed is named twice: a run would count as two")
        settings = read_settings(args.settings_file)
        runs = [Run(name, variables, seed) for name, variables in settings.items() for seed in args.seeds]
        with only_one(args.folder):
            evaluations = evaluations_of(args)
            run_all(args, runs, evaluations)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"repeat.py: {error}") from None
    recorded = results(args, settings, runs, evaluations)
    write_json(args.output, recorded)
    made = tables(recorded, args.table)
    if args.page:
        write_text(args.page, replace_tables(args.page.read_text(encoding="utf-8"), made))
    print("\n\n".join("\n".join(lines) for lines in made.values()))


if __name__ == "__main__":
    main()
