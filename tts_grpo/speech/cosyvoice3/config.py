"""Sizes of CosyVoice3's networks, from ``cosyvoice3.yaml``."""

import dataclasses
from pathlib import Path

import yaml


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Sizes of the flow: those of ``PreLookaheadLayer``, ``CausalConditionalCFM`` and ``DiT``."""

    lookahead_channels: int
    guidance: float  # inference_cfg_rate
    dim: int
    depth: int
    heads: int
    head_size: int
    ff_mult: int


@dataclasses.dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the vocoder: those of ``CausalHiFTGenerator`` and ``CausalConvRNNF0Predictor``."""

    base_channels: int
    harmonics: int
    sine_amplitude: float
    noise_deviation: float
    voiced_hz: float
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    n_fft: int
    hop: int
    kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    source_kernels: tuple[int, ...]
    source_dilations: tuple[tuple[int, ...], ...]
    slope: float
    limit: float
    look_right: int
    f0_channels: int


class _Loader(yaml.SafeLoader):
    """Reads objects such as ``!new:module.Class`` as dictionaries of their arguments, without importing anything."""


def _arguments(loader: _Loader, _suffix: str, node: yaml.Node):
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value


_Loader.add_multi_constructor("!", _arguments)


def as_tuple(value):
    """``value`` with lists, also nested ones, as tuples."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, list) else value


def load_config(path: Path) -> tuple[FlowConfig, VocoderConfig]:
    """Read ``cosyvoice3.yaml`` (layout: CosyVoice's examples/libritts/cosyvoice3/conf/cosyvoice3.yaml at ace7c47).

    Raises:
        ValueError: a value is missing or is not supported.
    """
    content = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    try:
        flow, hift = content["flow"], {name: as_tuple(value) for name, value in content["hift"].items()}
        dit, cfm = flow["decoder"]["estimator"], flow["decoder"]["cfm_params"]["content"]
        fixed = {
            "sample_rate": (content["sample_rate"], 24_000), "token_mel_ratio": (content["token_mel_ratio"], 2),
            "pre_lookahead_len": (flow["pre_lookahead_len"], 3), "t_scheduler": (cfm["t_scheduler"], "cosine"),
            "mel_dim": (dit["mel_dim"], 80), "spk_dim": (dit["spk_dim"], 80),
        }  # fmt: skip
        for name, (found, expected) in fixed.items():
            if found != expected:
                raise ValueError(f"{path}: {name} is {found}; only {expected} is supported")
        return FlowConfig(
            lookahead_channels=flow["pre_lookahead_layer"]["channels"], guidance=cfm["inference_cfg_rate"],
            dim=dit["dim"], depth=dit["depth"], heads=dit["heads"], head_size=dit["dim_head"], ff_mult=dit["ff_mult"],
        ), VocoderConfig(
            base_channels=hift["base_channels"], harmonics=hift["nb_harmonics"], sine_amplitude=hift["nsf_alpha"],
            noise_deviation=hift["nsf_sigma"], voiced_hz=hift["nsf_voiced_threshold"],
            upsample_rates=hift["upsample_rates"], upsample_kernels=hift["upsample_kernel_sizes"],
            n_fft=hift["istft_params"]["n_fft"], hop=hift["istft_params"]["hop_len"],
            kernels=hift["resblock_kernel_sizes"], dilations=hift["resblock_dilation_sizes"],
            source_kernels=hift["source_resblock_kernel_sizes"],
            source_dilations=hift["source_resblock_dilation_sizes"], slope=hift["lrelu_slope"],
            limit=hift["audio_limit"], look_right=hift["conv_pre_look_right"],
            f0_channels=hift["f0_predictor"]["cond_channels"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the layout of a CosyVoice3 model: {error!r}") from error
