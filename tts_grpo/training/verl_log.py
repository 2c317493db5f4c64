"""Metrics of a step in veRL's console log, for display: ``step:3 - actor/entropy:2.5 - ...``.

Nothing else may depend on this wording: a line of another form is one that is not shown.
"""

import re

_STEP = re.compile(r"step:([0-9]{1,9}) - (.*)", re.DOTALL)
_VALUE = re.compile(r"(?:np\.\w+\()?(-?[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)\)?", re.ASCII)


def parse_step(line: str) -> tuple[int, dict[str, float]] | None:
    """The step and its metrics by veRL's names, finite numbers only; None for any other line."""
    match = _STEP.search(line)
    if not match:
        return None
    values = {}
    for item in match[2].split(" - "):  # no regular expression: its time would grow with the square of a line's length
        name, _, value = item.strip().rpartition(":")
        if name and (number := _VALUE.fullmatch(value)):
            values[name] = float(number[1])
    return int(match[1]), values
