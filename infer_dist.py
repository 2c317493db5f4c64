#!/usr/bin/env python3
"""Speak a test set, with one or several seeds, on one or several processes.

    torchrun --standalone --nproc-per-node 2 infer_dist.py --llm-path ... --eval-set set.jsonl --output-dir out

The set is a JSONL of ``id``, ``target_text`` and, for zero-shot prompting, ``prompt_text`` and ``prompt_audio`` (a
path, relative to the set's folder). Written are, for each seed, ``seed_N/wavs/ID.wav`` and ``seed_N/manifest.jsonl``:
a line an utterance of the set, in its order, with ``wav`` (null if there is none, with the reason in ``error``),
``num_speech_tokens``, ``finish_reason`` ("eos", or "length" where it was cut), ``duration_s`` and ``seed``.

The batches are the same for any number of processes, and what an utterance draws depends on the seed and its id only:
so does the result, to the byte on a CPU; on a GPU, waveforms differ by rounding from run to run. A run that was stopped
goes on where it was, batch by batch.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from tqdm import tqdm

from tts_grpo.speech import distributed
from tts_grpo.speech.audio import check_audio, save_audio
from tts_grpo.speech.generation import LM_PRECISIONS, Sampling, generate_speech_tokens, load_lm
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.jsonl import dump_line, numbered_rows, write_json, write_jsonl
from tts_grpo.text.prompts import render_prompt
from tts_grpo.text.rules import TextRules, model_text, usable_eval_set, warnings_of
from tts_grpo.text.tags import holding_control_tokens

logger = logging.getLogger(__name__)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm-path", type=Path, required=True, help="Hugging Face folder of the language model")
    parser.add_argument("--token2wav-dir", type=Path, required=True, help="folder of the token2wav weights")
    parser.add_argument("--eval-set", type=Path, required=True, help="JSONL of the test set")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for audio and manifests")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the set is spoken once with each")
    parser.add_argument("--batch-size", type=int, default=32, help="utterances generated and decoded at once")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: a GPU for each process")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of CosyVoice2's token2wav on a GPU"
    )
    parser.add_argument(
        "--lm-precision",
        choices=LM_PRECISIONS,
        default=None,
        help="of the language model; fp32 on a CPU and bf16 on a GPU, if not given",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling; 1.0 keeps all")
    parser.add_argument("--top-k", type=int, default=-1, help="-1 keeps all")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of ids said before; 1.0 is none")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="where an utterance is cut")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="of the texts")
    parser.add_argument("--text-tags", choices=("reject", "remove"), default="reject", help="tags in texts, such as "
                        "[laughter]: the set is refused, or they are taken out")  # fmt: skip
    parser.add_argument("--llm-text", choices=("raw", "spoken"), default="raw", help="what the language model reads: "
                        "texts as they are, or their numbers in words")  # fmt: skip
    return parser.parse_args(argv)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Utterances that are generated and decoded together."""

    name: str
    seed: int
    rows: list[dict]


def load_eval_set(path: Path, max_new_tokens: int, rules: TextRules) -> list[dict]:
    """The utterances of a set, checked whole: nothing is spoken of a set with a fault.

    Raises:
        SystemExit: the set cannot be used, or a recording cannot be read; the faults are named.
    """
    try:
        rows = usable_eval_set(path, rules)
        for audio in sorted({row["prompt_audio"] for row in rows if row["prompt_audio"]}):
            check_audio(path.parent / audio)
    except (ValueError, OSError) as error:
        raise SystemExit(f"infer_dist.py: {error}") from error
    for warning in warnings_of(rows, path, max_new_tokens, rules):
        logger.warning("%s", warning)
    return rows


def make_batches(rows: list[dict], seeds: list[int], batch_size: int) -> list[Batch]:
    """Batches of like text lengths, the longest first, of one seed each."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["target_text"]), i))
    parts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    return [
        Batch(f"seed_{seed}/batch_{number}", seed, [rows[i] for i in part])
        for number, part in enumerate(parts)
        for seed in seeds
    ]


def utterance_seed(seed: int, utt_id: str) -> int:
    """Seed of one utterance's sampling."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{utt_id}".encode()).digest()[:7], "big")


