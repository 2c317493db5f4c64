"""Three cheap trials of tests/faults.py; ``bash tests/run.sh faults`` runs all of them."""

import pytest

from tests import faults
from tts_grpo.text.jsonl import read_jsonl

pytestmark = pytest.mark.slow


def test_data_preparation_survives_kills_and_a_read_only_folder(tmp_path, monkeypatch, trainer_python):
    monkeypatch.setenv("TRAINER_PYTHON", trainer_python)
    names = [f"{faults.ALL}, data 0", f"{faults.ONE}, data 0", "read-only folder, data 0"]
    assert faults.main(["--work-dir", str(tmp_path), "--only", *names]) == 0
    rows = read_jsonl(tmp_path / "trials.jsonl")
    assert len(rows) == (3 if faults.can_mount(tmp_path) else 2) and not any(row["loss"] for row in rows)
