"""Makes the repositories that the full profile downloads, in their published layouts, with small random weights.

Names, formats, data types and configs are the originals', but sizes and weights are not. The source of each fact is
given with it. tests/hub.py serves the folders as ModelScope and Hugging Face do.
"""

import io
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import yaml

from scripts import convert_llm
from tests.asr_folders import make_paraformer
from tools.random_llm import BLANK_EN, read_ranks, write_blank_en
from tts_grpo.speech.audio import load_audio
from tts_grpo.speech.cosyvoice2.random_weights import (
    SENSEVOICE_BPE,
    SMALL,
    make_cosyvoice2_folder,
    save_funasr_configs,
    sensevoice_config,
)
from tts_grpo.text.jsonl import write_jsonl

COSYVOICE3 = "FunAudioLLM/Fun-CosyVoice3-0.5B-2512"  # on both hubs
COSYVOICE2 = {"modelscope": "iic/CosyVoice2-0.5B", "huggingface": "FunAudioLLM/CosyVoice2-0.5B"}
SENSEVOICE = "iic/SenseVoiceSmall"
SEACO_PARAFORMER = "iic/speech_seaco_paraformer_large_asr_nat-zh-cn-16k-common-vocab8404-pytorch"
LLASA, CHECKPOINT = "yuekai/llasa_cosyvoice2_token_qwen_0.5b", "checkpoint-885000"
NOT_OPENED = b"not opened by this recipe"
VOXBOX, CV3_EVAL, SEED_TTS = "SparkAudio/voxbox", "yuekai/CV3-Eval", "yuekai/seed_tts_cosy2"


def make_all(root: Path, assets: Path, checkpoint: Path, cosyvoice3_dir: Path, trainer_python: str) -> None:
    """Make all repositories as ``root/OWNER/NAME``.

    Args:
        root: folder of the repositories.
        assets: folder of the tiny stack.
        checkpoint: one of the SFT model (tools/random_llm.py).
        cosyvoice3_dir: folder of CosyVoice3 (tools/random_llm.py).
        trainer_python: Python of the trainer environment.
    """
    make_cosyvoice2(root, "modelscope")
    make_cosyvoice3(root, cosyvoice3_dir)
    make_sensevoice(root / SENSEVOICE, assets / "asr_reward")
    make_paraformer(root / SEACO_PARAFORMER, seaco=True)
    make_llasa(root / LLASA, checkpoint)
    make_voxbox(root / VOXBOX, assets)
    make_evaluation_sets(root, assets, trainer_python)


def make_llasa(folder: Path, checkpoint: Path) -> None:
    """Make the SFT model's repository: checkpoints of Hugging Face's Trainer with DeepSpeed, logs and samples.

    icefall's README names checkpoint-800000 and mair-hub's recipe trains checkpoint-885000.
    """
    for name in ("checkpoint-800000", CHECKPOINT):
        shutil.copytree(checkpoint, folder / name)
        (folder / name / "global_step").mkdir()
        for path in ("global_step/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth", "scheduler.pt",
                     "training_args.bin", "trainer_state.json", "latest", "zero_to_fp32.py"):  # fmt: skip
            (folder / name / path).write_bytes(NOT_OPENED)
    (folder / "README.md").write_text("# Llasa with CosyVoice2's tokens\n")
    (folder / "samples").mkdir()
    (folder / "samples/1.wav").write_bytes(NOT_OPENED)


