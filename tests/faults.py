"""Inject faults at random moments into small runs of run.sh, and compare the results with those of undisturbed runs.

    bash tests/run.sh faults [--only TEXT ...] [--work-dir DIR]

An undisturbed run of the tiny profile (stages 0 to 4, with small settings) gives the reference. A trial puts the folder
of the experiment into the state before a stage, starts the stage, injects its fault, and runs the same command again.
That must end with status 0, with the results of the reference, and without processes left behind; anything else is a
loss. Moments and victims are drawn with the trial's number as seed. Full disks and read-only folders are small
temporary file systems, so those trials need root and are left out without it.

Each trial is appended to DIR/trials.jsonl as soon as it is done, and is not repeated by the next call; a trial with a
loss is repeated once the code is another commit. The reference is made again if anything but docs, tests and tools has
changed. Without --only, docs/results/reliability.json and the table of
docs/reliability.md are renewed at the end, unless the code has changes that are not committed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts import checkpoints
from tests.conftest import ROOT, RewardServer, free_ports
from tts_grpo.evaluation.processes import processes_with
from tts_grpo.evaluation.provenance import git_commit, provenance, replace_tables
from tts_grpo.reward.client import RewardClient, RewardServerError
from tts_grpo.text.jsonl import dump_line, read_jsonl, write_json
from tts_grpo.training.verl_log import read_steps

RESULTS, PAGE = ROOT / "docs/results/reliability.json", ROOT / "docs/reliability.md"
SETTINGS = {
    "profile": "tiny", "total_steps": "2", "train_batch_size": "2", "rollout_n": "2", "micro_batch_size": "4",
    "max_response_length": "48", "save_freq": "1", "test_freq": "2", "server_instances": "2", "server_batch_size": "4",
    "reward_patience_s": "30", "server_timeout_s": "300", "seeds": "0", "quality_utterances": "2",
    "infer_batch_size": "3", "infer_procs": "2", "max_new_tokens": "100", "check_reward": "1",
}  # fmt: skip
NUM_EVALUATION, NUM_VALIDATION, NUM_SCORED = 12, 4, 64
READY = "/v2/models/token2wav_asr/ready"
NOT_COMPARED = ("stage_seconds", "peak_rss_gib", "git_commit")  # of summary.json, and of its settings:
PORTS = ("http_port", "grpc_port", "metrics_port", "server_urls")  # free ones are drawn at each start of this program
BATCH_TIMEOUT_S = 8  # after which the server kills a hung instance


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the recipe.

    Attributes:
        stages: START and STOP of run.sh.
        before: name of the state of the experiment's folder from which a trial starts.
        after: name of the state that it leads to; empty if it changes with each run.
        results: patterns of the files that must equal those of the reference.
    """

    stages: tuple[str, str]
    before: str
    after: str = ""
    results: tuple[str, ...] = ()


EVALUATION = (
    "eval/*/seed_0/manifest.jsonl", "eval/*/seed_0/wavs/*.wav", "eval/*/seed_0/utterances.jsonl",
    "eval/*/seed_0/alignment.txt", "eval/*/scores.json", "summary.json", ".done/4",
)  # fmt: skip
PARTS = {  # in the order in which the reference makes them
    "reward server": Part(("1", "1"), "nothing"),
    "data": Part(("0", "0"), "nothing", "data", ("data/*", "sft_model/*", ".done/0")),
    "training step": Part(("1", "2"), "data", "training"),
    "checkpoint write": Part(("1", "2"), "data"),
    "merge": Part(("3", "3"), "training", "merged", ("checkpoints/global_step_2/merged_hf_model/*", ".done/3")),
    "inference": Part(("4", "4"), "merged", "evaluated", EVALUATION),
    "scoring": Part(("4", "4"), "inferred", "evaluated", EVALUATION),
}

