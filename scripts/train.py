"""Run veRL with its output in a log file and one line a step on the terminal.

    python scripts/train.py --log-file LOG --total-steps N --failure-file FILE [--server-url URL
        --tensorboard-dir DIR] -- COMMAND...

Exits with the command's status; on failure the last lines of the log are shown. SIGINT and SIGTERM are passed on.

veRL logs the exception of a rollout and trains on without it. Here that ends the training: when the reward reports a
failure in --failure-file, or veRL logs such an exception, the command is stopped.

With --tensorboard-dir, what each validation said goes there as sound (validation_audio.py): a process of its own, whose
failure is told and goes no further.
"""

import argparse
import collections
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tts_grpo.training.verl_log import parse_step

TAIL_LINES = 40
SWALLOWED = "Error in _run_prompt"  # verl/trainer/ppo/v1/agent_loop_tq.py, veRL 0.9.1
DUMPED = re.compile(r"Dumped generations to (.*\.jsonl)")  # verl/trainer/ppo/v1/trainer_base.py, when the file is whole
STOP_TIMEOUT_S = 30.0
AUDIO_TIMEOUT_S = 120.0  # after the training's end
SHOWN = {  # veRL's name -> ours, format
    "critic/score/mean": "reward {:.3f}",
    "response_length/mean": "{:.0f} tokens",
    "response_length/clip_ratio": "{:.1%} cut",
    "actor/entropy_loss": "entropy {:.2f}",
    "timing_s/step": "{:.1f} s",
    "timing_s/generation": "(rollouts {:.1f}",  # this one and the next: tts_grpo/training/verl_steps.py
    "timing_s/reward_wait": "then waiting for rewards {:.1f}",
    "timing_s/update_actor": "update {:.1f})",
}
VALIDATION = {
    "score/mean@1": "reward {:.3f}",
    "pinyin_error_rate/mean@1": "pinyin error rate {:.2%}",
    "num_speech_tokens/mean@1": "{:.1f} tokens",
    "bad_rollout/mean@1": "{:.1%} bad",
}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-file", type=Path, required=True, help="everything the command prints is appended here")
    parser.add_argument("--total-steps", type=int, required=True, help="steps of the whole training")
    parser.add_argument("--failure-file", type=Path, required=True, help="where the reward reports that it failed")
    parser.add_argument("--server-url", help="reward server that speaks what a validation said")
    parser.add_argument("--tensorboard-dir", type=Path, help="where that goes; needs --server-url")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command")
    if args.tensorboard_dir and not args.server_url:
        parser.error("--tensorboard-dir needs --server-url")
    return args


def summary(line: str, total_steps: int) -> list[str]:
    """The lines to show for a line of veRL's console log: none, or one for training and one for validation."""
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


class Training:
    """The command as a process that can be stopped with a reason."""

    def __init__(self, command: list[str], failure_file: Path):
        failure_file.unlink(missing_ok=True)
        self.failure_file, self.failure, self.lock = failure_file, None, threading.Lock()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, frame: self.process.send_signal(received))
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self.process.poll() is None:
            if self.failure_file.exists():
                self.stop(self.failure_file.read_text(encoding="utf-8").strip())
                return
            time.sleep(0.5)

    def stop(self, reason: str) -> None:
        """End the process; the first reason is kept."""
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
    """Lets validations be heard in TensorBoard, each by a process of its own; a failure is printed only."""

    def __init__(self, server_url: str, tensorboard_dir: Path):
        script = str(Path(__file__).with_name("validation_audio.py"))
        self.command = [sys.executable, script, "--server-url", server_url, "--tensorboard-dir", str(tensorboard_dir)]
        self.running = []

    def add(self, dump: str) -> None:
        """Start on a dump, and tell of those that have ended since the last one."""
        self.running = [(name, process) for name, process in self.running if not self._ended(name, process, 0.0)]
        try:
            process = subprocess.Popen([*self.command, "--dump", dump], stderr=subprocess.PIPE, text=True)
        except OSError as error:
            print(f"no sound of {dump}: {error}", flush=True)
        else:
            self.running.append((dump, process))

    def finish(self, timeout_s: float) -> None:
        """Wait for those that still run, and end what takes too long."""
        end = time.monotonic() + timeout_s
        for dump, process in self.running:
            if not self._ended(dump, process, max(0.0, end - time.monotonic())):
                process.kill()
                print(f"no sound of {dump}: not done in time", flush=True)

    @staticmethod
    def _ended(dump: str, process: subprocess.Popen, timeout_s: float) -> bool:
        try:
            _, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if process.returncode:
            print(f"no sound of {dump}: {errors.strip()[-500:]}", flush=True)
        return True


def main(argv=None):
    args = get_args(argv)
    args.log_file.parent.mkdir(parents=True, exist_ok=True)
    tail = collections.deque(maxlen=TAIL_LINES)
    start = time.monotonic()
    print(f"training starts (a minute or two until the first step); log: {args.log_file}", flush=True)
    audio = ValidationAudio(args.server_url, args.tensorboard_dir) if args.tensorboard_dir else None
    with args.log_file.open("a", encoding="utf-8") as log:
        training = Training(args.command, args.failure_file)
        for line in training.process.stdout:
            log.write(line)
            log.flush()
            tail.append(line)
            for text in summary(line, args.total_steps):
                print(f"[{time.monotonic() - start:6.0f} s] {text}", flush=True)
            dumped = DUMPED.search(line)
            if dumped and audio:
                audio.add(dumped[1])
            if SWALLOWED in line and training.failure is None:
                reason = f"a rollout failed: {line.strip()}"
                threading.Thread(target=training.stop, args=(reason,), daemon=True).start()
    status = training.process.wait()
    if audio:
        audio.finish(AUDIO_TIMEOUT_S if status == 0 else 0.0)
    if status == 0 and training.failure is None:
        return 0
    sys.stderr.writelines(tail)
    reason = training.failure or f"status {status}"
    print(f"training failed: {reason}\nIts last lines are above, all in {args.log_file}", file=sys.stderr)
    return 128 - status if status < 0 else status or 1


if __name__ == "__main__":
    sys.exit(main())
