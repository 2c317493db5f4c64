"""Validate run.sh's settings, print them as a table or JSON, and compute the state that a stage's result depends on.

The state of a stage is one line of JSON: ``settings`` that its result depends on, ``read`` with the SHA-256 of the
files and folders that it reads, ``code``, and ``made_from``, which run.sh adds. A result is up to date if the state
stored with it equals the current state.

``code`` has a SHA-256 for each program that makes the result, for each module of tts_grpo that it imports directly or
indirectly, for the pinned packages, and for the command lines that run.sh and conf/ build. Comments, docstrings and
blank lines are excluded, so that only changes that can affect a result count.

Settings are read from stdin as run.sh's ``send_settings`` writes them: six fields per setting, each terminated by a NUL
byte. This program needs only the standard library, because the environments may not exist yet.
"""

import argparse
import ast
import hashlib
import io
import json
import os
import re
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tts_grpo.reward import rewards  # both need only the standard library
from tts_grpo.text.input_files import split_paths

INT = re.compile(r"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
BOUND = re.compile(r"(>=|<=|>)(-?[0-9.]+)")
DEVICES = re.compile(r"(cpu|cuda(:[0-9]+)?)( +(cpu|cuda(:[0-9]+)?))*")
WIDTH = 120  # width of the table, in characters
HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ROOT = Path(__file__).resolve().parent.parent
CODE = {  # programs that make each stage's result; "4" is the evaluation's speech and "4s" its scores
    "0": ("prepare_data.py", "scripts/prepare_llm.py"),
    "2": ("reward_tts.py", "token2wav_asr_server.py", "requirements-cosyvoice.txt", "requirements-verl.txt",
          "requirements-verl-gpu.txt",
          # veRL imports these modules by name
          "tts_grpo/training/trainer.py", "tts_grpo/training/engine.py", "tts_grpo/training/verl_vllm.py",
          "tts_grpo/training/vllm_server.py",
          "tts_grpo/training/verl_cpu/platform.py", "tts_grpo/training/verl_cpu/rollout.py"),
    "3": ("scripts/merge.py", "scripts/convert_llm.py"),
    "4": ("infer_dist.py", "requirements-cosyvoice.txt"),
    "4s": ("scripts/compute_wer.sh", "scripts/score.py", "scripts/summarise.py", "scripts/report.py",
           "tts_grpo/evaluation/report/page.html", "tts_grpo/evaluation/report/macros.html",
           "tts_grpo/evaluation/report/style.css"),
}  # fmt: skip
COMMANDS = "command line from run.sh and conf"  # key of the command lines in ``code``


class Setting(NamedTuple):
    """A setting declared in conf/settings.sh.

    ``origin`` is environment, recipe, evaluation, algorithm, profile, command line or default.
    """

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
        help="what to print; validate: invalid settings; differences: between the states --old and --new",
    )  # fmt: skip
    parser.add_argument("--recorded", type=Path, nargs="*", default=[], help="json: states whose settings override")
    parser.add_argument("--stages", nargs="+", help="state: stages to include")
    parser.add_argument("--read", nargs="*", default=[], metavar="NAME=PATH", help="state: further files and folders")
    parser.add_argument("--commands", default="", help="state: checksum of the stage's commands")
    parser.add_argument("--made-from", nargs="*", default=[], metavar="NAME=TEXT", help="state: further values")
    parser.add_argument("--cache", type=Path, help="state: file that keeps the checksums of large files")
    parser.add_argument("--old", type=Path, help="differences: file with a state in its first line")
    parser.add_argument("--new", type=json.loads, help="differences: the current state, as JSON")
    parser.add_argument("--ignore", nargs="*", default=[], help="differences: names to ignore")
    return parser.parse_args(argv)


def read_settings(data: bytes) -> list[Setting]:
    """Parse the settings that ``send_settings`` wrote."""
    fields = [os.fsdecode(field) for field in data.split(b"\0")[:-1]]
    size = len(Setting._fields)
    return [Setting(*fields[first : first + size]) for first in range(0, len(fields), size)]


def within(value: float, bounds: list[tuple[str, str]]) -> bool:
    compare = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__}
    return all(compare[sign](value, float(bound)) for sign, bound in bounds)


def expectation(kind: str) -> str:
    """Describe the values that a kind allows, for error messages."""
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
        "names": "names without ${, separated by spaces",
        "path": "a path without ${",
        "folder": "a path without ${, [ or ]",
        "input": "the path of a file or folder, without ${",
        "inputs": "paths of files or folders, separated by spaces, without ${",
    }.get(kind, "not empty")


def allowed(kind: str, value: str) -> bool:
    """Whether the value is allowed for a setting of this kind."""
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
        return False  # veRL's data loader (datasets.load_dataset) would read the path as a glob pattern
    # veRL (OmegaConf) would interpret ${ as a reference to another setting
    return kind == "text" or "${" not in value


def faults(settings: list[Setting]) -> list[str]:
    """One error message per value that is not allowed."""
    found = []
    for s in settings:
        if not allowed(s.kind, s.value):
            found.append(f"{s.name}={s.value}: expected {expectation(s.kind)} ({s.meaning})")
        elif s.kind == "rewards":
            try:
                rewards.parse_rewards(s.value)
            except ValueError as error:
                found.append(str(error))
    return found


