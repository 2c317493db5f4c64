"""Check before a run for everything that would stop it: ``bash run.sh --check``.

Prints one line per check. A failed check is marked "wrong" and says what to do about it, and the exit status is then 1.
run.sh calls this program with its settings and with base_python, because the environments may not exist yet.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from tts_grpo.reward.ports import port_fault
from tts_grpo.reward.protocol import MODEL_NAME
from tts_grpo.speech.model_folders import (
    SENSEVOICE_FILES,
    TOKEN2WAV_FILES,
    as_list,
    check_llm_folder,
    generation_config,
    language_fault,
    missing_files,
    token2wav_kind,
)
from tts_grpo.text.input_files import read_eval_set, read_known_answers, read_texts, read_voices, split_paths
from tts_grpo.text.prompts import (
    GENERATION_END,
    GENERATION_START,
    IM_END,
    INSTRUCTION,
    SOS,
    TASK_ID,
    load_tokenizer,
    render_prompt,
)
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, first_speech_id, format_speech_tokens

ROOT = Path(__file__).resolve().parent.parent
LIBPYTHON = ROOT / "tts_grpo/reward/libpython.py"
GIB = 2**30
TRAINER_GIB = 12  # a 0.5B model's weights, optimizer states and activations; vLLM and the reward server come on top
VLLM_GIB = 5  # weights, workspace, and a KV cache for some dozens of rollouts
ADAM_BYTES = 12  # bytes per parameter in a checkpoint: weight and two Adam moments in float32
Finding = tuple[bool, str]  # whether the check passed, and its description


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--settings", type=json.loads, help="run.sh's variables, as JSON")
    parser.add_argument("--eval-sets", nargs="*", default=[], help="file, language and recogniser of each evaluation "
                        "set, from run.sh")  # fmt: skip
    parser.add_argument("--contradictions", nargs="*", default=[], help="faults of settings and folders from run.sh")
    parser.add_argument("--data-flags", nargs=argparse.REMAINDER, default=[], help="flags of prepare_data.py; last")
    what.add_argument("--pins", type=Path, help="only compare this Python's packages with a requirements file")
    what.add_argument("--language-model", type=Path, help="only check this Hugging Face folder")
    args = parser.parse_args(argv)
    if args.settings:
        args.settings["eval_sets"] = list(zip(*[iter(args.eval_sets)] * 3, strict=True))
    return args


def finding(good: bool, what: str, remedy: str) -> Finding:
    """A finding with the text ``what``; ``remedy`` is appended if the check failed."""
    return good, what if good else f"{what}{remedy}"


def run(command: list, timeout_s: float = 120.0) -> tuple[int, str]:
    """Run a command. Returns its exit status and the last line of its stdout, or of stderr after a failure."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


def findings_of(command: list) -> Iterator[Finding]:
    """Findings of one part of this program, run by another environment's Python."""
    status, line = run(command)
    if status:
        yield False, f"{command[0]} fails: {line}"
    else:
        yield from map(tuple, json.loads(line))


def check_environments(s: dict) -> Iterator[Finding]:
    pins = (("speech", ROOT / "requirements-cosyvoice.txt"), ("trainer", s["trainer_requirements"]))
    for name, requirements in pins:
        python = Path(s["venv_root"]) / name / "bin" / "python"
        if not python.exists():
            yield False, f"environment {name}: {python} is missing: run bash run.sh -1 -1"
        elif s["make_envs"] == "1":
            yield from findings_of([python, __file__, "--pins", requirements])
        else:
            yield True, f"environment {name}: {python}, as it is (make_envs=0)"
    speech = Path(s["venv_root"]) / "speech/bin/python"
    pythons = [s["base_python"]] * (s["make_envs"] == "1") + [str(speech)] * speech.exists()
    faults = [line for python in pythons for status, line in [run([python, "-I", LIBPYTHON])] if status]
    yield not faults, faults[0] if faults else "shared library of Python for the reward server"


