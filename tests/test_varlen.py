"""Tests of attention over packs against each sequence alone, with the tiny language model."""

import copy

import pytest
import torch

from tts_grpo.training.varlen import NAME, sequence_bounds, varlen_attention

LENS = (7, 1, 30, 12)


@pytest.fixture(scope="module")
def packs(lm):
    """The same model with both attentions, sequences, and these as one pack."""
    model = copy.deepcopy(lm)
    model.set_attn_implementation(NAME)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, lm.config.vocab_size, (1, n), generator=generator) for n in LENS]
    positions = torch.cat([torch.arange(n) for n in LENS])[None]
    return lm, model, sequences, torch.cat(sequences, dim=1), positions


def test_logits_and_gradients_of_a_pack_are_those_of_each_sequence_alone(packs):
    alone, packed, sequences, pack, positions = packs
    weights = torch.randn(1, sum(LENS), 1, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([alone(row, use_cache=False).logits for row in sequences], dim=1)
    logits = packed(pack, position_ids=positions, use_cache=False).logits
    assert (logits - expected).abs().max() < 1e-4 and expected.abs().max() > 1
    gradients = []
    for model, found in ((alone, expected), (packed, logits)):
        name = "model.layers.0.self_attn.k_proj.weight"
        gradients += torch.autograd.grad((found.log_softmax(-1) * weights).sum(), dict(model.named_parameters())[name])
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_a_sequence_does_not_see_its_neighbours(packs):
    _, packed, _, pack, positions = packs
    changed = pack.clone()
    changed[0, :7] = (changed[0, :7] + 1) % 1000
    logits = [packed(ids, position_ids=positions, use_cache=False).logits for ids in (pack, changed)]
    assert torch.equal(logits[0][:, 7:], logits[1][:, 7:]) and not torch.equal(logits[0][:, :7], logits[1][:, :7])


def test_bounds_are_those_of_the_present_pack(packs):
    """Two packs of the same shape, one after the other: nothing is kept from the first."""
    _, packed, _, pack, positions = packs
    other = torch.arange(sum(LENS))[None]
    logits = [packed(pack, position_ids=ids, use_cache=False).logits for ids in (positions, other, positions)]
    assert torch.equal(logits[0], logits[2]) and not torch.allclose(logits[0], logits[1], atol=0.1)
    assert sequence_bounds(positions) == [0, 7, 8, 38, 50] and sequence_bounds(other) == [0, 50]


def test_other_inputs_are_refused():
    query = torch.zeros(1, 2, 4, 8)
    good = {"attention_mask": None, "position_ids": torch.arange(4)[None]}
    varlen_attention(None, query, query, query, **good)
    packs = torch.arange(4)[None]
    for wrong in ({"attention_mask": torch.ones(1, 4)}, {"dropout": 0.1}, {"sliding_window": 2}, {"position_ids": None},
                  {"position_ids": packs.repeat(2, 1)}, {"position_ids": packs + 1}):  # fmt: skip
        with pytest.raises(ValueError, match=NAME):
            varlen_attention(None, query, query, query, **(good | wrong))
