"""Choose the language model's checkpoint and the GRPO prompts, and write the tiny stack to its folder (assets/tiny).

The chosen checkpoint has the lowest pinyin error rate of sampled speech on the dev sentences, measured with the reward
recogniser: the evaluation recogniser is not used for any choice.

The GRPO prompts are the clauses with the largest standard deviation of the reward over this checkpoint's samples:
rollouts of the others would cost as much and carry less training signal.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from safetensors.torch import save_file

from tiny_stack.hard_texts import write_hard_set
from tiny_stack.pipeline import corpus_error_rate, sample_groups, synthesise_and_transcribe
from tiny_stack.settings import PRESETS, add_common_args
from tiny_stack.written import TEST, as_written
from tts_grpo.reward.curves import reward
from tts_grpo.speech.asr.sensevoice import SenseVoice
from tts_grpo.speech.audio import ASR_HZ, load_audio
from tts_grpo.speech.generation import load_lm
from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.text.jsonl import read_jsonl, write_jsonl
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

NUM_PROMPTS = 3
WITH_DIGITS = {
    "hsk1-0230": "请给我1个杯子。",
    "hsk2-0061": "这本书5块4角。",
    "hsk2-0322": "鸡生了1个蛋。",
    "hsk4-0057": "他的身高1米8，体重70公斤。",
    "hsk4-0633": "这是1个神秘的地方。",
    "hsk4-0695": "机器上有1个装置。",
    "hsk5-0755": "1分钟有60秒。",
}
PROMPT_S = (2.5, 4.0)
NUM_RECORDINGS = 90  # recordings of test sentences for check.sh
OPUS_COMPRESSION = 0.95  # on libsndfile's scale: about 21 kbit/s
SELECTION_SEEDS = (1000, 2000, 3000)
ROLLOUTS = 8  # samples per candidate for a GRPO prompt


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write, such as assets/tiny")
    return parser.parse_args(argv)


def save_half(state: dict[str, torch.Tensor], path: Path) -> None:
    """Save weights in half precision as safetensors."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file({k: v.cpu().contiguous() for k, v in half.items()}, path)


def export_codec(work_dir: Path, settings, folder: Path) -> None:
    """Write the speech tokenizer, the token decoder, and the number of times that each token occurs in the corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = torch.load(work_dir / "tokenizer.pt", map_location="cpu", weights_only=True)["tokenizer"]
    save_half(tokenizer, folder / "speech_tokenizer.safetensors")
    save_half(
        torch.load(work_dir / "token2wav.pt", map_location="cpu", weights_only=True),
        folder / "token_decoder.safetensors",
    )
    config = {"speech_tokenizer": settings.speech_tokenizer, "token_decoder": settings.token_decoder}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = np.load(work_dir / "tokens.npz")
    lens = tokens["lens"][0]
    valid = np.arange(tokens["tokens"].shape[2]) < lens[:, None]
    counts = np.bincount(tokens["tokens"][0][valid], minlength=NUM_SPEECH_TOKENS)
    (folder / "corpus_token_counts.json").write_text(json.dumps(counts.tolist(), separators=(",", ":")) + "\n")


def written(utt_id: str) -> dict[str, str]:
    """A sentence as people write it, with digits: known answers of the reward server's text front end."""
    return {"written": WITH_DIGITS[utt_id]} if utt_id in WITH_DIGITS else {}


