"""The setting ``rewards``: which parts a reward has, with their weights and options.

Parts are separated by spaces, and each has the form ``NAME:WEIGHT,OPTION=VALUE,...``, for example::

    intelligibility:1 pitch:0.2,semitones=3.2 /home/me/my_reward.py:0.3,floor=0.1

NAME is a module of ``tts_grpo/reward/parts``, or the path of a file of the same form (in quotes if it has spaces).
Every part has the options ``floor`` and ``required``; others are the keyword arguments of its class. This module needs
only the standard library: it also runs where no environment exists yet.
"""

import ast
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PARTS = Path(__file__).parent / "parts"
CLASS = "Reward"  # name of the class that a part's file defines
DEFAULT = "intelligibility:1"
NO_PARTS = ("__init__", "interface")  # files of that folder which define none


@dataclass(frozen=True)
class RewardSpec:
    """A part of the reward, as the setting ``rewards`` gives it.

    Attributes:
        name: the file's name without ``.py``.
        path: the file.
        weight: weight in the mean of the parts, more than 0.
        floor: a rollout with a lower score in this part has the reward 0.
        required: whether a rollout without a score of this part has no reward. If not, the others decide.
        options: keyword arguments of the part's class: numbers where the text is a number, else texts.
    """

    name: str
    path: Path
    weight: float = 1.0
    floor: float = 0.0
    required: bool = True
    options: dict[str, float | str] = field(default_factory=dict)


def known_parts() -> list[str]:
    """Return the names of this recipe's parts."""
    return sorted(path.stem for path in PARTS.glob("*.py") if path.stem not in NO_PARTS)


def parse_rewards(text: str) -> list[RewardSpec]:
    """Parse the setting ``rewards``.

    Raises:
        ValueError: there is no part; a part is unknown, or occurs twice; its file defines no class ``Reward``; a
            weight, floor or option is not allowed. The message names the part and what is allowed.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"rewards={text}: {error}") from None
    specs = [_parse_part(word) for word in words]
    names = [spec.name for spec in specs]
    if not names:
        raise ValueError(f"rewards is empty: it needs at least one of {', '.join(known_parts())}, or a file")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"rewards has {twice[0]} twice")
    return specs


def _parse_part(word: str) -> RewardSpec:
    head, *assignments = word.split(",")
    name, colon, weight = head.rpartition(":")
    if not colon:
        name, weight = head, "1"
    path = Path(name) if name.endswith(".py") else PARTS / f"{name}.py"
    if not name.endswith(".py") and name not in known_parts():
        raise ValueError(f"rewards: no part {name!r}: there are {', '.join(known_parts())}, or the path of a .py file")
    values = {"weight": _value(weight)}
    for assignment in assignments:
        option, equals, value = assignment.partition("=")
        if not equals or not value:
            raise ValueError(f"rewards: {path.stem}: {assignment!r} is not of the form option=value")
        values[option] = _value(value)
    weight, floor, required = values.pop("weight"), values.pop("floor", 0.0), values.pop("required", 1.0)
    if not isinstance(weight, float) or not 0 < weight < float("inf"):
        raise ValueError(f"rewards: the weight of {path.stem} is {weight}: expected a number above 0")
    if not isinstance(floor, float) or not 0 <= floor <= 1:
        raise ValueError(f"rewards: {path.stem}: floor={floor}: expected a number from 0 to 1")
    if required not in (0.0, 1.0):
        raise ValueError(f"rewards: {path.stem}: required={required}: expected 0 or 1")
    allowed, needed = _options(path)
    if wrong := [option for option in values if option not in allowed]:
        raise ValueError(
            f"rewards: {path.stem} has no option {wrong[0]!r}: it has {', '.join([*allowed, 'floor', 'required'])}"
        )
    if missing := [option for option in needed if option not in values]:
        raise ValueError(f"rewards: {path.stem} needs {missing[0]}, as in {path.stem}:{weight:g},{missing[0]}=VALUE")
    return RewardSpec(path.stem, path, weight, floor, bool(required), values)


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _options(path: Path) -> tuple[list[str], list[str]]:
    """Return the keyword arguments of a part's class, and those of them without a default.

    Raises:
        ValueError: the file cannot be read, is no Python, or has no class ``Reward``.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"rewards: {path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"rewards: {path} is no Python program: {error}") from None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == CLASS]
    if not classes:
        raise ValueError(f"rewards: {path} defines no class {CLASS} (docs/rewards.md)")
    for node in classes[-1].body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return _keywords(node.args)
    return [], []


def _keywords(arguments: ast.arguments) -> tuple[list[str], list[str]]:
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][2:]  # after self and context
    with_default = positional[len(positional) - len(arguments.defaults) :] if arguments.defaults else []
    keywords = [argument.arg for argument in arguments.kwonlyargs]
    with_default += [name for name, default in zip(keywords, arguments.kw_defaults, strict=True) if default is not None]
    names = positional + keywords
    return names, [name for name in names if name not in with_default]


def files(specs: Sequence[RewardSpec]) -> Iterator[Path]:
    """Yield what the scores depend on besides the models of the server: the parts' files, and files in options."""
    for spec in specs:
        yield spec.path
        for value in spec.options.values():
            if isinstance(value, str) and Path(value).is_file():
                yield Path(value)
            elif isinstance(value, str) and Path(value).is_dir():
                yield from sorted(path for path in Path(value).iterdir() if path.is_file() and path.suffix != ".md")
