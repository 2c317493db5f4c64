"""Benchmark the evaluation's synthesis (infer_dist.py): utterances per second by engine, precision and part.

    python tools/random_llm.py --output DIR/llm --mean-tokens 93
    python tools/bench_reward.py --random DIR --make-only
    python tools/bench_inference.py --llm-path DIR/llm --token2wav-dir DIR/cosyvoice2 --device cuda:0

The utterances are texts of --jsonl in the voices of --voices, as in a zero-shot evaluation. Models with random weights
are sufficient. These measurements run in this order, each after a few utterances that warm up:

* ENGINE-PRECISION, for each pair in --runs: synthesis without writing audio, with the seconds of its parts;
* sampling: generation alone with the evaluation's default sampling, which looks for likely tokens and penalises
  repetitions, of responses of equal length;
* independence: the share of responses that are the same, to the token, among other prompts in reverse order.

With --processes 1 2 4, only complete runs of infer_dist.py are measured instead, with audio written to disk, on so many
GPUs each: the seconds of the slowest process without loading, and whether each utterance was synthesised once, with the
same tokens as in the first run.

Prints one JSON object to stdout, and each measurement to stderr as soon as it is done.
"""

import argparse
import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tts_grpo.evaluation.provenance import ROOT
from tts_grpo.speech import synthesis
from tts_grpo.speech.continuous_batching import ContinuousBatching
from tts_grpo.speech.generation import Sampling
from tts_grpo.text.jsonl import read_jsonl, write_jsonl

DEFAULT_SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}
WARM_UP = 16  # utterances
SAME = ("num_speech_tokens", "finish_reason", "duration_s")  # of an utterance with any number of processes


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    synthesis.add_arguments(parser)
    parser.add_argument("--jsonl", type=Path, default=Path("assets/tiny/data/test.jsonl"), help="JSONL with texts")
    parser.add_argument(
        "--voices", type=Path, default=Path("assets/tiny/prompts/prompts.jsonl"), help="JSONL of voices; empty: none"
    )
    parser.add_argument("--num-utterances", type=int, default=512, help="number of utterances")
    parser.add_argument("--batch-size", type=int, default=128, help="as in infer_dist.py")
    parser.add_argument(
        "--runs", nargs="+", default=["continuous-fp16:512", "continuous-fp32:128", "batches-fp32:128"],
        metavar="ENGINE-PRECISION:UTTERANCES", help="what to measure, each with the first UTTERANCES",
    )  # fmt: skip
    parser.add_argument("--sampling-tokens", type=int, default=93, help="length of the responses of sampling; 0: skip")
    parser.add_argument("--processes", type=int, nargs="+", default=[], help="numbers of processes of infer_dist.py")
    return parser.parse_args(argv)


def make_utterances(args) -> list[dict]:
    """Entries of an evaluation set, with texts and voices in turn; paths of recordings are absolute."""
    texts = [row["text"] for row in read_jsonl(args.jsonl)]
    voices = [
        {"prompt_text": row["prompt_text"], "prompt_audio": str((args.voices.parent / row["prompt_audio"]).resolve())}
        for row in (read_jsonl(args.voices) if args.voices.name else [])
    ] or [{"prompt_text": "", "prompt_audio": None}]
    rows = [
        {"id": f"{i:05d}", "target_text": texts[i % len(texts)]} | voices[i % len(voices)]
        for i in range(args.num_utterances)
    ]
    return sorted(rows, key=lambda row: (-len(row["target_text"]), row["id"]))