def check_pins(requirements: Path) -> Iterator[Finding]:
    wrong = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        name, _, version = re.split(r"[#;\\]", line)[0].strip().partition("==")
        if not version:
            continue
        try:
            found = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != version.split("+")[0]:
            wrong.append(f"{name} {found}, not {version}")
    shown = "; ".join(wrong[:3]) + (f"; {len(wrong) - 3} more" if len(wrong) > 3 else "")
    yield finding(not wrong, f"packages of {requirements.name}", f": {shown}: bash run.sh -1 -1")


def check_files(s: dict) -> Iterator[Finding]:
    kind = token2wav_kind(s["token2wav_dir"]) or s["profile"]
    missing = missing_files(s["token2wav_dir"], TOKEN2WAV_FILES[kind])
    asr_dirs = [s["reward_asr_dir"]]
    if s["reward_asr_dirs"]:
        asr_dirs = split_paths(s["reward_asr_dirs"])
    for folder in asr_dirs:
        missing += missing_files(folder, SENSEVOICE_FILES)
    # the evaluation supports several ASR backends (tts_grpo/speech/asr/loading.py)
    names = ("eval_asr_dir", "eval_asr_dir_en", "judge_asr_dir", "prompt_audio", "prompt_list")
    others = (Path(s[name]) for name in names if s[name])
    missing += [path for path in (*others, *(Path(file) for file, *_ in s["eval_sets"])) if not path.exists()]
    yield from (
        (False, f"{path} is missing: run bash run.sh -1 -1 to download it, or set its variable") for path in missing
    )
    rewarding = {Path(folder).resolve() for folder in asr_dirs}
    evaluating = {Path(recogniser).resolve() for *_, recogniser in s["eval_sets"]}
    if same := rewarding & evaluating:
        yield (
            False,
            f"{same.pop()} is a recogniser of the reward and of the evaluation: the evaluation needs another "
            "one (eval_asr_dir, eval_asr_dir_en)",
        )
    if s["judge_asr_dir"] and Path(s["judge_asr_dir"]).resolve() in rewarding | evaluating:
        yield False, "judge_asr_dir is a recogniser of the reward or the evaluation: a second opinion needs another"
    yield from check_languages(s, asr_dirs)
    if bool(s["prompt_audio"]) != bool(s["prompt_text"]):
        yield False, "a voice needs both prompt_audio and prompt_text"
    if kind == "cosyvoice2":
        status, _ = run([Path(s["venv_root"]) / "speech/bin/python", "-c", "import cosyvoice, matcha"])
        yield finding(status == 0, "CosyVoice's modules", " cannot be imported: is cosyvoice_dir right?")
    if not missing:
        yield True, "files of token2wav, recognisers and evaluation set"


def check_languages(s: dict, reward_asr_dirs: Sequence[str]) -> Iterator[Finding]:
    """Check that the recognisers know their languages; those of the training texts are checked with the texts."""
    needed = {folder: {s["language"]} for folder in reward_asr_dirs}
    for path, default, recogniser in s["eval_sets"]:
        try:
            languages = {row["language"] for row in read_eval_set(path, language=default)}
        except (OSError, ValueError):  # reported with the data
            continue
        for name in (recogniser, s["judge_asr_dir"]):
            needed.setdefault(name, set()).update(languages)
    for folder, languages in needed.items():
        for language in sorted(languages):
            if folder and Path(folder).is_dir() and (fault := language_fault(folder, language)):
                yield False, f"language {language}: {fault}: set the folder of another recogniser, or another language"


