"""Tests that links, paths and commands in docs and docstrings are valid, and that tables agree with the linked JSON."""

import ast
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RESULTS = sorted(ROOT.glob("docs/results/*.json"))
TOP_FOLDERS = r"(?:assets|conf|docs|scripts|tests|tiny_stack|tools|tts_grpo)"
# Must not follow another path, or "M `" or "C `", with which docs/differences.md marks paths in the published recipes.
PATH = re.compile(rf"(?<![\w/.-])(?<![MC] `){TOP_FOLDERS}/[\w./-]*\w/?")
NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
DATA = re.compile(r"^Data: \[[^\]]*\]\(([^)]*\.json)\)$")

COMMAND = re.compile(r"(?:\w+=\S* +)*(?:bash|ray|tensorboard|(?:\.venv/\w+/bin/)?(?:python|torchrun|pip install)) +\S")

page_cases = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: Path) -> list[tuple[str, str]]:
    """``(exports, command)`` of a page's bash blocks and of its inline code: comments removed, continued lines joined.

    ``exports`` are the block's lines before the command that export variables.
    """
    text = page.read_text("utf-8").replace("\\\n", " ")
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        exports = ""
        for line in (re.sub(r"\s+#.*", "", line) for line in block.splitlines()):
            if line.startswith("export "):
                exports += f"{line}; "
            elif line:
                found.append((exports, line))
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return found + [("", code) for code in inline if COMMAND.match(code)]


def usages(program: Path) -> list[tuple[str, str]]:
    """The commands in a program's docstring."""
    docstring = ast.get_docstring(ast.parse(program.read_text("utf-8"))) or ""
    text = re.sub(r"\n\s{8,}(?=-)", " ", docstring.replace("\\\n", " "))  # continued lines are indented further
    lines = (re.sub(r"\s+#.*", "", line.strip()) for line in text.splitlines() if line.startswith("    "))
    return [("", line) for line in lines if COMMAND.match(line)]


def arguments_of(command: str) -> tuple[str, list[str]] | None:
    """Module and arguments of a command that runs a Python program of this repository, None for other commands.

    Brackets around what may be left out are removed; placeholders such as N and DIR become 1, which a number may be.
    """
    words = shlex.split(re.sub(r"[\[\]]", "", command))
    if not {"python", "torchrun"} & {Path(word).name for word in words}:
        return None
    words = ["1" if re.fullmatch("[A-Z_]+", word) else word for word in words]
    if "-m" in words and words[words.index("-m") + 1].startswith("tiny_stack"):
        place = words.index("-m") + 1
        return words[place], words[place + 1 :]
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return None if place is None else (words[place].removesuffix(".py").replace("/", "."), words[place + 1 :])


def numbers(text: str) -> set[float]:
    """Absolute values of the numbers in a text; code and link targets do not count."""
    return {float(n.replace(",", "")) for n in NUMBER.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text))}


def leaves(value) -> set[float]:
    """Absolute values of the numbers in a JSON value, those in keys and strings included."""
    if isinstance(value, dict):
        return set().union(*(numbers(key) | leaves(v) for key, v in value.items()))
    if isinstance(value, list):
        return set().union(*map(leaves, value))
    return numbers(value) if isinstance(value, str) else set() if value is None else {abs(float(value))}


def tables_with_data(page: Path) -> list[tuple[str, Path]]:
    """Tables (rows as text, their header included) above each "Data:" line of a page, and the JSON that it links."""
    found, table = [], []
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("|"):
            table.append(line)
        elif match := DATA.match(line):
            found.append(("\n".join(table), page.parent / match[1]))
            table = []
        elif line:
            table = []
    return found


def find_commands() -> list[tuple[str, tuple[str, str]]]:
    """``(file name, (exports, command))`` of all pages and docstrings."""
    folders = ("", "scripts/", "tools/", "tiny_stack/")
    programs = sorted(path for folder in folders for path in ROOT.glob(f"{folder}*.py"))
    texts = [(page, commands(page)) for page in PAGES] + [(program, usages(program)) for program in programs]
    return [(path.name, found) for path, both in texts for found in both]


