"""Benchmark the training at full size on 1, 2, 4, ... GPUs: the parts of a step, scaling, and a crash with resumption.

    python tools/random_llm.py --output DIR/llm --mean-tokens 93
    python tools/bench_reward.py --random DIR --make-only
    python tools/bench_training.py --models DIR --gpus 1 2 --prompts 32 --output FILE.json [-- VERL_OVERRIDE...]

Each run is ``bash run.sh 0 2`` of ``profile=cosyvoice2`` (with --model cosyvoice3: ``profile=cosyvoice3``); models with
random weights are sufficient. The reward servers share the training's GPUs; with --separate-servers, they have as many
GPUs of their own. Runs for a number of GPUs:

* strong scaling: --prompts in all, so that each GPU has fewer;
* weak scaling: --prompts for each GPU.

The efficiency of strong scaling is (time of a step with the fewest GPUs x their number) / (time x number of GPUs), that
of weak scaling the time with the fewest GPUs / time. With --crash, all processes of the last run, which has the most
GPUs, are killed after 8 of its 12 steps (``kill -9``). It is started again, resumes after step 6, and is merged and
loaded with Transformers.

The learning rate is so small that the weights, and thus the lengths of the rollouts, stay as they are: about the
--mean-tokens of random_llm.py, and at most 256 tokens (10 s).

A run that is finished is not repeated, so the same command continues after an interruption, and more GPUs can be added
to it. After a change of settings or code, use another --exp-dir. An interrupted run with --crash starts from the
beginning. Settings of run.sh in the environment apply to all runs, except those that the benchmark varies or counts
(``variables``). The figures are medians without the first two steps after each start. Prints a table, and writes JSON
in the form of docs/results.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tts_grpo.evaluation.processes import processes_with
from tts_grpo.evaluation.provenance import ROOT, provenance
from tts_grpo.text.jsonl import write_json
from tts_grpo.training.verl_log import median, parse_step, read_steps, step_seconds

STEPS, SKIPPED = 12, 2  # steps of a run, and those after each start that are not measured
SAVED, KILLED = 6, 8  # of the run with --crash: steps after which it is saved and killed
ROLLOUTS = 8  # per prompt
MEMORY = ("actor/perf/max_memory_allocated_gb", "perf/max_memory_allocated_gb")
DATA = ROOT / "assets/tiny/data"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with llm, token2wav, sensevoice, prompt.wav")
    parser.add_argument("--model", choices=("cosyvoice2", "cosyvoice3"), default="cosyvoice2", help="profile; its "
                        "token2wav is the folder of this name in --models")  # fmt: skip
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of GPUs")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument(
        "--scaling", nargs="+", choices=("strong", "weak"), default=["strong", "weak"], help="what to run"
    )
    parser.add_argument("--separate-servers", action="store_true", help="give the reward servers GPUs of their own")
    parser.add_argument("--crash", action="store_true", help="kill the last run, continue and merge it")
    parser.add_argument("--exp-dir", type=Path, default=ROOT / "exp/bench-training", help="folder of all runs")
    parser.add_argument("--output", type=Path, help="JSON file for the figures (default: in --exp-dir)")
    parser.add_argument("overrides", nargs="*", help="after --: arguments of veRL for all runs")
    args = parser.parse_args(argv)
    args.output = args.output or args.exp_dir / f"{args.model}{separate(args)}.json"
    return args


def separate(args) -> str:
    """End of the names of what belongs to runs whose reward servers have GPUs of their own."""
    return "-separate" if args.separate_servers else ""


@dataclass(frozen=True)
class Run:
    """One training: ``kinds`` says which scaling it belongs to."""

    gpus: int
    prompts: int
    kinds: tuple[str, ...]
    crash: bool = False

    @property
    def name(self) -> str:
        return f"{self.gpus}x{self.prompts}{'-crash' if self.crash else ''}"


def planned(args) -> list[Run]:
    """The runs; the one with the fewest GPUs is the base of both scalings."""
    runs: dict[tuple[int, int], list[str]] = {}
    for gpus in sorted(set(args.gpus)):
        for kind in args.scaling:
            prompts = args.prompts if kind == "strong" else args.prompts * gpus // min(args.gpus)
            runs.setdefault((gpus, prompts), []).append(kind)
    *others, last = (Run(*key, tuple(kinds)) for key, kinds in runs.items())
    return [*others, replace(last, crash=args.crash)]


def variables(args, run: Run, exp_dir: Path) -> dict[str, str]:
    """Settings of run.sh for a run; those in the environment take precedence over ``wanted``, not over ``fixed``."""
    models = args.models.resolve()
    servers = range(run.gpus, 2 * run.gpus) if args.separate_servers else range(run.gpus)
    wanted = {
        "sft_path": models / "llm", "token2wav_dir": models / args.model, "prompt_audio": models / "prompt.wav",
        "reward_asr_dir": models / "sensevoice", "eval_asr_dir": models / "sensevoice", "prompt_text": "你好",
        "train_jsonl": DATA / "grpo.jsonl", "test_jsonl": DATA / "dev.jsonl", "eval_jsonl": DATA / "test.jsonl",
        "known_answer_jsonl": DATA / "dev.jsonl", "check_reward": 0, "check_reward_freq": 0, "test_freq": 1000,
        # random weights say nothing, so only the pace distinguishes the rollouts of a group
        "rewards": "intelligibility:1 pace:0.5,units_per_s=4",
        "learning_rate": 1e-12, "max_response_length": 256,
    }  # fmt: skip
    fixed = {
        "profile": args.model, "exp_dir": exp_dir, "exp_name": exp_dir.name, "num_gpus": run.gpus,
        "train_batch_size": run.prompts, "mini_batch_size": run.prompts, "rollout_n": ROLLOUTS, "total_steps": STEPS,
        "save_freq": SAVED if run.crash else STEPS, "server_devices": " ".join(f"cuda:{i}" for i in servers),
    }  # fmt: skip
    chosen = {name: value for name, value in wanted.items() if name not in os.environ} | fixed
    return {name: str(value) for name, value in chosen.items()}


def start(args, environment: dict[str, str], stop: int, log: Path) -> subprocess.Popen:
    """Start stages 0 to ``stop``, in a process group of their own, with their output in a file."""
    command = ["bash", str(ROOT / "run.sh"), "0", str(stop), *(["--", *args.overrides] if args.overrides else [])]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True, cwd=ROOT
        )


@contextlib.contextmanager
def stopped_on_error(process: subprocess.Popen) -> Iterator[None]:
    """Stop a run if what is done beside it fails or is interrupted: Ctrl-C does not reach its process group."""
    try:
        yield
    except BaseException:
        process.terminate()
        process.wait()
        raise


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for a run; exit if it failed."""
    with stopped_on_error(process):
        code = process.wait()
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise SystemExit("\n".join([*lines[-5:], f"bench_training.py: the run failed ({code}), see {log}"]))