def check_data(s: dict, data_flags: Sequence[str] = ()) -> Iterator[Finding]:
    """Check every line of the data with stage 0's program, or only that it can be read if there is no environment."""
    python, model = Path(s["venv_root"]) / "trainer/bin/python", Path(s["sft_path"])
    readers = {"known_answer_jsonl": read_known_answers, "prompt_list": read_voices}
    if python.exists() and model.exists():
        files = ["--train-file", s["train_jsonl"], "--test-file", s["test_jsonl"], "--llm-path", model]
        command = [python, ROOT / "prepare_data.py", "--check", *files, *data_flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            yield False, f"texts: {done.stderr.strip().split('prepare_data.py: ')[-1]}"
        else:
            yield True, f"texts: {done.stdout.strip()}"
    else:
        readers |= {"train_jsonl": read_texts, "test_jsonl": read_texts}
    files = [(name, s[name], read) for name, read in readers.items() if s[name]]
    if "train_jsonl" in readers:
        files += [("evaluation set", path, read_eval_set) for path, *_ in s["eval_sets"]]
    for name, path, read in files:
        try:
            yield True, f"{name} {path}: {len(read(path))} entries"
        except OSError as error:
            yield False, f"{name} {path}: {error.strerror}"
        except ValueError as error:
            yield False, f"{name}: {error}"


def check_language_model(s: dict) -> Iterator[Finding]:
    python = Path(s["venv_root"]) / "trainer/bin/python"
    if not Path(s["sft_path"]).exists():
        yield False, f"language model {s['sft_path']} is missing: run bash run.sh -1 -1 to download it, or set sft_path"
    elif python.exists():
        yield from findings_of([python, __file__, "--language-model", s["sft_path"]])


def language_model_findings(folder: Path) -> Iterator[Finding]:
    """Check tokenizer, chat template and end tokens for veRL and this recipe. Runs in the trainer environment."""
    from transformers import AutoConfig

    try:
        check_llm_folder(folder)
        config, tokenizer = AutoConfig.from_pretrained(folder), load_tokenizer(folder)
        generation, left_out = generation_config(folder, tokenizer)
    except (OSError, ValueError, KeyError) as error:
        message = str(error).strip().splitlines()[0]
        yield False, f"language model {folder}: {message} (for CosyVoice's own format, set llm=official)"
        return
    yield len(tokenizer) <= config.vocab_size, f"{len(tokenizer)} tokens, {config.vocab_size} rows of weights"
    yield from speech_token_findings(tokenizer)
    yield from prompt_findings(tokenizer)
    vocabulary, ends = tokenizer.get_vocab(), as_list(generation["eos_token_id"])
    # The SFT model ends a response with the chat's end token; the tiny model has its own end token.
    wanted = (
        "<|eos1|>" if SOS in tokenizer.chat_template else GENERATION_END if GENERATION_END in vocabulary else IM_END
    )
    yield finding(
        vocabulary.get(wanted) in ends,
        f"end tokens {tokenizer.convert_ids_to_tokens(ends)}",
        f" lack {wanted}: correct eos_token_id in generation_config.json",
    )
    if left_out:
        yield True, f"settings of generation_config.json that are not used: {json.dumps(left_out)}"
    yield from head_bias_findings(folder, tokenizer, config.vocab_size)


def head_bias_findings(folder: Path, tokenizer, vocab_size: int) -> Iterator[Finding]:
    """Check the head's bias, which CosyVoice's own models need: it excludes text ids."""
    from tts_grpo.speech.head_bias import load_head_bias, sampleable_ids

    try:
        bias = load_head_bias(folder, tokenizer)
    except ValueError as error:
        yield False, str(error)
        return
    if bias is not None:
        what = f"bias of the head: {len(sampleable_ids(bias))} of {len(bias)} ids can be sampled"
        yield finding(len(bias) == vocab_size, what, f", but there are {vocab_size}: download or convert it again")


def speech_token_findings(tokenizer) -> Iterator[Finding]:
    names = f"<|s_0|> to <|s_{NUM_SPEECH_TOKENS - 1}|>"
    try:
        first = first_speech_id(tokenizer)
    except ValueError as error:
        yield False, str(error)
    else:
        yield True, f"{names}: ids from {first} on"
        kept = tokenizer.decode([first, first + NUM_SPEECH_TOKENS - 1], skip_special_tokens=True).replace(" ", "")
        good = kept == format_speech_tokens([0, NUM_SPEECH_TOKENS - 1])
        yield finding(good, f"{names} decode to {kept!r}", ": they are special tokens, which veRL removes")
    break_ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(break_ids) != 1 or tokenizer.convert_tokens_to_ids(IM_END) in (None, tokenizer.unk_token_id):
        yield False, f"the tokenizer must know {IM_END} and write a line break as one token, for veRL"


def prompt_findings(tokenizer) -> Iterator[Finding]:
    try:
        prompt = render_prompt(tokenizer, "你好")
    except Exception as error:  # a user's chat template may raise anything
        yield False, f"chat template: {error}"
        return
    start = TASK_ID if SOS in prompt else GENERATION_START
    good = "你好" in prompt and (SOS in prompt or INSTRUCTION in prompt)
    yield finding(good, f"prompt {prompt!r}", " does not contain instruction and text: see tts_grpo/text/prompts.py")
    last = tokenizer.decode(tokenizer(prompt, add_special_tokens=False)["input_ids"][-1:])
    yield finding(last == start, f"its last token is {last!r}", f": {start} is not in the vocabulary")


def server_ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/v2/models/{MODEL_NAME}/ready", timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def check_server(s: dict) -> Iterator[Finding]:
    """Check a running server with known answers, or the ports for the server that stage 1 will start."""
    here, urls = f"http://127.0.0.1:{s['http_port']}", s["server_urls"].replace(",", " ").split()
    running = [url for url in urls if server_ready(url)]
    for url in urls:
        if url not in (*running, here):
            yield False, f"no reward server is ready at {url}: there, server_address=0.0.0.0 bash run.sh 1 1"
    for name in () if here in running else ("http_port", "grpc_port", "metrics_port"):
        fault = port_fault(s["server_address"], int(s[name]))
        yield (
            not fault,
            f"{name} {s[name]}: {fault}: stop the process that uses it, or set {name}"
            if fault
            else f"{name} {s[name]} is free",
        )
    if running and s["check_reward"] == "1":
        python = Path(s["venv_root"]) / "trainer/bin/python"
        command = [
            python,
            ROOT / "reward_tts.py",
            "--check",
            "--limit",
            "32",
            "--patience-s",
            "0",
            "--language",
            s["language"],
        ]
        status, line = run([*command, "--jsonl", s["known_answer_jsonl"], "--server-urls", running[0]])
        yield status == 0, f"known answers of {running[0]}: {line}"


def visible_gpus(gpus: list[list[str]], visible: str | None) -> list[list[str]]:
    """The GPUs that CUDA makes visible to a program, in CUDA's order.

    Args:
        gpus: index, UUID, name, total and used memory of each, as nvidia-smi prints them.
        visible: CUDA_VISIBLE_DEVICES: indices, GPU or MIG UUIDs, or prefixes of UUIDs. None means all GPUs.

    Raises:
        ValueError: it names a GPU that does not exist. (CUDA would silently use only the GPUs listed before it.)
    """
    if visible is None:
        return gpus
    found = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        if name.startswith("MIG-"):
            found.append([name, name, "MIG device", "[N/A]", "[N/A]"])
            continue
        same = [gpu for gpu in gpus if name == gpu[0] or (name.startswith("GPU-") and gpu[1].startswith(name))]
        if not same:
            raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} names {name}, which nvidia-smi does not list: correct it")
        found.append(same[0])
    return found


