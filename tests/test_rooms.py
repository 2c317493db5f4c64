"""Tests that imports between the subpackages have one direction and need only what each environment has installed."""

import ast
import graphlib
import subprocess
import sys

from tests.conftest import ROOT, TRAINER_SCRIPTS

MAY_IMPORT = {
    "text": set(),
    "speech": {"text"},
    "reward": {"text", "speech"},
    "training": {"text", "speech", "reward"},
    "evaluation": {"text", "speech"},
}
TRAINER_PROGRAMS = {"prepare_data", "reward_tts", *(f"scripts.{name}" for name in TRAINER_SCRIPTS)}


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in (ROOT / "tts_grpo").rglob("*.py")}
PROGRAMS = {name: ROOT / f"{name.replace('.', '/')}.py" for name in TRAINER_PROGRAMS}


def imports(path) -> set[str]:
    """Modules that a file imports anywhere in its text."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members & MODULES.keys() or {node.module}
    return names


def not_installed(python: str, modules) -> set[str]:
    """Packages that modules import, directly or through tts_grpo, and that an environment does not have installed."""
    todo, seen, packages = list(modules), set(), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            found = imports((MODULES | PROGRAMS)[name])
            todo += found & MODULES.keys()
            packages |= {other.split(".")[0] for other in found - MODULES.keys()} - sys.stdlib_module_names
    code = "import sys, importlib.util as u; print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))"
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_imports_go_one_way():
    for name, path in MODULES.items():
        if room := name.split(".")[1:2]:
            others = {other.split(".")[1] for other in imports(path) & MODULES.keys()} - set(room)
            assert others <= MAY_IMPORT[room[0]], f"{name} imports {others - MAY_IMPORT[room[0]]}"
    graphlib.TopologicalSorter({name: imports(path) for name, path in MODULES.items()}).prepare()  # else CycleError


def test_modules_import_only_packages_of_their_environment(trainer_python):
    training = {name for name in MODULES if name.startswith("tts_grpo.training.")}
    missing = not_installed(trainer_python, training | TRAINER_PROGRAMS)
    assert missing <= {"triton", "vllm"}  # which are not installed for CPUs; gpu_log_probs and vllm_server need them
    users = {name for name, path in MODULES.items() if any(used.split(".")[0] == "vllm" for used in imports(path))}
    assert users == {"tts_grpo.training.vllm_server"}
    assert not_installed(sys.executable, MODULES.keys() - training) == set()
    assert {"funasr"} <= not_installed(trainer_python, ["tts_grpo.reward.scorer"])
    assert "verl" in not_installed(sys.executable, training)
