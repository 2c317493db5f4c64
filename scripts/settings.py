"""What run.sh knows of its settings: are the values allowed, a table, JSON, and whether a stage must be redone.

Reads the settings from stdin as run.sh's ``send_settings`` writes them: six fields each, every field ended by a NUL
byte. Needs nothing but Python, as there may be no environment yet.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from typing import NamedTuple

INT = re.compile(r"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
BOUND = re.compile(r"(>=|<=|>)(-?[0-9.]+)")
DEVICES = re.compile(r"(cpu|cuda(:[0-9]+)?)( +(cpu|cuda(:[0-9]+)?))*")
WIDTH = 120  # of the table


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
    parser.add_argument("action", choices=("validate", "table", "json"), help="what to print; validate: what is wrong")
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


def main(argv=None):
    args = get_args(argv)
    settings = read_settings(sys.stdin.buffer.read())
    if args.action == "validate":
        wrong = faults(settings)
        sys.stderr.write("".join(f"run.sh: {line}\n" for line in wrong))
        return int(bool(wrong))
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    print(table(settings) if args.action == "table" else json.dumps({s.name: s.value for s in settings}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