COMPLETES = "After a crash, the same command completes with the same result"
FULL = "After a full disk, which is named, the same command completes with the same result"
READ_ONLY = "A folder that cannot be written to is named before anything is changed"
SCORES = "Rewards do not change and none is missing if an instance of the reward server fails"
ALL, ONE = "kill -9 of all processes", "kill -9 of one process"
PLAN = {  # (promise, fault): number of trials per part
    (COMPLETES, ALL): {"data": 3, "reward server": 2, "training step": 2, "checkpoint write": 2, "merge": 2,
                       "inference": 2, "scoring": 2},
    (COMPLETES, ONE): {"data": 3, "reward server": 3, "training step": 2, "checkpoint write": 1, "merge": 2,
                       "inference": 2, "scoring": 3},
    (FULL, "full disk"): {"data": 2, "merge": 2, "inference": 1, "scoring": 1},
    (READ_ONLY, "read-only folder"): {"data": 1, "scoring": 1},
    (SCORES, "dead instance"): {"scores of the server": 3},
    (SCORES, "hung instance"): {"scores of the server": 2},
}  # fmt: skip


class LossError(Exception):
    """A promise was not kept; the message says how."""


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "exp/faults", help="folder for runs and trials")
    parser.add_argument("--only", nargs="+", default=[""], help="trials whose name contains one of these texts")
    return parser.parse_args(argv)


def group_of(pid: int) -> int:
    """Return the process group of a process, or -1 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[2])
    except (OSError, IndexError):
        return -1


def command_of(pid: int) -> str:
    """Return the first words of a process's command; empty if it has ended (a zombie has no command)."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        return ""
    return " ".join(Path(word).name for word in words[:3])


class Laboratory:
    """A folder with an experiment, the states of the reference, and the environment of run.sh."""

    def __init__(self, work_dir: Path):
        self.work_dir, self.exp_dir, self.states = work_dir, work_dir / "exp", work_dir / "states"
        self.output = work_dir / "output.txt"
        work_dir.mkdir(parents=True, exist_ok=True)
        trainer = os.environ.get("TRAINER_PYTHON", str(ROOT / ".venv/trainer/bin/python"))
        (work_dir / "venv").mkdir(exist_ok=True)
        for name, prefix in (("speech", sys.prefix), ("trainer", Path(trainer).parent.parent)):
            link = work_dir / "venv" / name
            link.unlink(missing_ok=True)
            link.symlink_to(prefix)
        files = {}
        for name, source, count in (("test_jsonl", "dev", NUM_VALIDATION), ("eval_jsonl", "test", NUM_EVALUATION)):
            lines = (ROOT / f"assets/tiny/data/{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            files[name] = work_dir / f"{source}.jsonl"
            files[name].write_text("".join(lines[:count]), encoding="utf-8")
        self.http_port, *others = free_ports(3)
        ports = zip(PORTS[:3], (self.http_port, *others), strict=True)
        own = {"exp_dir": self.exp_dir, "venv_root": work_dir / "venv", **files, **dict(ports)}
        self.environment = os.environ | SETTINGS | {name: str(value) for name, value in own.items()}

    def restore(self, state: str) -> None:
        """Put the experiment's folder into a state of the reference."""
        unmount(self.exp_dir)
        shutil.rmtree(self.exp_dir, ignore_errors=True)
        shutil.copytree(self.states / state, self.exp_dir, symlinks=True)

    def save(self, state: str) -> None:
        """Keep the experiment's folder as a state of the reference."""
        shutil.rmtree(self.states / state, ignore_errors=True)
        shutil.copytree(self.exp_dir, self.states / state, symlinks=True)

    def start(self, stages: tuple[str, str]) -> subprocess.Popen:
        """Start run.sh as the leader of a process group; its output is written to a file."""
        with self.output.open("wb") as output:
            command = ["bash", str(ROOT / "run.sh"), *stages]
            return subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT,
                                    start_new_session=True)  # fmt: skip

    def wait(self, process: subprocess.Popen, limit_s: float) -> int:
        """Return the exit status of a run.

        Raises:
            LossError: it did not end in time.
        """
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            running = [command_of(pid) for pid in self.processes(process)]
            self.kill_all(process)
            raise LossError(f"no end after {limit_s:.0f} s; running: {running}; {self.tail()}") from None

    def said(self) -> str:
        """Return the output of the current run."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        return f"output: {self.said()[-1500:]}"

    def processes(self, leader: subprocess.Popen | None = None) -> list[int]:
        """Return the processes of runs of this experiment: by their environment, and by the group of ``leader``."""
        pids = {int(folder.name) for folder in processes_with("TTS_GRPO_EXP_DIR", str(self.exp_dir))}
        if leader:
            running = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
            pids |= {pid for pid in running if group_of(pid) == leader.pid}
        return sorted(pid for pid in pids if command_of(pid))

    def kill_all(self, leader: subprocess.Popen) -> list[str]:
        """Kill all processes of a run, run.sh first. Returns their commands."""
        killed = []
        for _ in range(50):
            pids = self.processes(leader)
            if not pids and leader.poll() is not None:
                return killed
            for pid in sorted(pids, key=lambda pid: pid != leader.pid):
                killed.append(command_of(pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            leader.poll()
            time.sleep(0.1)
        raise RuntimeError(f"processes cannot be killed: {pids}")

    def check_left_processes(self) -> None:
        """Raise a LossError if a run that has ended has left processes behind."""
        for _ in range(50):
            left = self.processes()
            if not left:
                return
            time.sleep(0.2)
        raise LossError(f"processes left behind: {[command_of(pid) for pid in left]}")


def digests(exp_dir: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """Return the SHA-256 of each result; without times, memory, ports and the commit, which differ."""
    found = {}
    for path in sorted(path for pattern in patterns for path in exp_dir.glob(pattern) if path.is_file()):
        content = path.read_bytes()
        if path.name == "summary.json":
            summary = {key: value for key, value in json.loads(content).items() if key not in NOT_COMPARED}
            settings = {key: value for key, value in summary["settings"].items() if key not in PORTS}
            content = json.dumps(summary | {"settings": settings}).encode()
        if path.parent.name == ".done":
            content = b"".join(line for line in content.splitlines() if not line.startswith(b"commit "))
        found[str(path.relative_to(exp_dir))] = hashlib.sha256(content).hexdigest()
    return found


def unmount(folder: Path) -> None:
    while folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(folder: Path) -> int:
    """Return the bytes that the files of a folder take on a temporary file system, in blocks of 4 KiB."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