def spread(rows: list[dict], count: int) -> list[dict]:
    """``count`` of the utterances, with texts of all lengths; all of them if there are fewer."""
    return rows[:: max(1, len(rows) // count)][:count]


def synchronise(args) -> None:
    if args.device != "cpu":
        torch.cuda.synchronize()


def synthesise(args, synthesiser: synthesis.Synthesiser, engine: str, rows: list[dict]):
    """The speech of all utterances, in batches."""
    if engine == "continuous":
        for _, _, speech in synthesiser.synthesise_all([(0, row) for row in rows], args.batch_size):
            yield speech
    else:
        for first in range(0, len(rows), args.batch_size):
            yield synthesiser.synthesise(rows[first : first + args.batch_size], 0)


def measure(args, run: str, rows: list[dict]) -> dict:
    """Utterances per second of one entry of --runs, and the seconds of its parts."""
    (engine, precision), count = run.partition(":")[0].split("-"), int(run.partition(":")[2] or len(rows))
    args = copy.copy(args)
    args.precision = precision
    start = time.perf_counter()
    synthesiser = synthesis.Synthesiser(args, args.device, Path())
    for _ in synthesise(args, synthesiser, engine, spread(rows, WARM_UP)):
        pass
    synchronise(args)
    load_s, start = time.perf_counter() - start, time.perf_counter()
    synthesiser.seconds = dict.fromkeys(synthesiser.seconds, 0.0)
    chosen = spread(rows, count)
    speech = [one for batch in synthesise(args, synthesiser, engine, chosen) for one in batch]
    wall_s = time.perf_counter() - start
    tokens = sum(one.num_speech_tokens for one in speech)
    result = {
        "utterances": len(speech), "utterances_per_s": len(speech) / wall_s, "wall_s": wall_s,
        "seconds": synthesiser.seconds, "mean_tokens": tokens / len(speech), "load_and_warm_up_s": load_s,
        "tokens_per_s": tokens / synthesiser.seconds["generation"],
        "truncated": sum(one.finish_reason == "length" for one in speech),
    }  # fmt: skip
    if args.device != "cpu":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return result


def encoded_prompts(args, rows: list[dict]) -> tuple[synthesis.Synthesiser, list[list[int]]]:
    synthesiser = synthesis.Synthesiser(args, args.device, Path())
    prompts = synthesiser.prompts(rows)
    return synthesiser, [synthesiser.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]


def measure_sampling(args, synthesiser, prompts: list[list[int]]) -> dict:
    """Tokens per second with ``DEFAULT_SAMPLING``; the end tokens are disabled, so that all lengths are equal."""
    sampling = Sampling(max_new_tokens=args.sampling_tokens, **DEFAULT_SAMPLING)
    engine = ContinuousBatching(synthesiser.model, sampling, args.batch_size, max(map(len, prompts)))
    engine.ends = engine.ends[:0]
    list(engine.generate(prompts[:WARM_UP], range(WARM_UP)))
    start = time.perf_counter()
    tokens = sum(len(response.token_ids) for _, response in engine.generate(prompts, range(len(prompts))))
    wall_s = time.perf_counter() - start
    return DEFAULT_SAMPLING | {
        "wall_s": wall_s, "tokens_per_s": tokens / wall_s, "utterances_per_s": len(prompts) / wall_s,
        "mean_tokens": tokens / len(prompts), "slots": args.batch_size,
    }  # fmt: skip


def measure_independence(args, synthesiser, prompts: list[list[int]]) -> dict:
    """Compare responses among all prompts with those among every second prompt in reverse order."""
    engine = ContinuousBatching(synthesiser.model, synthesiser.sampling, args.batch_size, max(map(len, prompts)))
    together = dict(engine.generate(prompts, range(len(prompts))))
    some = range(0, len(prompts), 2)[::-1]
    again = dict(engine.generate([prompts[i] for i in some], list(some)))
    same = sum(again[k].token_ids == together[i].token_ids for k, i in enumerate(some))
    same_log_probs = sum(again[k].log_probs == together[i].log_probs for k, i in enumerate(some))
    return {"responses": len(some), "same_tokens": same, "same_log_probs": same_log_probs}


def complete_run(args, processes: int, rows: list[dict], folder: Path) -> tuple[float, dict[str, dict]]:
    """Run infer_dist.py; returns the seconds of its slowest process, and the lines of the manifest by id.

    Raises:
        SystemExit: it failed, or an utterance is missing or there twice.
    """
    parser = argparse.ArgumentParser()
    synthesis.add_arguments(parser)
    flags = vars(parser.parse_args(["--llm-path", "", "--token2wav-dir", ""]))
    given = {name: getattr(args, name) for name in flags} | {"device": args.device.partition(":")[0]}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    test_set, output_dir = folder / "set.jsonl", folder / str(processes)
    write_jsonl(test_set, rows)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(ROOT / "infer_dist.py"), "--eval-set", str(test_set), "--output-dir", str(output_dir),
               "--batch-size", str(args.batch_size), *words]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    seconds = [float(found) for found in re.findall(r"utterances in ([\d.]+) s", done.stderr)]
    if done.returncode or len(seconds) != processes:
        raise SystemExit(f"bench_inference.py: infer_dist.py failed ({done.returncode}):\n{done.stderr[-3000:]}")
    lines = list(read_jsonl(output_dir / "seed_0/manifest.jsonl"))
    if sorted(line["id"] for line in lines) != sorted(row["id"] for row in rows):
        raise SystemExit(f"bench_inference.py: {processes} processes lost utterances or synthesised some twice")
    return max(seconds), {line["id"]: line for line in lines}


def measure_processes(args, rows: list[dict]) -> Iterator[dict]:
    """Complete runs with each number of processes, after a short one that warms up."""
    first = None
    with tempfile.TemporaryDirectory() as folder:
        complete_run(args, max(args.processes), spread(rows, WARM_UP), Path(folder, "warm-up"))
        for processes in args.processes:
            seconds, lines = complete_run(args, processes, rows, Path(folder))
            first = first or (seconds, lines)
            same = sum(all(first[1][key][name] == line[name] for name in SAME) for key, line in lines.items())
            yield {"processes": processes, "utterances": len(lines), "seconds": seconds, "same_as_first": same,
                   "utterances_per_s": round(len(lines) / seconds, 1),
                   "speed_up": round(first[0] / seconds, 2)}  # fmt: skip
            shutil.rmtree(Path(folder, str(processes)))


def main(argv=None):
    args = get_args(argv)
    logging.disable(logging.INFO)
    rows = make_utterances(args)
    result = {"num_utterances": len(rows), "batch_size": args.batch_size}
    if args.processes:
        result["infer_dist"] = []
        for run in measure_processes(args, rows):
            result["infer_dist"].append(run)
            print(json.dumps(run), file=sys.stderr, flush=True)
        print(json.dumps(result))
        return
    if args.device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(args.device)  # kernels and graphs run on the current device

    def measured(name: str, value) -> None:
        result[name] = value
        print(json.dumps({name: value}), file=sys.stderr, flush=True)  # now: a later measurement may fail

    for run in args.runs:
        measured(run.partition(":")[0], measure(args, run, rows))
    args.precision = "fp32"
    synthesiser, prompts = encoded_prompts(args, rows)
    if args.sampling_tokens:
        measured("sampling", measure_sampling(args, synthesiser, prompts))
        measured("independence", measure_independence(args, synthesiser, prompts))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