class Speaker:
    """Language model and token2wav of this process."""

    def __init__(self, args, device: str, rules: TextRules):
        self.args, self.rules = args, rules
        dtype = args.lm_precision and LM_PRECISIONS[args.lm_precision]
        self.model, self.tokenizer = load_lm(args.llm_path, device, dtype)
        self.token2wav = load_token2wav(args.token2wav_dir, device, args.precision)
        self.sampling = Sampling(
            args.temperature, args.top_p, args.top_k, args.max_new_tokens, repetition_penalty=args.repetition_penalty
        )
        self.voices = {}

    def texts(self, row: dict) -> tuple[str, str]:
        """An utterance's texts of prompt and target, as the language model reads them."""
        return model_text(row["prompt_text"], self.rules), model_text(row["target_text"], self.rules)

    def voice(self, row: dict):
        """The prompt voice of an utterance, or None; each is read once."""
        if not row["prompt_audio"]:
            return None
        key = (row["prompt_audio"], row["prompt_text"])
        if key not in self.voices:
            path = self.args.eval_set.parent / row["prompt_audio"]
            self.voices[key] = load_prompt_voice(self.token2wav, path, row["prompt_text"])
        return self.voices[key]

    def speak(self, batch: Batch, output_dir: Path) -> list[dict]:
        """Write a batch's audio; its manifest lines."""
        voices = [self.voice(row) for row in batch.rows]
        prompts = [
            render_prompt(self.tokenizer, target, prompt, v.prompt_speech_tokens if v else ())
            for (prompt, target), v in zip(map(self.texts, batch.rows), voices, strict=True)
        ]
        seeds = [utterance_seed(batch.seed, row["id"]) for row in batch.rows]
        said = generate_speech_tokens(self.model, self.tokenizer, prompts, seeds, self.sampling, len(prompts))
        tokens = [utterance.speech_tokens for utterance in said]
        waveforms = decode(self.token2wav, tokens, voices, batch.seed, self.args.batch_size)
        lines = []
        for row, utterance, waveform in zip(batch.rows, said, waveforms, strict=True):
            line = row | {
                "seed": batch.seed, "num_speech_tokens": len(utterance.speech_tokens),
                "finish_reason": utterance.finish_reason, "wav": None, "duration_s": 0.0, "error": "no speech tokens",
            }  # fmt: skip
            if len(waveform):
                line |= {"wav": f"wavs/{row['id']}.wav", "error": None}
                line["duration_s"] = round(len(waveform) / self.token2wav.sample_rate_hz, 3)
                path = output_dir / f"seed_{batch.seed}" / line["wav"]
                save_audio(path, waveform, self.token2wav.sample_rate_hz)
            lines.append(line)
        return lines


def refuse_control_tokens(speaker: Speaker, rows: list[dict]) -> None:
    """Speak no set whose texts have control tokens in them.

    Raises:
        SystemExit: one has; it is named.
    """
    found = holding_control_tokens(speaker.tokenizer, ["".join(speaker.texts(row)) for row in rows])
    for row, token in zip(rows, found, strict=True):
        if token:
            raise SystemExit(f"infer_dist.py: the text of {row['id']} holds the control token {token}: take it out")


def fingerprint(args) -> dict:
    """What the result depends on."""
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "device", "seeds")}
    weights = sorted(args.llm_path.resolve().glob("*.safetensors"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    eval_set = hashlib.sha256(args.eval_set.read_bytes()).hexdigest()
    return {name: str(value) for name, value in settings.items()} | {"weights": digests, "eval_set_sha256": eval_set}


def check_fingerprint(args) -> None:
    """Refuse to go on with another run's folder.

    Raises:
        SystemExit: the folder holds results of other settings.
    """
    path, current = args.output_dir / "settings.json", fingerprint(args)
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in current if saved.get(key) != current[key])
        if changed:
            raise SystemExit(
                f"infer_dist.py: {args.output_dir} holds results of other settings (differing: {', '.join(changed)}): "
                "remove it or choose another --output-dir"
            )
    else:
        write_json(path, current)


def finished(output_dir: Path) -> dict[str, list[dict]]:
    """Manifest lines of the batches that earlier runs finished; a line cut short by a crash is none."""
    done = {}
    for path in sorted(output_dir.glob("batches.rank*.jsonl")):
        for _, row in numbered_rows(path):
            if isinstance(row, dict):
                done[row["batch"]] = row["lines"]
    return done


def write_manifests(rows: list[dict], seeds: list[int], output_dir: Path) -> None:
    """One manifest a seed.

    Raises:
        RuntimeError: an utterance is missing.
    """
    lines = {(line["seed"], line["id"]): line for batch in finished(output_dir).values() for line in batch}
    for seed in seeds:
        missing = [row["id"] for row in rows if (seed, row["id"]) not in lines]
        if missing:
            raise RuntimeError(f"seed {seed}: {len(missing)} utterances were not spoken, the first: {missing[0]}")
        write_jsonl(output_dir / f"seed_{seed}" / "manifest.jsonl", (lines[seed, row["id"]] for row in rows))


def main(argv=None):
    args = get_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    rank, world_size, device = distributed.setup(args.device)
    rules = TextRules(args.language, args.text_tags, args.llm_text)
    rows = load_eval_set(args.eval_set, args.max_new_tokens, rules)
    if rank == 0:
        check_fingerprint(args)
    distributed.barrier()
    done = finished(args.output_dir)
    todo = [batch for batch in make_batches(rows, args.seeds, args.batch_size) if batch.name not in done]
    distributed.barrier()  # all have read what is done before anyone adds to it
    mine = todo[rank::world_size]
    if mine:
        speaker = Speaker(args, device, rules)
        refuse_control_tokens(speaker, rows)
        if speaker.token2wav.needs_voice and (without := [row["id"] for row in rows if not row["prompt_audio"]]):
            raise SystemExit(
                f"infer_dist.py: {args.eval_set}: {len(without)} utterances have no prompt, {without[0]} first, and "
                "this token2wav needs one: give them prompt_audio and prompt_text, or take them out"
            )
        progress = tqdm(mine, desc=f"{args.output_dir.name}, process {rank}", unit="batch", disable=rank > 0)
        with (args.output_dir / f"batches.rank{rank}.jsonl").open("a", encoding="utf-8") as record:
            record.write("\n")  # after a line that a crash cut short
            for batch in progress:
                lines = speaker.speak(batch, args.output_dir)
                record.write(dump_line({"batch": batch.name, "lines": lines}))
                record.flush()
    distributed.barrier()
    if rank == 0:
        write_manifests(rows, args.seeds, args.output_dir)
        print(f"{len(rows)} utterances x {len(args.seeds)} seeds: {args.output_dir}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
