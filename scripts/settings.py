"""What run.sh knows of its settings: are the values allowed, a table, JSON, and what a stage's result was made from.

The state of a stage is a line of JSON: ``settings`` that its result depends on, ``read`` and ``code`` with the SHA-256
of the files and folders that it reads and of the programs that it runs, and ``made_from``, what run.sh adds. A result
is up to date while the state beside it is the present one.

Reads the settings from stdin as run.sh's ``send_settings`` writes them: six fields each, every field ended by a NUL
byte. Needs nothing but Python, as there may be no environment yet.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

INT = re.compile(r"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
BOUND = re.compile(r"(>=|<=|>)(-?[0-9.]+)")
DEVICES = re.compile(r"(cpu|cuda(:[0-9]+)?)( +(cpu|cuda(:[0-9]+)?))*")
WIDTH = 120  # of the table
ROOT = Path(__file__).resolve().parent.parent
CODE = {  # of the results of a stage; "4" is the speech of the evaluation and "4s" its scores
    "0": ("prepare_data.py", "scripts/prepare_llm.py", "tts_grpo/text"),
    "2": ("reward_tts.py", "token2wav_asr_server.py", "scripts/verl_cpu.sh", "tts_grpo/text", "tts_grpo/speech",
          "tts_grpo/reward", "tts_grpo/training"),
    "3": ("scripts/merge.py",),
    "4": ("infer_dist.py", "tts_grpo/text", "tts_grpo/speech"),
    "4s": ("scripts/compute_wer.sh", "scripts/score.py", "tts_grpo/evaluation"),
}  # fmt: skip


class Setting(NamedTuple):
    """A line of conf/settings.sh with its value; ``origin``: environment, recipe, profile, command line or default."""

    name: str
    stages: str
    kind: str
    meaning: str
    origin: str
    value: str


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "action", choices=("validate", "table", "json", "state", "differences"),
        help="what to print; validate: what is wrong, differences: between the states --old and --new",
    )  # fmt: skip
    parser.add_argument("--recorded", type=Path, nargs="*", default=[], help="json: states whose settings hold instead")
    parser.add_argument("--stages", nargs="+", help="state: of these stages")
    parser.add_argument("--read", nargs="*", default=[], metavar="NAME=PATH", help="state: what else is read")
    parser.add_argument("--made-from", nargs="*", default=[], metavar="NAME=TEXT", help="state: what else counts")
    parser.add_argument("--cache", type=Path, help="state: file that keeps the checksums of large files")
    parser.add_argument("--old", type=Path, help="differences: file with a state in its first line")
    parser.add_argument("--new", type=json.loads, help="differences: a state")
    parser.add_argument("--ignore", nargs="*", default=[], help="differences: names that do not count")
    return parser.parse_args(argv)


def read_settings(data: bytes) -> list[Setting]:
    """The settings that ``send_settings`` wrote."""
    fields = [os.fsdecode(field) for field in data.split(b"\0")[:-1]]
    size = len(Setting._fields)
    return [Setting(*fields[first : first + size]) for first in range(0, len(fields), size)]


def within(value: float, bounds: list[tuple[str, str]]) -> bool:
    compare = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__}
    return all(compare[sign](value, float(bound)) for sign, bound in bounds)


def expectation(kind: str) -> str:
    """The values of a kind, in words."""
    kind = kind.rstrip("?")
    bounds = " and".join(f" {sign} {bound}" for sign, bound in BOUND.findall(kind))
    if "|" in kind:
        *first, last = kind.split("|")
        return f"{', '.join(first)} or {last}"
    if kind.startswith("int") and kind != "ints":
        return f"a whole number{bounds}"
    if kind.startswith("number"):
        return f"a number{bounds}"
    return {
        "ints": "whole numbers, separated by spaces, each once",
        "devices": "cpu, cuda or cuda:N, separated by spaces",
        "name": "a name without ${",
        "path": "a path without ${",
        "folder": "a path without ${, [ or ]",
        "input": "the path of a file or folder, without ${",
    }.get(kind, "not empty")


def allowed(kind: str, value: str) -> bool:
    """Whether a setting of this kind may have the value."""
    if not value:
        return kind.endswith("?")
    kind = kind.rstrip("?")
    if "|" in kind:
        return value in kind.split("|")
    if kind == "ints":
        numbers = value.split()
        return bool(numbers) and all(map(INT.fullmatch, numbers)) and len(set(numbers)) == len(numbers)
    if kind.startswith(("int", "number")) and kind != "input":
        form = INT if kind.startswith("int") else NUMBER
        return bool(form.fullmatch(value)) and within(float(value), BOUND.findall(kind))
    if kind == "devices":
        return bool(DEVICES.fullmatch(value))
    if kind == "folder" and ("[" in value or "]" in value):
        return False  # veRL's reader of data (datasets.load_dataset) takes them for a pattern
    # veRL would take ${ for a reference to another of its settings
    return kind == "text" or "${" not in value


def faults(settings: list[Setting]) -> list[str]:
    """A line for each value that is not allowed."""
    return [
        f"{s.name}={s.value}: it is {expectation(s.kind)} ({s.meaning})"
        for s in settings
        if not allowed(s.kind, s.value)
    ]


def table(settings: list[Setting]) -> str:
    """A line for each setting: name, value, origin, meaning; long values push the rest to a line of its own."""
    columns, width = "{:<24}{:<24}{:<14}", 24
    indent = " " * len(columns.format("", "", ""))
    lines = [columns.format("setting", "value", "from") + "meaning"]
    for s in settings:
        value = s.value if s.value and s.value.isprintable() else repr(s.value)
        if len(value) >= width:
            lines.append(f"{s.name:<{width}}{value}")
        start = columns.format(*(("", "") if len(value) >= width else (s.name, value)), s.origin)
        lines.append(start + f"\n{indent}".join(textwrap.wrap(s.meaning, WIDTH - len(indent))))
    return "\n".join(lines)


def normalised(kind: str, value: str) -> str:
    """The same text for the same value: 1e-6 and 0.000001 are one."""
    if kind.startswith("number"):
        return repr(float(value))
    return " ".join(value.split()) if kind in ("ints", "devices") else value


class Digests:
    """SHA-256 of files and folders by content; a file is read again if its size or its times have changed."""

    def __init__(self, cache: Path):
        self.cache = cache
        try:
            self.known = json.loads(cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}
        self.saved = dict(self.known)

    def of(self, path: Path) -> str:
        """Of a file, or of a folder's files with their names, hidden ones left out; "missing" where there is none."""
        if path.is_file():
            return self._of_file(path)
        if not path.is_dir():
            return "missing"
        total = hashlib.sha256()
        for folder, folders, files in os.walk(path, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
            for name in sorted(name for name in files if not name.startswith(".")):
                file = Path(folder, name)
                if file.is_file():
                    total.update(f"{self._of_file(file)} {file.relative_to(path)}\n".encode(errors="surrogateescape"))
        return total.hexdigest()

    def _of_file(self, path: Path) -> str:
        about = path.stat()
        key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        if key not in self.known:
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            self.known[key] = digest.hexdigest()
        return self.known[key]

    def save(self) -> None:
        if self.known != self.saved:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            part = self.cache.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(self.known), encoding="utf-8")
            part.replace(self.cache)


