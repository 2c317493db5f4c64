"""Run veRL, write its output to a log file, and print one line per step on the terminal.

    python scripts/train.py --log-file LOG --total-steps N --failure-file FILE [--checkpoint-dir DIR --server-url URL
        --tensorboard-dir DIR --validation-dir DIR] -- COMMAND...

Exits with the command's status; on failure, prints the last lines of the log. SIGINT and SIGTERM are forwarded.

When the reward, or run.sh, reports a failure in --failure-file, the command is stopped. After any other failed rollout,
the trainer itself stops with an error (tts_grpo/training/trainer.py). If the command ends with status 0 before it has
saved the checkpoint of the last step in --checkpoint-dir, that is a failure, too.

The output is copied to the log unchanged. Its lines are parsed for the display only, so if veRL changes its wording,
only the display changes.

With --tensorboard-dir, a separate process writes a few utterances of each validation there as audio
(validation_audio.py), as soon as veRL's dump appears in --validation-dir. If that process fails, the failure is printed
and the training continues.
"""

import argparse
import collections
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tts_grpo.training.verl_log import parse_step

TAIL_LINES = 40
POLL_S = 0.5  # polling interval for the failure file and the validation dumps
STOP_TIMEOUT_S = 30.0
AUDIO_TIMEOUT_S = 120.0  # longest wait for audio processes after the training has ended
MAX_LINE_BYTES = 1 << 16  # longer lines are split for the display; a step's metrics take 10 kB
UNPRINTABLE = re.compile(r"[^\t\x1b\x20-\x7e\xa0-\U0010ffff]")  # Ray colours its lines with escape sequences
SHOWN = {  # veRL's metric name -> our name and format
    "critic/score/mean": "reward {:.3f}",
    "response_length/mean": "{:.0f} tokens",
    "response_length/clip_ratio": "{:.1%} truncated",
    "actor/entropy_loss": "entropy {:.2f}",
    "timing_s/step": "{:.1f} s",
    "timing_s/generation": "(rollouts {:.1f}",  # this and the next are logged by tts_grpo/training/trainer.py
    "timing_s/reward_wait": "then waiting for rewards {:.1f}",
    "timing_s/update_actor": "update {:.1f})",
}
VALIDATION = {
    "score/mean@1": "reward {:.3f}",
    "pinyin_error_rate/mean@1": "error rate {:.2%}",
    "num_speech_tokens/mean@1": "{:.1f} tokens",
    "bad_rollout/mean@1": "{:.1%} bad",
}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-file", type=Path, required=True, help="file to append the command's output to")
    parser.add_argument("--total-steps", type=int, required=True, help="total number of training steps")
    parser.add_argument("--failure-file", type=Path, required=True, help="file in which the reward reports a failure")
    parser.add_argument("--checkpoint-dir", type=Path, help="folder of veRL's checkpoints")
    parser.add_argument("--server-url", help="reward server that synthesises utterances of a validation")
    parser.add_argument("--tensorboard-dir", type=Path, help="folder of event files, for validation audio")
    parser.add_argument("--validation-dir", type=Path, help="folder of veRL's validation dumps")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the training command, after --")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command")
    if args.tensorboard_dir and not (args.server_url and args.validation_dir):
        parser.error("--tensorboard-dir needs --server-url and --validation-dir")
    return args


def summary(line: str, total_steps: int) -> list[str]:
    """Summarise a line of veRL's console log for display: no lines, or one for training and one for validation."""
    parsed = parse_step(line)
    if not parsed:
        return []
    step, values = parsed
    shown = []
    training = [form.format(values[name]) for name, form in SHOWN.items() if name in values]
    if training:
        shown.append(f"step {step}/{total_steps}: " + ", ".join(training))
    by_end = {end: value for name, value in values.items() for end in VALIDATION if name.endswith("/" + end)}
    if "score/mean@1" in by_end:
        parts = [form.format(by_end[end]) for end, form in VALIDATION.items() if end in by_end]
        shown.append(f"validation after step {step}: " + ", ".join(parts))
    return shown


class Lines:
    """Splits a byte stream into lines for the display. A newline or a carriage return ends a line."""

    def __init__(self):
        self.rest = b""

    def add(self, chunk: bytes) -> Iterator[str]:
        """Add bytes and return the complete lines as text. Invalid UTF-8 and unprintable characters are replaced."""
        *lines, self.rest = re.split(rb"[\r\n]", self.rest + chunk)
        if len(self.rest) > MAX_LINE_BYTES:
            lines, self.rest = [*lines, self.rest], b""
        for line in filter(None, lines):
            yield UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", line.decode(errors="replace"))

    def finish(self) -> Iterator[str]:
        """Return the last line if the stream ended without a line end."""
        yield from self.add(b"\n")


