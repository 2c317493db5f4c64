"""Compares Triton kernels, run by Triton's interpreter on a CPU, with the modules that they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tts_grpo.speech.cosyvoice2 import kernels
from tts_grpo.speech.cosyvoice2.packed_flow import GAP, PackedRow
from tts_grpo.speech.cosyvoice2.random_weights import make_cosyvoice2_folder
from tts_grpo.speech.cosyvoice2.token2wav import load_modules

pytestmark = pytest.mark.slow

LENS = (200, 77, 130)
TOLERANCE = 1e-3  # relative, for half precision


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Small modules of CosyVoice2, with random weights instead of ones and zeros, which would hide errors."""
    torch.manual_seed(0)
    modules = load_modules(make_cosyvoice2_folder(tmp_path_factory.mktemp("cosyvoice2")))
    for module in (modules["flow"].decoder.estimator.eval(), modules["hift"].eval()):
        for parameter in module.parameters():
            parameter.data = 0.1 * torch.randn_like(parameter) + (0.5 if parameter.dim() == 1 else 0)
    return modules


@pytest.fixture(scope="module")
def row():
    return PackedRow(LENS, 512)


def attention_per_utterance(q, k, v, row):
    """Reference attention (N, heads, size), computed for one utterance at a time."""
    out = torch.zeros_like(q)
    for start, n in zip(row.starts, LENS, strict=True):
        queries, keys = slice(start, start + n + GAP), slice(start, start + n)
        qkv = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
        out[queries] = F.scaled_dot_product_attention(*qkv).transpose(0, 1)
    return out


def assert_close(value, expected):
    assert expected.norm() > 0
    assert (value.float() - expected).norm() / expected.norm() < TOLERANCE


@torch.inference_mode()
def test_attention_is_limited_to_utterances_and_defined_everywhere(row):
    heads, size = 2, 64
    qkv = torch.randn(512, 3 * heads * size)
    expected = attention_per_utterance(*qkv.view(512, 3, heads, size).unbind(1), row).flatten(1)
    half = len(row.tiles) // 2
    assert torch.equal(row.tiles[half:, 0], row.tiles[:half, 0] + 512)  # the second copy of the row
    value = kernels.attention(qkv.half(), row.tiles[:half], heads)
    assert_close(value, expected)
    assert not value[sum(LENS) + GAP * len(LENS) :].any()


@torch.inference_mode()
def test_transformer_blocks(modules, row):
    blocks = copy.deepcopy(modules["flow"].decoder.estimator.mid_blocks[0][1])
    blocks.extend(copy.deepcopy(modules["flow"].decoder.estimator.up_blocks[0][1]))
    x = torch.randn(512, len(blocks[0].norm1.weight))
    half = kernels.TransformerBlocks(copy.deepcopy(blocks).half())
    expected = x
    for block in blocks:
        block.attn1.fuse_projections()
        qkv = block.attn1.to_qkv(block.norm1(expected)).unflatten(-1, (3, block.attn1.heads, -1))
        expected = expected + block.attn1.to_out[0](attention_per_utterance(*qkv.unbind(1), row).flatten(1))
        expected = expected + block.ff(block.norm3(expected))
    value = half(x.half(), row.used, row.tiles[: len(row.tiles) // 2])
    assert len(half.layers) == 2
    assert_close(value, expected * row.used[:, None])
    assert not value[row.used == 0].any()


@torch.inference_mode()
@pytest.mark.parametrize("part", ["down_blocks", "mid_blocks", "up_blocks"])
def test_resnet_block(modules, row, part):
    resnet = getattr(modules["flow"].decoder.estimator, part)[0][0]
    x = torch.randn(512, resnet.res_conv.in_channels) * row.used[:, None]
    time = torch.randn(3, resnet.mlp[1].in_features)
    expected = resnet(x.T[None], row.used[None, None], time[1:2])[0].T * row.used[:, None]
    value = kernels.CausalResnetBlock(copy.deepcopy(resnet).half(), time.half())(x.half(), row.used, 1)
    assert_close(value, expected)
    assert not value[row.used == 0].any()


@torch.inference_mode()
def test_convolution_without_norm(modules, row):
    conv = modules["flow"].decoder.estimator.up_blocks[0][2]
    x = torch.randn(512, conv.in_channels) * row.used[:, None]
    value = kernels.CausalConv(copy.deepcopy(conv).half())(x.half(), row.used)
    assert_close(value, conv(x.T[None])[0].T * row.used[:, None])


@torch.inference_mode()
@pytest.mark.parametrize("number", [0, 5])
def test_vocoder_block_reads_nothing_after_an_utterance(modules, number):
    block = modules["hift"].resblocks[number]
    lens, length = (150, 90, 33), 150
    x = torch.randn(3, block.convs1[0].in_channels, length)
    mask = (torch.arange(length) < torch.tensor(lens)[:, None]).float()[:, None]
    value = kernels.SnakeResBlock(block, {length: mask}, torch.float16)(x)
    for one, padded, n in zip(x, value, lens, strict=True):
        assert_close(padded[:, :n], block(one[None, :, :n])[0])


def test_unsupported_networks_are_refused(modules):
    blocks = copy.deepcopy(modules["flow"].decoder.estimator.mid_blocks[0][1])
    blocks[0].ff.net[0] = nn.Identity()
    with pytest.raises(ValueError, match="activation Identity"):
        kernels.TransformerBlocks(blocks)
    with pytest.raises(ValueError, match="80 channels"):
        kernels.CausalConv(nn.Conv1d(80, 64, 3))