def measure(args, run: Run) -> dict:
    """Train and return the figures of a run. If it is finished, run.sh only checks that its settings are the same.

    Raises:
        SystemExit: the run failed, or ended before it could be killed.
    """
    exp_dir = args.exp_dir.resolve() / f"{args.model}-{run.name}{separate(args)}"
    log, done = args.exp_dir / "log" / f"{exp_dir.name}.log", exp_dir / "finished.json"
    environment, about, began = variables(args, run, exp_dir), {}, time.monotonic()
    if run.crash and not done.exists():
        about = {"crash": kill_and_continue(args, environment, exp_dir, log)}
    else:
        finish(start(args, environment, 3 if run.crash else 2, log), log)
    if not done.exists():
        write_json(done, {"run_s": round(time.monotonic() - began)} | about)
    return figures(run, exp_dir / "log/train.log") | json.loads(done.read_text(encoding="utf-8"))


def figures(run: Run, log: Path) -> dict:
    """Medians of a run: seconds of each phase, rollouts per second, tokens per rollout, memory of the trainer.

    Raises:
        SystemExit: the log has no step to measure.
    """
    resumed = range(SAVED + 1, SAVED + 1 + SKIPPED) if run.crash else ()
    steps = [values for number, values in read_steps(log, SKIPPED).items() if number not in resumed]
    if not steps:
        raise SystemExit(f"bench_training.py: {log} has no step to measure")
    phases = {name: round(seconds, 2) for name, seconds, _ in step_seconds(steps)}
    step_s, rollouts = phases["step, without saving"], run.prompts * ROLLOUTS
    memory = [step[name] for step in steps for name in MEMORY if name in step]
    return {
        "gpus": run.gpus, "prompts": run.prompts, "scaling": list(run.kinds), "step_s": step_s, "seconds": phases,
        "rollouts_per_s": round(rollouts / step_s, 1), "tokens_per_rollout": median(steps, "response_length/mean"),
        "longest_rollout": median(steps, "response_length/max"),
        "peak_trainer_gib": round(max(memory), 1) if memory else None,
    }  # fmt: skip


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Add the efficiency of each scaling, relative to the run with the fewest GPUs."""
    base = rows[0]
    for row in rows:
        more = row["gpus"] / base["gpus"]
        by_kind = {"strong": base["step_s"] / (row["step_s"] * more), "weak": base["step_s"] / row["step_s"]}
        row["efficiency"] = {kind: round(by_kind[kind], 3) for kind in row["scaling"]}
    return rows


def kill_all(process: subprocess.Popen, exp_dir: Path) -> int:
    """``kill -9`` for all processes of a run, run.sh first; returns their number."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed = {process.pid}
    while left := list(processes_with("TTS_GRPO_EXP_DIR", str(exp_dir))):
        for folder in left:
            killed.add(int(folder.name))
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(folder.name), signal.SIGKILL)
        time.sleep(0.1)
    return len(killed)