@dataclasses.dataclass
class Reference:
    """What an undisturbed run gave.

    Attributes:
        commit: commit of the code.
        seconds: seconds per part, and "checkpoint write": of one checkpoint.
        scores: scores of known recordings by the reward server of stage 1.
    """

    commit: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    scores: list = dataclasses.field(default_factory=list)


def same_recipe(commit: str) -> bool:
    """Return whether all that runs in a trial is as in a commit: docs, tests and tools do not count."""
    others = (":!docs", ":!*.md", ":!tests", ":!tools")
    command = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", ".", *others]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def load_reference(lab: Laboratory) -> Reference:
    """Return the reference so far; empty if there is none or the code of the recipe has changed since."""
    path, commit = lab.work_dir / "reference.json", str(git_commit())
    if path.exists() and same_recipe((saved := json.loads(path.read_text()))["commit"]):
        return Reference(**saved)
    shutil.rmtree(lab.states, ignore_errors=True)
    (lab.states / "nothing").mkdir(parents=True)
    return Reference(commit)


def make_reference(lab: Laboratory, needed: set[str]) -> Reference:
    """Run the parts, undisturbed, up to the last one in ``needed``; parts that were run before are not repeated."""
    reference, names = load_reference(lab), list(PARTS)
    for name in names[: max((names.index(name) for name in needed), default=-1) + 1]:
        if name in reference.seconds or (name == "reward server" and name not in needed):
            continue
        print(f"reference: {name}", flush=True)
        measure_part(lab, reference, name)
        write_json(lab.work_dir / "reference.json", dataclasses.asdict(reference))
    return reference