def inputs_of(s: Setting) -> dict[str, str]:
    """The files and folders that a setting names, by a name for each."""
    if not s.value or not s.kind.startswith(("input", "rewards")):
        return {}
    if s.kind.startswith("inputs"):
        return {f"{s.name} {number}": path for number, path in enumerate(split_paths(s.value))}
    if s.kind == "rewards":  # this recipe's parts count as code
        return {
            f"{s.name}: {path}": str(path)
            for path in rewards.files(rewards.parse_rewards(s.value))
            if ROOT not in path.parents
        }
    return {s.name: s.value}


def table(settings: list[Setting]) -> str:
    """Format one line per setting: name, value, origin, meaning. After a long value, the rest goes on a new line."""
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
    """Normalise a value, so that equal numbers have equal text (1e-6 and 0.000001)."""
    if kind.startswith("number"):
        return repr(float(value))
    return " ".join(value.split()) if kind in ("ints", "devices", "names") else value


def code_of(text: str, suffix: str) -> str:
    """A program's text without comments, docstrings and blank lines. Shell scripts lose whole-line comments only."""
    lines = text.splitlines()
    if suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, HAVE_DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
                first, last = node.body[0].lineno, node.body[0].end_lineno
                lines[first - 1 : last] = [""] * (last - first + 1)
    elif suffix in (".sh", ".txt"):
        lines = [line for line in lines if not line.lstrip().startswith("#")]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def imported(text: str) -> list[str]:
    """Paths, relative to the root, of the tts_grpo modules that a Python program imports anywhere in its text."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = [name.replace(".", "/") for name in names if name.split(".")[0] == "tts_grpo"]
    files = [f"{path}{end}" for path in paths for end in (".py", "/__init__.py")]
    return sorted(file for file in files if (ROOT / file).is_file())


class Digests:
    """Cached SHA-256 of files and folders; a file is hashed again if its size or timestamps have changed."""

    def __init__(self, cache: Path):
        self.cache = cache
        try:
            self.known = json.loads(cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.known = {}
        self.saved = dict(self.known)

    def of(self, path: Path) -> str:
        """Digest of a file, or of a folder's non-hidden files and their names; "missing" if the path does not exist."""
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

    def of_code(self, programs: list[str]) -> dict[str, str]:
        """Digests (of :func:`code_of`) of programs and the modules they import, by path relative to the root."""
        found, todo = {}, list(programs)
        while todo:
            name = todo.pop()
            if name not in found:
                found[name], more = self._of_program(ROOT / name) if (ROOT / name).is_file() else ("missing", [])
                todo += more
        return dict(sorted(found.items()))

    def _of_program(self, path: Path) -> list:
        """A program's digest, and the paths of the modules that it imports."""
        key = f"code {self._key(path)}"
        if key not in self.known:
            text = path.read_text(encoding="utf-8")
            digest = hashlib.sha256(code_of(text, path.suffix).encode()).hexdigest()
            self.known[key] = [digest, imported(text) if path.suffix == ".py" else []]
        return self.known[key]

    @staticmethod
    def _key(path: Path) -> str:
        about = path.stat()
        return f"{path.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"

    def _of_file(self, path: Path) -> str:
        key = self._key(path)
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


def state(args, settings: list[Setting], digests: Digests) -> dict:
    """The state that the results of some stages depend on."""
    stages, read = args.stages, pairs(args.read)
    used = [s for s in settings if set(stages) & set(s.stages.split())]
    inputs = {name: path for s in used for name, path in inputs_of(s).items()} | read
    programs = [path for stage in stages for path in CODE[stage]]
    for s in used:
        if s.kind == "rewards":
            own = [path for path in rewards.files(rewards.parse_rewards(s.value)) if ROOT in path.parents]
            programs += [path.relative_to(ROOT).as_posix() for path in own if path.suffix == ".py"]

    return {
        "settings": {s.name: normalised(s.kind, s.value) for s in used},
        "read": {name: digests.of(Path(path)) for name, path in inputs.items()},
        "code": digests.of_code(programs) | {COMMANDS: args.commands},
        "made_from": pairs(args.made_from),
    }


def read_state(path: Path) -> dict:
    """Read the state from the first line of a file; the state is empty if the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    except (OSError, ValueError):
        return {}


def differences(old: dict, new: dict, ignore: list[str]) -> list[str]:
    """Describe the differences: one entry per name whose value or content differs."""
    if not old:
        return ["there is no record of what it was made from"]
    found = []
    for part in ("settings", "read", "code", "made_from"):
        before, after = old.get(part, {}), new.get(part, {})
        for name in sorted({*before, *after} - set(ignore)):
            if part not in ignore and before.get(name) != after.get(name):
                values = f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
                found.append(values if part == "settings" else f"{name} has changed")
    return found


def pairs(texts: list[str]) -> dict[str, str]:
    """Parse ``name=text`` arguments to ``{"name": "text"}``."""
    return dict(text.split("=", 1) for text in texts)


def as_text(args, settings: list[Setting]) -> str:
    """The output of each action other than "validate"."""
    if args.action == "table":
        return table(settings)
    if args.action == "json":
        recorded = [read_state(path).get("settings", {}) for path in args.recorded]
        return json.dumps({s.name: s.value for s in settings} | {k: v for part in recorded for k, v in part.items()})
    digests = Digests(args.cache)
    present = state(args, settings, digests)
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
