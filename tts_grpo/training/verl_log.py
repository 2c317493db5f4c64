"""Parse a step's metrics in veRL's console log for display: ``step:3 - actor/entropy:2.5 - ...``.

Only the display may depend on this format: lines in any other format are not displayed.
"""

import re

_STEP = re.compile(r"step:([0-9]{1,9}) - (.*)", re.DOTALL)
_VALUE = re.compile(r"(?:np\.\w+\()?(-?[0-9]+(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?)\)?", re.ASCII)


def parse_step(line: str) -> tuple[int, dict[str, float]] | None:
    """The step and its finite metrics by name; None if the line has no metrics."""
    match = _STEP.search(line)
    if not match:
        return None
    values = {}
    for item in match[2].split(" - "):  # not a regular expression, whose time would be quadratic in the line's length
        name, _, value = item.strip().rpartition(":")
        if name and (number := _VALUE.fullmatch(value)):
            values[name] = float(number[1])
    return int(match[1]), values