def state(settings: list[Setting], stages: list[str], read: dict, made_from: dict, digests: Digests) -> dict:
    """What the result of some stages is made from."""
    used = [s for s in settings if set(stages) & set(s.stages.split())]
    inputs = {s.name: s.value for s in used if s.kind.startswith("input") and s.value} | read
    return {
        "settings": {s.name: normalised(s.kind, s.value) for s in used},
        "read": {name: digests.of(Path(path)) for name, path in inputs.items()},
        "code": {path: digests.of(ROOT / path) for path in sorted({path for stage in stages for path in CODE[stage]})},
        "made_from": made_from,
    }


def read_state(path: Path) -> dict:
    """The state in the first line of a file; without one, an empty state."""
    try:
        return json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    except (OSError, ValueError):
        return {}


def differences(old: dict, new: dict, ignore: list[str]) -> list[str]:
    """In words: each name whose value or content differs."""
    if not old:
        return ["nothing is noted of what it was made from"]
    found = []
    for part in ("settings", "read", "code", "made_from"):
        before, after = old.get(part, {}), new.get(part, {})
        for name in sorted({*before, *after} - set(ignore)):
            if part not in ignore and before.get(name) != after.get(name):
                values = f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
                found.append(values if part == "settings" else f"{name} has changed")
    return found


def pairs(texts: list[str]) -> dict[str, str]:
    """``{"name": "text"}`` of ``name=text``."""
    return dict(text.split("=", 1) for text in texts)


def as_text(args, settings: list[Setting]) -> str:
    """The output of an action but "validate"."""
    if args.action == "table":
        return table(settings)
    if args.action == "json":
        recorded = [read_state(path).get("settings", {}) for path in args.recorded]
        return json.dumps({s.name: s.value for s in settings} | {k: v for part in recorded for k, v in part.items()})
    digests = Digests(args.cache)
    present = state(settings, args.stages, pairs(args.read), pairs(args.made_from), digests)
    digests.save()
    return json.dumps(present)


def main(argv=None):
    args = get_args(argv)
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    if args.action == "differences":
        print("; ".join(differences(read_state(args.old), args.new, args.ignore)))
        return 0
    settings = read_settings(sys.stdin.buffer.read())
    if args.action == "validate":
        wrong = faults(settings)
        sys.stderr.write("".join(f"run.sh: {line}\n" for line in wrong))
        return int(bool(wrong))
    print(as_text(args, settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
