"""Embeddings shared by pronunciation, so that a network learns characters that are rare in its training data.

The vector of a character (embedding or output row) is the sum of its own vector and the vectors of its initial, final,
tone and syllable. Training keeps these vectors apart; they are summed into one matrix before the weights are saved.
"""

import torch
from pypinyin import Style
from pypinyin import pinyin as pypinyin_readings
from pypinyin.contrib.tone_convert import to_finals, to_initials
from torch import nn


def reading(character: str) -> str | None:
    """The most common reading of a Chinese character with its tone ("ni3"), or None for any other character."""
    found = pypinyin_readings(character, style=Style.TONE3, neutral_tone_with_five=True, errors="ignore")
    return found[0][0] if found and found[0] and found[0][0][-1:].isdigit() else None


def pronunciation_features(syllable: str) -> list[str]:
    """Names of the features of a toned syllable: initial, final, tone, and their combinations."""
    initial, final = to_initials(syllable, strict=False), to_finals(syllable, strict=False)
    tone = syllable[-1]
    return [f"initial {initial}", f"final {final}", f"tone {tone}", f"final {final}{tone}", f"syllable {syllable}"]


class FeatureSumEmbedding(nn.Module):
    """A matrix in which each row is the sum of the row's own vector and of the vectors of its features.

    Args:
        row_features: names of the features of each row; may be empty.
        dim: length of the rows.
        own_std: (rows,), initial standard deviation of the rows' own vectors; small where the features should dominate.
    """

    def __init__(self, row_features: list[list[str]], dim: int, own_std: torch.Tensor):
        super().__init__()
        names = sorted({name for features in row_features for name in features})
        feature_ids = {name: i for i, name in enumerate(names)}
        pairs = [(row, feature_ids[name]) for row, features in enumerate(row_features) for name in features]
        membership = torch.zeros(len(row_features), len(names))
        membership[tuple(torch.tensor(pairs).T)] = 1.0
        self.register_buffer("membership", membership, persistent=False)
        self.own = nn.Parameter(torch.randn(len(row_features), dim) * own_std[:, None])
        self.features = nn.Parameter(torch.randn(len(names), dim) * 0.03)

    def forward(self) -> torch.Tensor:
        """(rows, dim)."""
        return self.own + self.membership @ self.features