def check_gpus(s: dict) -> Iterator[Finding]:
    if s["train_device"] != "cuda":
        return
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
        lines = visible_gpus([line.split(", ") for line in lines], os.environ.get("CUDA_VISIBLE_DEVICES"))
    except (OSError, subprocess.CalledProcessError):
        yield False, "nvidia-smi does not run: no GPU or no driver here (profile=tiny needs none)"
        return
    except ValueError as error:
        yield False, str(error)
        return
    servers = [int(device[5:]) for device in s["server_devices"].split() if device.startswith("cuda:")]
    wanted = max([int(s["num_gpus"]), *(index + 1 for index in servers)])
    yield finding(
        len(lines) >= wanted,
        f"{len(lines)} GPUs: {lines[0][2] if lines else 'none'}",
        f": num_gpus and server_devices need {wanted}",
    )
    if server_ready(f"http://127.0.0.1:{s['http_port']}"):
        servers = []  # a running server has already allocated its memory
    for index, line in enumerate(lines[:wanted]):
        try:
            total_gib, used_gib = (float(part) / 1024 for part in line[3:])
        except ValueError:  # nvidia-smi prints [N/A] for MIG, or for memory shared by GPU and CPU
            yield True, f"GPU {index}: nvidia-smi does not report its memory, so it is not checked: set gpu_memory_gib"
            continue
        need_gib = servers.count(index) * int(s["server_instances"]) * float(s["server_gib"])
        if index < int(s["num_gpus"]):
            vllm_gib = float(s["vllm_memory_share"]) * total_gib
            need_gib += TRAINER_GIB + vllm_gib
            if vllm_gib < VLLM_GIB:
                yield (
                    False,
                    f"GPU {index} leaves {vllm_gib:.0f} GiB for vLLM, which needs {VLLM_GIB}: set server_devices",
                )
        what = f"GPU {index}: {total_gib - used_gib:.0f} GiB free, {need_gib:.0f} needed"
        remedy = ": stop the processes that use it (nvidia-smi), or set vllm_memory_share, server_gib or server_devices"
        yield finding(total_gib - used_gib >= need_gib, what, remedy)