def measure_part(lab: Laboratory, reference: Reference, name: str) -> None:
    """Run one part undisturbed, and note its time and results."""
    part = PARTS[name]
    if name == "checkpoint write":
        reference.seconds[name] = checkpoint_seconds(lab.states / "training")
        return
    lab.restore(part.before)
    start = time.monotonic()
    process = lab.start(part.stages)
    if name == "reward server":
        reference.scores = score_when_ready(lab, process, 300)
        reference.seconds[name] = time.monotonic() - start
        stop_server(lab, process)
        return
    status = lab.wait(process, 900)
    reference.seconds[name] = time.monotonic() - start
    if status:
        raise SystemExit(f"faults.py: the undisturbed run of {name} ended with status {status}: {lab.tail()}")
    state = lab.states / part.after
    if state.exists() and digests(state, part.results) != digests(lab.exp_dir, part.results):
        raise SystemExit(f"faults.py: two undisturbed runs of {name} differ")
    lab.save(part.after)
    if name == "inference":
        manifests = list(lab.exp_dir.glob("eval/*/seed_0/manifest.jsonl"))
        scored = max(path.stat().st_mtime for path in lab.exp_dir.glob("eval/*/scores.json"))
        reference.seconds[name] -= scored - max(path.stat().st_mtime for path in manifests)
        for path in [path for pattern in (*EVALUATION[2:], "report.html") for path in lab.exp_dir.glob(pattern)]:
            path.unlink(missing_ok=True)
        lab.save("inferred")


def checkpoint_seconds(exp_dir: Path) -> float:
    """Return the seconds from a checkpoint's first file to its last one."""
    checkpoint = exp_dir / "checkpoints/global_step_2"
    times = [path.stat().st_mtime for path in checkpoint.rglob("*") if path.is_file()]
    return max(times) - min(times)


def is_ready(url: str) -> bool:
    return not subprocess.run(["curl", "--noproxy", "*", "-sf", "-m", "5", "-o", os.devnull, url + READY]).returncode


def score_when_ready(lab: Laboratory, process: subprocess.Popen, limit_s: float) -> list:
    """Return the scores of known recordings by the reward server of stage 1, once it is ready.

    Raises:
        LossError: it ended, or was not ready in time.
    """
    url, end = f"http://127.0.0.1:{lab.http_port}", time.monotonic() + limit_s
    while not is_ready(url):
        if process.poll() is not None or time.monotonic() > end:
            raise LossError(f"the reward server is not ready (status {process.poll()}): {lab.tail()}")
        time.sleep(0.2)
    return score(url, NUM_SCORED)


def score(url: str, count: int, patience_s: float = 120.0) -> list:
    """Return reward, error rate, transcript and losses of ``count`` recordings, all requests in flight at once."""
    rows = read_jsonl(ROOT / "assets/tiny/data/dev.jsonl")[:NUM_SCORED]

    async def all_scores():
        client = RewardClient([url], patience_s=patience_s)
        try:
            pairs = [rows[i % len(rows)] for i in range(count)]
            return await asyncio.gather(*(client.score(row["speech_tokens"], row["text"]) for row in pairs))
        finally:
            await client.close()

    return [[s.reward, s.error_rate, s.transcript, list(s.unit_losses)] for s in asyncio.run(all_scores())]