def export_data(work_dir: Path, folder: Path) -> None:
    """Write the HSK sentences of each split; dev and test also with the teacher's speech tokens."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    tokens = np.load(work_dir / "tokens.npz")
    ids, lens = tokens["tokens"][0], tokens["lens"][0]
    rows = read_jsonl(work_dir / "corpus.jsonl")
    for split in ("train", "dev", "test"):
        lines = []
        for i, row in enumerate(rows):
            if row["split"] == split and row["source"] == "hsk":
                line = {"text": row["text"]}
                if split != "train":
                    line = {"id": row["id"], **line, **written(row["id"]), "speech_tokens": ids[i, : lens[i]].tolist()}
                lines.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = [row for row in read_jsonl(folder / "data" / "test.jsonl") if row["text"] in TEST]
    lines = [json.dumps(row | {"text": TEST[row["text"]]}, ensure_ascii=False, separators=(",", ":")) for row in rows]
    (folder / "data" / "test_digits.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def export_recordings(work_dir: Path, folder: Path) -> None:
    """Write the teacher's recordings of test sentences, and of dev sentences as voice prompts, as Ogg Opus."""
    rows = read_jsonl(work_dir / "corpus.jsonl")
    (folder / "recordings").mkdir(parents=True, exist_ok=True)
    test = [row for row in rows if row["split"] == "test"]  # ordered by difficulty, as in the source
    for row in test[:: max(1, len(test) // NUM_RECORDINGS)][:NUM_RECORDINGS]:
        write_opus(work_dir, row, folder / "recordings")
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    candidates = [r for r in rows if r["split"] == "dev" and PROMPT_S[0] <= r["samples"] / ASR_HZ <= PROMPT_S[1]]
    lines = []
    for row in candidates[:NUM_PROMPTS]:
        write_opus(work_dir, row, folder / "prompts")
        line = {"id": row["id"], "prompt_text": row["text"], "prompt_audio": f"{row['id']}.ogg"}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / "prompts" / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def write_opus(work_dir: Path, row: dict, folder: Path) -> None:
    """Compress one recording of the corpus into ``folder``."""
    speech = load_audio(work_dir / "audio" / f"{row['id']}.flac")
    path = folder / f"{row['id']}.ogg"
    sf.write(path, speech, ASR_HZ, format="OGG", subtype="OPUS", compression_level=OPUS_COMPRESSION)


def choose_lm(work_dir: Path, output_dir: Path, device: str) -> Path:
    """The checkpoint with the lowest error rate on sampled dev sentences."""
    token2wav = load_token2wav(output_dir / "token2wav", device)
    asr = SenseVoice(output_dir / "asr_reward", device)
    texts = [row["text"] for row in read_jsonl(output_dir / "data" / "dev.jsonl")]
    errors = {}
    for folder in sorted(work_dir.glob("lm_*")):
        lm = load_lm(folder, device, torch.float32)
        samples = [
            sample
            for seed in SELECTION_SEEDS
            for sample in synthesise_and_transcribe(lm, token2wav, asr, texts, 1.0, seed, batch=128)
        ]
        errors[folder] = corpus_error_rate(samples)
        print(f"{folder.name}: error rate on sampled dev sentences {errors[folder]:.4f}")
    return min(errors, key=errors.get)


def export_prompts(work_dir: Path, output_dir: Path, count: int, device: str) -> None:
    """Write the clauses with the largest standard deviation of the reward, in the order of the candidates."""
    models = (load_lm(output_dir / "llm", device, torch.float32), load_token2wav(output_dir / "token2wav", device),
              SenseVoice(output_dir / "asr_reward", device))  # fmt: skip
    texts = [row["text"] for row in read_jsonl(work_dir / "grpo.jsonl")]
    groups = sample_groups(*models, texts, ROLLOUTS, temperature=1.0, seed=0)
    deviations = [np.std([reward(sample.error_rate) for sample in group]) for group in groups]
    chosen = sorted(np.argsort(deviations, kind="stable")[::-1][:count])
    write_jsonl(output_dir / "data" / "grpo.jsonl", ({"text": as_written(texts[i])} for i in chosen))


def export_lm(chosen: Path, folder: Path) -> None:
    """Copy the checkpoint, and remove white space from its tokenizer file (which reduces it to a third)."""
    shutil.copytree(chosen, folder, dirs_exist_ok=True)
    path = folder / "tokenizer.json"
    compact = json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact + "\n", encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS of all files that this script wrote, in the format of ``sha256sum --check``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "PROVENANCE.md"))
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def main(argv=None):
    args = get_args(argv)
    export_codec(args.work_dir, PRESETS[args.preset], args.output_dir / "token2wav")
    for name in ("asr_reward", "asr_eval"):
        shutil.copytree(args.work_dir / name, args.output_dir / name, dirs_exist_ok=True)
    export_data(args.work_dir, args.output_dir)
    write_hard_set(args.output_dir / "data" / "hard.jsonl")
    export_recordings(args.work_dir, args.output_dir)
    chosen = choose_lm(args.work_dir, args.output_dir, args.device)
    export_lm(chosen, args.output_dir / "llm")
    export_prompts(args.work_dir, args.output_dir, PRESETS[args.preset].grpo_prompts, args.device)
    write_checksums(args.output_dir)
    print(f"chose {chosen.name}; the tiny stack is in {args.output_dir}")


if __name__ == "__main__":
    main()