def kill_and_continue(args, environment: dict[str, str], exp_dir: Path, log: Path) -> dict:
    """Kill a run after a step, continue it up to its merged model, and load that; returns what was done.

    Raises:
        SystemExit: the run ended before it could be killed, or failed afterwards.
    """
    from transformers import AutoModelForCausalLM

    if exp_dir.exists():
        shutil.rmtree(exp_dir)  # of an interrupted call, whose steps must not be taken for those of this one
    process, train_log = start(args, environment, 2, log), exp_dir / "log/train.log"
    with stopped_on_error(process):
        while KILLED not in steps_in(train_log):
            if process.poll() is not None:
                finish(process, log)
                raise SystemExit(f"bench_training.py: the run ended before it was killed, see {log}")
            time.sleep(0.5)
    killed = kill_all(process, exp_dir)
    size = train_log.stat().st_size
    finish(start(args, environment, 3, log), log)
    model = AutoModelForCausalLM.from_pretrained(exp_dir / "merged_hf_model")
    return {"saved_after": SAVED, "killed_after": KILLED, "processes_killed": killed,
            "steps_after_resuming": sorted(steps_in(train_log, size)),
            "merged_parameters": model.num_parameters()}  # fmt: skip


def steps_in(log: Path, start: int = 0) -> set[int]:
    """Numbers of the steps in a training log, from a position in bytes on."""
    if not log.exists():
        return set()
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return {found[0] for found in map(parse_step, lines) if found}


def table(rows: list[dict]) -> str:
    """Markdown table of the runs."""
    phases = list(rows[0]["seconds"])
    heads = ["GPUs", "prompts", *phases, "rollouts/s", "efficiency, strong", "efficiency, weak", "trainer, GiB"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        cells = [row["gpus"], row["prompts"], *(row["seconds"].get(phase, "") for phase in phases)]
        cells += [row["rollouts_per_s"], *(row["efficiency"].get(kind, "") for kind in ("strong", "weak"))]
        lines.append("| " + " | ".join(map(str, [*cells, row["peak_trainer_gib"]])) + " |")
    return "\n".join(lines)


def main(argv=None):
    args = get_args(argv)
    rows = []
    for run in planned(args):
        rows.append(measure(args, run))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {"runs": with_efficiency(rows)}
    about = provenance("Training at full size by number of GPUs", ["tools/bench_training.py", *(argv or sys.argv[1:])])
    where = "GPUs of their own" if args.separate_servers else "the same GPUs"
    conditions = (
        f"profile={args.model}, {STEPS} steps with one update each, {ROLLOUTS} rollouts per prompt, reward servers on "
        f"{where}; medians without the first {SKIPPED} steps after each start"
    )
    write_json(args.output, about | {"conditions": conditions, "figures": result})
    print(table(rows))


if __name__ == "__main__":
    main()
