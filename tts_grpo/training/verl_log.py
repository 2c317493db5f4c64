"""The lines of veRL's console log that hold a step's metrics: ``step:3 - actor/entropy:2.5 - ...``."""

import re

_STEP = re.compile(r"step:(\d+) - (.*)")
_VALUE = re.compile(r"(\S+?):(?:np\.\w+\()?(-?[\d.]+(?:e[-+]?\d+)?)")


def parse_step(line: str) -> tuple[int, dict[str, float]] | None:
    """The step and its metrics by veRL's names; None for any other line."""
    match = _STEP.search(line)
    if not match:
        return None
    return int(match[1]), {name: float(value) for name, value in _VALUE.findall(match[2])}
