"""README and docs: links, paths and commands exist, and the figures of a table are those of the JSON that it links."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RESULTS = sorted(ROOT.glob("docs/results/*.json"))
TOP_FOLDERS = r"(?:assets|conf|docs|scripts|tests|tiny_stack|tts_grpo)"
# Not preceded by another path, or by "M `" or "C `": docs/differences.md's paths in the published recipes.
PATH = re.compile(rf"(?<![\w/.-])(?<![MC] `){TOP_FOLDERS}/[\w./-]*\w/?")
NUMBER = re.compile(r"(?<![\w.])(?<!\w-)\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
DATA = re.compile(r"^Data: \[[^\]]*\]\(([^)]*\.json)\)$")

page_cases = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: Path) -> list[str]:
    """Commands of a page's bash blocks and of its inline code, continued lines joined, comments removed."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).splitlines()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [re.sub(r"\s#.*", "", line) for line in blocks + inline]


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


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@page_cases
def test_relative_links_lead_somewhere(page):
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


@page_cases
def test_commands_name_programs_flags_and_settings_that_exist(page):
    run_sh = (ROOT / "run.sh").read_text("utf-8")
    settings = run_sh + "".join(path.read_text("utf-8") for path in ROOT.glob("conf/**/*.sh"))
    for command in commands(page):
        for program in re.findall(r"(?:^|[\s/])(?:bash|python|torchrun)\s(?:.*?\s)?([\w./]+\.(?:py|sh))", command):
            if "..." in program or program == "X.py":
                continue
            assert (ROOT / program).is_file(), f"{page.name}: {command}"
            if program.endswith(".py"):
                flags = re.findall(r"(?<=\s)--[a-z][\w-]*", command.split(program, 1)[1])
                source = (ROOT / program).read_text("utf-8")
                assert not [flag for flag in flags if f'"{flag}"' not in source], f"{page.name}: {command}"
        if "bash run.sh" in command:
            flags = re.findall(r"(?<=\s)--[a-z][\w-]*", command)
            assert not [flag for flag in flags if flag not in run_sh], f"{page.name}: {command}"
            for name in re.findall(r"(\w+)=", command.split("bash run.sh")[0]):
                assert re.search(rf"\b{name}\b", settings), f"{page.name}: {name} is no setting: {command}"


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