def make_cosyvoice2(root: Path, hub: str) -> Path:
    """Make CosyVoice2-0.5B with the files that ``hub`` has. Returns the folder.

    Source of the file lists: FunAudioLLM/CosyVoice2-0.5B at revision eec1ae6, and ModelScope's listing of 2025-06,
    which lacks config.json and has three more exports of the flow.
    """
    folder = make_cosyvoice2_folder(root / COSYVOICE2[hub])
    (folder / "README.md").write_text("# CosyVoice2\n")
    (folder / "asset").mkdir()
    (folder / "asset/dingding.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "configuration.json").write_text('{"framework":"Pytorch","task":"text-to-speech"}')
    shutil.copy(folder / "speech_tokenizer_v2.onnx", folder / "speech_tokenizer_v2.batch.onnx")
    not_opened = ["flow.decoder.estimator.fp32.onnx"]
    if hub == "huggingface":
        (folder / "config.json").write_text("{}")
    else:
        not_opened += ["flow.cache.pt", "flow.encoder.fp16.zip", "flow.encoder.fp32.zip"]
    for name in not_opened:
        (folder / name).write_bytes(NOT_OPENED)
    sizes = {"hidden_size": SMALL["llm_size"], "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    write_blank_en(folder / BLANK_EN, read_ranks(None), sizes, seed=0)
    make_official_llm(folder)
    return folder


def make_cosyvoice3(root: Path, model: Path) -> Path:
    """Make Fun-CosyVoice3-0.5B-2512 with the files of FunAudioLLM's repository at revision 29e01c4. Returns the folder.

    ModelScope's listing of 2026-09 is the same without config.json. ``model`` has the files that CosyVoice opens.
    """
    folder = shutil.copytree(model, root / COSYVOICE3)
    state = torch.load(model / "llm.pt")
    state["llm_decoder.weight"] += 0.01
    torch.save(state, folder / "llm.rl.pt")
    (folder / "README.md").write_text("# Fun-CosyVoice3\n")
    (folder / "asset").mkdir()
    (folder / "asset/dingding.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "configuration.json").write_text('{"framework":"Pytorch","task":"text-to-speech"}')
    (folder / "config.json").write_text("{}")
    for name in ("flow.decoder.estimator.fp32.onnx", "speech_tokenizer_v3.batch.onnx"):
        (folder / name).write_bytes(NOT_OPENED)
    return folder


def make_official_llm(folder: Path) -> None:
    """Make llm.pt: the state of CosyVoice's own module in float32, with BlankEN's head tied to its embedding."""
    from cosyvoice.llm.llm import Qwen2Encoder, Qwen2LM

    size = SMALL["llm_size"]
    torch.manual_seed(1)
    model = Qwen2LM(size, size, 6561, Qwen2Encoder(str(folder / "CosyVoice-BlankEN")), sampling=None).float()
    draw_biases(model)
    torch.save(model.state_dict(), folder / "llm.pt")


def draw_biases(model: torch.nn.Module) -> None:
    """Set random biases, as in trained models, so that no direction of the hidden states is nearly constant."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:
                parameter.normal_()


# Special tokens of yuekai/cosyvoice2_llm, which CosyVoice's examples/grpo/cosyvoice2/pretrained_to_huggingface.py
# (ace7c47) writes.
UPSTREAM_SPECIAL_TOKENS = {
    "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    "additional_special_tokens": [
        "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "[breath]", "<strong>", "</strong>", "[noise]", "[laughter]",
        "[cough]", "[clucking]", "[accent]", "[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]",
        "[vocalized-noise]", "[lipsmack]", "[mn]",
    ],
}  # fmt: skip
UPSTREAM_TEMPLATE = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '<|sos|>' + message['content'] + '<|task_id|>' }}"
    "{%- elif message['role'] == 'assistant' %}{{- message['content']}}{%- endif %}{%- endfor %}"
)


def make_cosyvoice2_llm(folder: Path, cosyvoice_dir: Path) -> Path:
    """Make yuekai/cosyvoice2_llm: a CosyVoice2 folder's official model as CosyVoice's own recipe converts it.

    It is in bfloat16. For text ids, the bias is -inf and the head's rows are zeros.
    """
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    text_dir = cosyvoice_dir / "CosyVoice-BlankEN"
    tokenizer, model = AutoTokenizer.from_pretrained(text_dir), Qwen2ForCausalLM.from_pretrained(text_dir)
    tokenizer.add_special_tokens(UPSTREAM_SPECIAL_TOKENS)
    first, state = len(tokenizer), torch.load(cosyvoice_dir / "llm.pt")
    ends = [f"<|eos{i}|>" for i in (1, 2, 3)]
    tokenizer.add_tokens([*(f"<|s_{i}|>" for i in range(6561)), *ends, "<|sos|>", "<|task_id|>"])  # not special
    model.model.load_state_dict({k[16:]: v for k, v in state.items() if k.startswith("llm.model.model.")})
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=128)
    embedding, outputs = model.model.embed_tokens.weight, slice(first, first + convert_llm.COSYVOICE2.num_outputs)
    head = torch.nn.Linear(embedding.shape[1], len(embedding))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-torch.inf)
        head.weight[outputs], head.bias[outputs] = state["llm_decoder.weight"], state["llm_decoder.bias"]
        embedding[outputs] = state["speech_embedding.weight"]
        embedding[outputs.stop : outputs.stop + 2] = state["llm_embedding.weight"]
    model.lm_head = head
    model.generation_config.update(
        eos_token_id=[outputs.stop - 3, outputs.stop - 2, outputs.stop - 1], temperature=1.0, top_p=0.8, top_k=25
    )
    model.config.update({"eos_token_id": outputs.stop - 3, "vocab_size": len(embedding), "tie_word_embeddings": False})
    model.config.use_bias = True
    tokenizer.chat_template = UPSTREAM_TEMPLATE
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_sensevoice(folder: Path, trained: Path) -> Path:
    """Make iic/SenseVoiceSmall with the sizes and weights of one of the tiny stack's ASR models."""
    folder.mkdir(parents=True)
    for name in ("model.pt", "am.mvn", SENSEVOICE_BPE):
        shutil.copy(trained / name, folder)
    config = yaml.safe_load((trained / "config.yaml").read_text())
    names = ("output_size", "attention_heads", "linear_units", "num_blocks", "tp_blocks")
    shape = {name: config["encoder_conf"][name] for name in names}
    lfr = {name: config["frontend_conf"][name] for name in ("lfr_m", "lfr_n")}
    save_funasr_configs(folder, sensevoice_config(shape, **lfr), {"bpemodel": SENSEVOICE_BPE})
    (folder / "README.md").write_text("# SenseVoice\n")
    (folder / "example").mkdir()
    (folder / "example/zh.mp3").write_bytes(encoded(np.zeros(16_000, np.float32), 16_000, "MP3"))
    return folder


def make_voxbox(folder: Path, assets: Path) -> None:
    """Make metadata/aishell-3.jsonl and emilia_zh.jsonl, with all keys per line (data set card, and ``wav_path``)."""
    texts = [json.loads(line)["text"] for line in (assets / "data/train.jsonl").read_text("utf-8").splitlines()]
    for corpus in ("aishell-3", "emilia_zh"):
        rows = [
            {
                "index": f"{corpus}_{i:010d}", "split": "train", "language": "zh", "age": "Youth-Adult",
                "gender": "female", "emotion": "UNKNOWN", "pitch": 211.4, "pitch_std": 0.163, "speed": 4.1,
                "duration": 3.24, "speech_duration": 2.9, "syllable_num": len(text), "text": text,
                "syllables": " ".join(text), "wav_path": f"{corpus}/{corpus}_{i:010d}.flac",
            }
            for i, text in enumerate(texts)
        ]  # fmt: skip
        write_jsonl(folder / f"metadata/{corpus}.jsonl", rows)


def encoded(speech: np.ndarray, rate: int, kind: str) -> bytes:
    """Encode audio as the bytes of a file: ``WAV``, ``FLAC`` or ``MP3`` (MPEG-1 from 32 kHz on, MPEG-2 below)."""
    buffer = io.BytesIO()
    sf.write(buffer, speech, rate, format=kind, subtype=None if kind == "MP3" else "PCM_16")
    return buffer.getvalue()


def make_evaluation_sets(root: Path, assets: Path, trainer_python: str) -> None:
    """Make splits of yuekai/CV3-Eval and yuekai/seed_tts_cosy2: data/SPLIT-00000-of-00001.parquet per split.

    Columns of CV3-Eval: id, prompt_text, prompt_audio {bytes, path}, target_text; seed_tts_cosy2 has the speech tokens
    of both texts as well (infer_dataset.py of github.com/nvidia-china-sae/mair-hub, rl-tutorial/cosyvoice_llm).
    """
    prompts = [load_audio(path, 24_000) for path in sorted((assets / "prompts").glob("*.ogg"))]
    audio = [encoded(speech, 24_000, kind) for speech, kind in zip(prompts, ("WAV", "MP3", "FLAC"), strict=True)]
    paths = ["0.wav", "1.mp3", "2.flac"]
    for repository, splits in (
        (CV3_EVAL, ("zero_shot_zh", "zero_shot_en", "zero_shot_hard_zh", "zero_shot_hard_en")),
        (SEED_TTS, ("test_zh", "test_en", "wenetspeech4tts")),
    ):  # fmt: skip
        for split in splits:
            prompt, target = ("over here", "how are you") if split.endswith("_en") else ("在这里", "你好吗")
            rows = [
                {"id": f"{split}-{i}", "prompt_text": prompt, "prompt_audio": {"path": paths[i]},
                 "target_text": target}
                | ({"prompt_audio_cosy2_tokens": [1, 2], "target_audio_cosy2_tokens": [3]}
                   if repository == SEED_TTS else {})
                for i in range(len(audio))
            ]  # fmt: skip
            write_parquet(root / repository / f"data/{split}-00000-of-00001.parquet", rows, audio, trainer_python)
        files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
        header = {"configs": [{"config_name": "default", "data_files": files}]}
        (root / repository / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n")


def write_parquet(path: Path, rows: list[dict], audio: list[bytes | None], trainer_python: str) -> None:
    """Write rows as parquet with ``audio`` in the column prompt_audio. Runs in the trainer environment, for pyarrow."""
    script = """
import pickle, sys, pyarrow as pa, pyarrow.parquet as pq
rows, audio = pickle.load(sys.stdin.buffer)
for row, data in zip(rows, audio, strict=True):
    row["prompt_audio"] = None if data is None else row["prompt_audio"] | {"bytes": data}
pq.write_table(pa.Table.from_pylist(rows), sys.argv[1])
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([trainer_python, "-c", script, str(path)], input=pickle.dumps((rows, audio)), check=True)
