"""Characters by their sound: what lets a network say, or write, characters that its training data hardly has.

A character's vector (embedding or output row) is the sum of a vector of its own and of those of its initial, final,
tone and syllable. Trained so, and added up into one matrix before it is saved.
"""

import torch
from pypinyin import Style
from pypinyin import pinyin as pypinyin_readings
from pypinyin.contrib.tone_convert import to_finals, to_initials
from torch import nn


def reading(character: str) -> str | None:
    """The commonest reading of a Chinese character with its tone ("ni3"), None for other characters."""
    found = pypinyin_readings(character, style=Style.TONE3, neutral_tone_with_five=True, errors="ignore")
    return found[0][0] if found and found[0] and found[0][0][-1:].isdigit() else None


def sound_features(syllable: str) -> list[str]:
    """Names of what a toned syllable is made of."""
    initial, final = to_initials(syllable, strict=False), to_finals(syllable, strict=False)
    tone = syllable[-1]
    return [f"initial {initial}", f"final {final}", f"tone {tone}", f"final {final}{tone}", f"syllable {syllable}"]


class SoundSum(nn.Module):
    """A matrix whose rows are sums: own vector + vectors of named features.

    Args:
        row_features: for each row, the names of its features (may be none).
        dim: length of the rows.
        own_std: spread of the rows' own vectors at the start; small where features should do the work.
    """

    def __init__(self, row_features: list[list[str]], dim: int, own_std: torch.Tensor):
        super().__init__()
        names = sorted({name for features in row_features for name in features})
        number = {name: i for i, name in enumerate(names)}
        pairs = [(row, number[name]) for row, features in enumerate(row_features) for name in features]
        membership = torch.zeros(len(row_features), len(names))
        membership[tuple(torch.tensor(pairs).T)] = 1.0
        self.register_buffer("membership", membership, persistent=False)
        self.own = nn.Parameter(torch.randn(len(row_features), dim) * own_std[:, None])
        self.features = nn.Parameter(torch.randn(len(names), dim) * 0.03)

    def forward(self) -> torch.Tensor:
        """(rows, dim)."""
        return self.own + self.membership @ self.features