COMMANDS = find_commands()
ALL_COMMANDS = [(where, command) for where, (_, command) in COMMANDS]
PYTHON_COMMANDS = [(where, command) for where, command in ALL_COMMANDS if arguments_of(command)]
# --check depends on the machine's ports, disk and environments; test_check.py tests it
RUN_COMMANDS = sorted({both for _, both in COMMANDS if re.search(r"bash run\.sh(?! \[| --check)", both[1])})
SHELL_COMMANDS = [(where, command) for where, command in ALL_COMMANDS
                  if re.search(r"bash (?!run\.sh)\S+\.sh", command)]  # fmt: skip


def anchor(heading: str) -> str:
    """The anchor that GitHub makes for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@page_cases
def test_relative_links_have_a_target(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.M)
            assert fragment in map(anchor, headings), f"{page.name} links {target}, which has no such heading"


@page_cases
def test_named_paths_exist(page):
    named = [path for path in PATH.findall(page.read_text("utf-8")) if "NAME" not in path]
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize(("where", "command"), PYTHON_COMMANDS)
def test_python_commands_are_accepted_by_their_program(where, command, trainer_python):
    """Tests with the program's own parser that all flags exist and that no required flag is missing."""
    module, arguments = arguments_of(command)
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), command
    if module == "prepare_data":  # it imports packages of the trainer environment
        code = f"import sys, {module}; {module}.get_args(sys.argv[1:])"
        done = subprocess.run([trainer_python, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if hasattr(imported := importlib.import_module(module), "get_args"):
        imported.get_args(arguments)
    else:
        assert not arguments, f"{where}: {command}"


@pytest.mark.parametrize("exports_and_command", RUN_COMMANDS, ids=lambda both: both[1][:60])
def test_commands_of_the_recipe_run_as_printed(exports_and_command):
    """Runs commands with stages as dry runs, which process all settings, and --settings and --help unchanged."""
    exports, command = exports_and_command
    script = exports + command.replace("bash run.sh", "bash run.sh --dry-run")
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, f"{script}: {done.stderr}"
    settings = (ROOT / "conf/settings.sh").read_text("utf-8")
    unquoted = re.sub(r'"[^"]*"', "", exports + command.split("bash run.sh")[0])
    for name in re.findall(r"(\w+)=", unquoted):
        assert f"setting {name} " in settings, f"{name} is no setting: {command}"


@pytest.mark.parametrize(("where", "command"), SHELL_COMMANDS)
def test_other_shell_programs_exist_and_know_their_variables(where, command):
    variables, program = re.match(r"((?:\w+=\S+ +)*)bash (\S+)", command).groups()
    source = (ROOT / program).read_text("utf-8")
    for name in re.findall(r"(\w+)=", variables):
        assert f"${{{name}:" in source, f"{where}: {program} does not read {name}"


def test_no_command_is_left_out():
    """Everything that looks like a command of this repository is tested by one of the tests above."""
    assert len(PYTHON_COMMANDS) > 25 and len(RUN_COMMANDS) > 15 and len(SHELL_COMMANDS) > 3
    tested = {command for _, command in [*PYTHON_COMMANDS, *RUN_COMMANDS, *SHELL_COMMANDS]}
    free = ("pip install ", "ray start", "nvidia-cuda-mps-control", "tensorboard ", "run.sh [", "run.sh --check")
    left = [command for _, command in ALL_COMMANDS if command not in tested and not any(f in command for f in free)]
    assert not left


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_each_result_says_where_it_comes_from_and_is_shown(result):
    content = json.loads(result.read_text("utf-8"))
    assert {"title", "date", "commit", "machine", "command", "conditions", "figures"} <= content.keys()
    assert content["commit"] or content["commit_note"]
    assert any(result == data.resolve() for page in PAGES for _, data in tables_with_data(page))


@page_cases
def test_figures_of_a_table_are_those_of_its_json(page):
    for table, data in tables_with_data(page):
        assert table, f"{page.name}: no table above the link to {data.name}"
        missing = numbers(table) - leaves(json.loads(data.read_text("utf-8")))
        assert not missing, f"{page.name} shows {sorted(missing)}, which {data.name} lacks"


def test_a_wrong_figure_is_found(tmp_path):
    (tmp_path / "data.json").write_text('{"cer": 4.19, "ci": [-5.1, "25.1% to 40.1%"]}', "utf-8")
    page = tmp_path / "page.md"
    page.write_text("| CER | 4.19% (-5.1 to 40.2) `7` |\n\nData: [data](data.json)\n", "utf-8")
    ((table, data),) = tables_with_data(page)
    assert numbers(table) - leaves(json.loads(data.read_text("utf-8"))) == {40.2}