class Training:
    """The training command, as a process that can be stopped with a reason."""

    def __init__(self, command: list[str], failure_file: Path):
        failure_file.unlink(missing_ok=True)
        self.failure_file, self.failure, self.lock = failure_file, None, threading.Lock()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, frame: self.process.send_signal(received))
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None and self.failure is None:
            self.check_failure()
            time.sleep(POLL_S)

    def check_failure(self) -> None:
        """Stop the process if the reward has reported a failure."""
        if self.failure_file.exists():
            self.stop(self.failure_file.read_text(encoding="utf-8", errors="replace").strip())

    def output(self) -> Iterator[bytes]:
        """Yield the process's output as soon as it is printed."""
        while chunk := self.process.stdout.read1(MAX_LINE_BYTES):
            yield chunk

    def stop(self, reason: str) -> None:
        """Stop the process. Only the first reason is kept."""
        with self.lock:
            if self.failure is not None:
                return
            self.failure = reason
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()


class ValidationAudio:
    """Starts one process per validation dump to write audio for TensorBoard. A failure of it is only printed."""

    def __init__(self, server_url: str, tensorboard_dir: Path, validation_dir: Path):
        script = str(Path(__file__).with_name("validation_audio.py"))
        self.command = [sys.executable, script, "--server-url", server_url, "--tensorboard-dir", str(tensorboard_dir)]
        self.validation_dir, self.running, self.lock = validation_dir, [], threading.Lock()
        self.seen = self._dumps()

    def _dumps(self) -> dict[Path, int]:
        """Dumps with their modification times, because a resumed training repeats the validation of its checkpoint."""
        return {path: path.stat().st_mtime_ns for path in self.validation_dir.glob("*.jsonl")}

    def watch(self) -> None:
        """Poll for new dumps in a thread, until this process ends."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(POLL_S)

    def look(self) -> None:
        """Start a process for each new dump."""
        with self.lock:
            dumps = self._dumps()
            new = sorted(dumps.items() - self.seen.items(), key=lambda dump: dump[1])
            self.seen = dumps
            for path, _ in new:
                self._add(str(path))

    def _add(self, dump: str) -> None:
        self.running = [(name, process) for name, process in self.running if not self._ended(name, process, 0.0)]
        try:
            process = subprocess.Popen(
                [*self.command, "--dump", dump], stderr=subprocess.PIPE, text=True, errors="replace"
            )
        except OSError as error:
            print(f"no audio of {dump}: {error}", flush=True)
        else:
            self.running.append((dump, process))

    def finish(self, timeout_s: float) -> None:
        """Wait for running processes, and stop those that exceed the time limit."""
        self.look()
        end = time.monotonic() + timeout_s
        for dump, process in self.running:
            if not self._ended(dump, process, max(0.0, end - time.monotonic())):
                process.kill()
                print(f"no audio of {dump}: not done in time", flush=True)

    @staticmethod
    def _ended(dump: str, process: subprocess.Popen, timeout_s: float) -> bool:
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if process.returncode:
            print(f"no audio of {dump}: {errors.strip()[-500:]}", flush=True)
        return True


def show(training: Training, log, total_steps: int) -> list[str]:
    """Copy the output to the log and display the steps until the output ends. Returns the last lines."""
    tail, lines, start = collections.deque(maxlen=TAIL_LINES), Lines(), time.monotonic()

    def show_lines(texts):
        for line in texts:
            tail.append(line)
            for text in summary(line, total_steps):
                print(f"[{time.monotonic() - start:6.0f} s] {text}", flush=True)

    for chunk in training.output():
        log.write(chunk)
        log.flush()
        show_lines(lines.add(chunk))
    show_lines(lines.finish())
    return list(tail)


def missing_steps(checkpoint_dir: Path | None, total_steps: int) -> str:
    """Return what is wrong if the newest checkpoint is not that of the last step; "" if it is, or without a folder."""
    if checkpoint_dir is None:
        return ""
    try:
        step = int((checkpoint_dir / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        step = 0
    if step >= total_steps:
        return ""
    return (
        f"veRL ended with status 0, but its newest checkpoint is of step {step} of {total_steps} (total_steps): look "
        "in the log for the cause, such as an override that ends the training early, and run the same command again"
    )


def main(argv=None):
    args = get_args(argv)
    args.log_file.parent.mkdir(parents=True, exist_ok=True)
    print(f"training starts (a minute or two until the first step); log: {args.log_file}", flush=True)
    audio = None
    if args.tensorboard_dir:
        audio = ValidationAudio(args.server_url, args.tensorboard_dir, args.validation_dir)
        audio.watch()
    with args.log_file.open("ab") as log:
        training = Training(args.command, args.failure_file)
        try:
            tail = show(training, log, args.total_steps)
        except BaseException as error:
            training.stop(f"{type(error).__name__}: {error}")  # otherwise the training would run unsupervised
            raise
    status = training.process.wait()
    training.check_failure()  # the command may have ended before the failure file was polled
    if audio:
        audio.finish(AUDIO_TIMEOUT_S if status == 0 else 0.0)
    reason = training.failure
    if reason is None:
        reason = f"status {status}" if status else missing_steps(args.checkpoint_dir, args.total_steps)
    if not reason:
        return 0
    print(*tail, f"training failed: {reason}", sep="\n", file=sys.stderr)
    print(f"See its last lines above, and the whole log in {args.log_file}", file=sys.stderr)
    return 128 - status if status < 0 else status or 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # printing must not fail in any locale
    sys.exit(main())