def check_compiler(s: dict) -> Iterator[Finding]:
    """Check the C compiler. Triton needs it to build kernel launchers, in the reward server and in vLLM."""
    if s["train_device"] != "cuda":
        return
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    yield finding(compiler is not None, f"C compiler for Triton's kernels: {compiler}", ": install gcc, or set CC")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    yield finding(headers.exists(), str(headers), " is missing, for Triton's kernels: install it (Debian: python3-dev)")


def check_disk(s: dict) -> Iterator[Finding]:
    folder = Path(s["exp_dir"])
    weights = sum(path.stat().st_size for path in Path(s["sft_path"]).glob("*.safetensors"))
    # each parameter takes at least two bytes in that file
    need_gib = 2 + (int(s["max_checkpoints"]) + 1) * weights / 2 * ADAM_BYTES / GIB
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / GIB
    yield (
        free_gib >= need_gib,
        f"{folder}: {free_gib:.0f} GiB free, checkpoints may take {need_gib:.0f}"
        + ("" if free_gib >= need_gib else ": set exp_dir, or lower max_checkpoints"),
    )


CHECKS = (
    check_environments, check_files, check_language_model, check_gpus, check_compiler, check_server, check_disk,
)  # fmt: skip


def main(argv=None):
    args = get_args(argv)
    if args.pins or args.language_model:
        found = check_pins(args.pins) if args.pins else language_model_findings(args.language_model)
        print(json.dumps(list(found)))
        return 0
    findings = [(False, text) for text in args.contradictions] or [(True, "sizes of batches")]
    findings += [finding for check in CHECKS for finding in check(args.settings)]
    findings += check_data(args.settings, args.data_flags)
    for good, text in findings:
        print(f"{'ok   ' if good else 'WRONG'}  {text.replace(chr(10), chr(10) + ' ' * 7)}", flush=True)
    wrong = sum(not good for good, _ in findings)
    print(f"{wrong} of {len(findings)} checks failed" if wrong else f"all {len(findings)} checks passed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