def stop_server(lab: Laboratory, process: subprocess.Popen) -> None:
    """Stop the reward server of stage 1 and check that it stops."""
    process.terminate()
    lab.wait(process, 90)
    lab.check_left_processes()


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fault to inject.

    Attributes:
        number: seed of the trial's random numbers, and its number among the trials of this fault and part.
    """

    promise: str
    fault: str
    part: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.part} {self.number}"


def wait_for_moment(lab: Laboratory, process: subprocess.Popen, trial: Trial, seconds: float, rng) -> str:
    """Wait until a random moment of the part; returns it as text. The run may have ended before."""
    end = time.monotonic() + 600
    moment, since = rng.uniform(0, seconds), "the start"
    if trial.part == "checkpoint write":
        step = rng.choice((1, 2))
        folder, since = lab.exp_dir / f"checkpoints/global_step_{step}", f"the first file of checkpoint {step}"
        while not folder.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
    end = time.monotonic() + moment
    while time.monotonic() < end and process.poll() is None:
        time.sleep(min(0.05, max(0.0, end - time.monotonic())))
    return f"{moment:.2f} s after {since}"


def kill(lab: Laboratory, trial: Trial, reference: Reference, rng: random.Random) -> str:
    """Kill processes at a random moment and run the same command again. Returns what was killed and when."""
    part, seconds = PARTS[trial.part], reference.seconds[trial.part]
    for _ in range(4):  # a run may be faster than the reference, and end before the moment
        lab.restore(part.before)
        process = lab.start(part.stages)
        what = wait_for_moment(lab, process, trial, seconds, rng)
        if process.poll() is None:
            break
        seconds /= 2
    if trial.fault == ALL:
        killed = lab.kill_all(process)
        what += f": {len(killed)} processes"
    else:
        victim = rng.choice(lab.processes(process) or [process.pid])
        what += f": {command_of(victim)}"
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        if trial.part == "reward server":
            # it may survive and be ready, or end; either way it is stopped before the next run
            with contextlib.suppress(LossError):
                compare_scores(score_when_ready(lab, process, 60), reference)
            process.terminate()
        what += f"; the run ended with status {lab.wait(process, limit_of(reference, trial.part))}"
    run_again(lab, trial, reference)
    return what


def limit_of(reference: Reference, part: str) -> float:
    """Return the seconds after which a run is said to hang."""
    return 200 + 10 * reference.seconds["training step" if part == "checkpoint write" else part]


def run_again(lab: Laboratory, trial: Trial, reference: Reference) -> None:
    """Run the command of a part again and compare the results with the reference.

    Raises:
        LossError: the run failed, or its results differ.
    """
    part, log = PARTS[trial.part], lab.exp_dir / "log/train.log"
    complete, _ = checkpoints.newest_complete(lab.exp_dir / "checkpoints")
    logged = log.stat().st_size if log.exists() else 0
    process = lab.start(part.stages)
    if trial.part == "reward server":
        compare_scores(score_when_ready(lab, process, limit_of(reference, trial.part)), reference)
        stop_server(lab, process)
        return
    status = lab.wait(process, limit_of(reference, trial.part))
    if status:
        raise LossError(f"the next run ended with status {status}: {lab.tail()}")
    lab.check_left_processes()
    if part.before == "data":
        check_training(lab, int(complete.name.removeprefix("global_step_")) if complete else 0, logged)
        return
    found, wanted = digests(lab.exp_dir, part.results), digests(lab.states / part.after, part.results)
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if different:
        raise LossError(f"results differ from the reference: {different}")
    report = lab.exp_dir / "report.html"
    if part.after == "evaluated" and not report.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise LossError("report.html is not complete")


def compare_scores(scores: list, reference: Reference) -> None:
    if scores != reference.scores:
        raise LossError(f"{sum(a != b for a, b in zip(scores, reference.scores))} of {len(scores)} scores differ")


def check_training(lab: Laboratory, resumed_from: int, logged: int) -> None:
    """Check a training that is done: it resumed from the newest complete checkpoint, and its metrics are finite.

    Args:
        lab: the laboratory.
        resumed_from: step of the newest complete checkpoint before the last run; 0 if there was none.
        logged: bytes of the log before the last run.
    """
    newest, faults = checkpoints.newest_complete(lab.exp_dir / "checkpoints")
    if newest is None or newest.name != "global_step_2" or faults:
        raise LossError(f"the newest complete checkpoint is {newest}, faults: {faults}")
    log, rest = lab.exp_dir / "log/train.log", lab.work_dir / "train.log"
    rest.write_bytes(log.read_bytes()[logged:])
    trained, steps = sorted(read_steps(rest, 0)), read_steps(log, 0)
    wanted = list(range(resumed_from + 1, 3))
    if trained != wanted:
        raise LossError(f"the next run trained the steps {trained} instead of {wanted}")
    if sorted(steps) != [1, 2] and resumed_from < 2:
        raise LossError(f"the log has the steps {sorted(steps)}")
    infinite = [name for values in steps.values() for name, value in values.items() if not math.isfinite(value)]
    if infinite:
        raise LossError(f"metrics that are not finite: {infinite}")


@contextlib.contextmanager
def temporary_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount an empty temporary file system on a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        unmount(folder)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def used_bytes(folder: Path) -> int:
    """Return the bytes that are used on a mounted file system."""
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def can_mount(folder: Path) -> bool:
    """Return whether this user may mount temporary file systems."""
    try:
        with temporary_disk(folder / "probe", 1 << 20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill_disk(lab: Laboratory, trial: Trial, reference: Reference, rng: random.Random) -> str:
    """Run a part on a disk that has room for a random share of what it writes, then again with enough room."""
    part = PARTS[trial.part]
    before, after = (size_of(lab.states / state) for state in (part.before, part.after))
    room = int(rng.uniform(0, 0.9) * max(after - before, 8192)) // 4096 * 4096
    while True:  # a part that replaces files may need less room, so that the disk does not become full
        unmount(lab.exp_dir)
        with temporary_disk(lab.exp_dir, before + room + (1 << 20)):
            shutil.copytree(lab.states / part.before, lab.exp_dir, symlinks=True, dirs_exist_ok=True)
            remount(lab.exp_dir, f"size={used_bytes(lab.exp_dir) + room}")
            status = lab.wait(lab.start(part.stages), limit_of(reference, trial.part))
            if status and f"the disk of {lab.exp_dir} has only" not in lab.said():
                raise LossError(f"status {status}, and the full disk is not named: {lab.tail()}")
            if status:
                remount(lab.exp_dir, f"size={before + (1 << 30)}")
                run_again(lab, trial, reference)
                return f"room for {room} bytes: status {status}"
        if not room:
            raise LossError("the disk did not become full: the part needs no room")
        room = room // 8192 * 4096


def make_read_only(lab: Laboratory, trial: Trial, reference: Reference, rng: random.Random) -> str:
    """Run a part in a folder that cannot be written to, then again after it can."""
    part = PARTS[trial.part]
    unmount(lab.exp_dir)
    with temporary_disk(lab.exp_dir, size_of(lab.states / part.before) + (1 << 30)):
        shutil.copytree(lab.states / part.before, lab.exp_dir, symlinks=True, dirs_exist_ok=True)
        remount(lab.exp_dir, "ro")
        status = lab.wait(lab.start(part.stages), limit_of(reference, trial.part))
        if not status or f"{lab.exp_dir} cannot be written to" not in lab.said():
            raise LossError(f"status {status}, and the folder is not named: {lab.tail()}")
        remount(lab.exp_dir, "rw")
        run_again(lab, trial, reference)
    return f"status {status}"


def stop_instance(lab: Laboratory, trial: Trial, reference: Reference, rng: random.Random) -> str:
    """Kill or stop an instance of a reward server while it scores."""
    flags = ("--instances", "2", "--batch-timeout-s", str(BATCH_TIMEOUT_S))
    server = RewardServer(ROOT / "assets/tiny", lab.work_dir / "server.log", *flags)
    try:
        server.wait_ready(300)
        start = time.monotonic()
        wanted = score(server.url, 4 * NUM_SCORED)
        moment = rng.uniform(0, time.monotonic() - start)
        children = subprocess.run(["ps", "--ppid", str(server.process.pid), "-o", "pid=,args="], capture_output=True,
                                  text=True, check=True).stdout.splitlines()  # fmt: skip
        victim = rng.choice([int(line.split()[0]) for line in children if "spawn_main" in line])
        number = signal.SIGKILL if trial.fault == "dead instance" else signal.SIGSTOP
        threading.Timer(moment, os.kill, (victim, number)).start()
        start = time.monotonic()
        found = score(server.url, 4 * NUM_SCORED)
        seconds = time.monotonic() - start
        if found != wanted:
            raise LossError(f"{sum(a != b for a, b in zip(found, wanted))} of {len(wanted)} scores differ")
    except RewardServerError as error:
        raise LossError(str(error)) from error
    finally:
        server.stop()
    return f"after {moment:.2f} s; {len(wanted)} scores took {seconds:.1f} s"


FAULTS: dict[str, Callable] = {
    ALL: kill, ONE: kill, "full disk": fill_disk, "read-only folder": make_read_only, "dead instance": stop_instance,
    "hung instance": stop_instance,
}  # fmt: skip


def run_trial(lab: Laboratory, trial: Trial, reference: Reference, commit: str) -> dict:
    """Run one trial of the code of a commit. Returns its line of trials.jsonl, with the reason of a loss."""
    rng, start, loss, what = random.Random(trial.name), time.monotonic(), "", ""
    try:
        what = FAULTS[trial.fault](lab, trial, reference, rng)
    except LossError as error:
        loss = str(error)
        shutil.copytree(lab.exp_dir, lab.work_dir / "losses" / trial.name, symlinks=True, dirs_exist_ok=True)
    return dataclasses.asdict(trial) | {
        "commit": commit, "what": what, "seconds": round(time.monotonic() - start, 1), "loss": loss
    }  # fmt: skip


def planned() -> list[Trial]:
    """Return all trials, the cheap parts first."""
    trials = [
        Trial(promise, fault, part, number)
        for (promise, fault), parts in PLAN.items()
        for part, count in parts.items()
        for number in range(count)
    ]
    return sorted(trials, key=lambda trial: "training" in trial.part or "checkpoint" in trial.part)


def record(rows: list[dict]) -> None:
    """Write docs/results/reliability.json and renew the table of docs/reliability.md."""
    figures = []
    for (promise, fault), parts in PLAN.items():
        for part, count in parts.items():
            own = [row for row in rows if (row["promise"], row["fault"], row["part"]) == (promise, fault, part)]
            losses = sum(bool(row["loss"]) for row in own)
            figures.append({"promise": promise, "fault": fault, "part": part, "planned": count, "trials": len(own),
                            "losses": losses})  # fmt: skip
    total = {key: sum(figure[key] for figure in figures) for key in ("planned", "trials", "losses")}
    result = provenance("Faults injected into runs of the tiny profile", []) | {
        "command": "bash tests/run.sh faults", "commit": rows[-1]["commit"],
        "conditions": f"{NUM_EVALUATION} sentences; " + " ".join(f"{name}={value}" for name, value in SETTINGS.items()),
        "figures": figures, "all": total, "trials": [{k: v for k, v in row.items() if k != "promise"} for row in rows],
    }  # fmt: skip
    write_json(RESULTS, result)
    table = ["| Promise | Fault injected | Into | Trials planned | Done | Losses |", "|" + " --- |" * 6]
    for row in [*figures, {"promise": "all", "fault": "", "part": ""} | total]:
        table.append("| " + " | ".join(str(row[key]) for key in figures[0]) + " |")
    PAGE.write_text(replace_tables(PAGE.read_text(encoding="utf-8"), {"faults": table}), encoding="utf-8")


def main(argv=None):
    args = get_args(argv)
    lab = Laboratory(args.work_dir.absolute())
    path, commit = lab.work_dir / "trials.jsonl", str(git_commit())
    known = {(row["fault"], row["part"], row["number"]): row for row in (read_jsonl(path) if path.exists() else ())}
    rows, left = [], []
    for trial in planned():
        row = known.get((trial.fault, trial.part, trial.number))
        if row and (not row["loss"] or row["commit"] == commit):
            rows.append(row)
        elif any(text in trial.name for text in args.only):
            left.append(trial)
    if not can_mount(lab.work_dir):
        print("full disks and read-only folders are left out: this user may not mount file systems", file=sys.stderr)
        left = [trial for trial in left if trial.fault not in ("full disk", "read-only folder")]
    reference = make_reference(lab, {trial.part for trial in left} & PARTS.keys())
    for count, trial in enumerate(left, 1):
        row = run_trial(lab, trial, reference, commit)
        with path.open("a", encoding="utf-8") as file:
            file.write(dump_line(row))
        rows.append(row)
        print(f"{count}/{len(left)} {trial.name}: {row['loss'] or 'no loss'} ({row['what']})", flush=True)
    losses = [row for row in rows if row["loss"]]
    print(f"{len(rows)} trials, {len(losses)} with a loss: {path}")
    if args.only == [""] and not commit.endswith("-dirty"):
        record(rows)
    return bool(losses)


if __name__ == "__main__":
    sys.exit(main())
