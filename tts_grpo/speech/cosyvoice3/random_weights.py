"""Model folders of CosyVoice3's token2wav with random weights, for tests and benchmarks."""

from pathlib import Path

import torch

from tts_grpo.speech.cosyvoice2.random_weights import save_campplus, save_full_campplus, save_speech_tokenizer
from tts_grpo.speech.cosyvoice3.config import load_config
from tts_grpo.speech.cosyvoice3.modules import FlowNetwork, VocoderNetwork

# The layout of CosyVoice's examples/libritts/cosyvoice3/conf/cosyvoice3.yaml (ace7c47) without the parts for training,
# with placeholders for the sizes.
YAML = """
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:numpy.random.seed [1986]
__set_seed3: !apply:torch.manual_seed [1986]
__set_seed4: !apply:torch.cuda.manual_seed_all [1986]

# sizes
sample_rate: 24000
llm_input_size: {llm_size}
llm_output_size: {llm_size}
spk_embed_dim: 192
qwen_pretrain_path: ''
token_frame_rate: 25
token_mel_ratio: 2

# streaming
chunk_size: 25 # in tokens
num_decoding_left_chunks: -1 # <0: all

llm: !new:cosyvoice.llm.llm.CosyVoice3LM
    llm_input_size: !ref <llm_input_size>
    llm_output_size: !ref <llm_output_size>
    speech_token_size: 6561
    length_normalized_loss: True
    lsm_weight: 0
    mix_ratio: [5, 15]
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: 0.8
        top_k: 25
        win_size: 10
        tau_r: 0.1

flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithDiT
    input_size: 80
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 6561
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    pre_lookahead_layer: !new:cosyvoice.transformer.upsample_encoder.PreLookaheadLayer
        in_channels: 80
        channels: {lookahead_channels}
        pre_lookahead_len: 3
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.DiT.dit.DiT
            dim: {dim}
            depth: {depth}
            heads: {heads}
            dim_head: 64
            ff_mult: 2
            mel_dim: 80
            mu_dim: 80
            spk_dim: 80
            out_channels: 80
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>

hift: !new:cosyvoice.hifigan.generator.CausalHiFTGenerator
    in_channels: 80
    base_channels: {base_channels}
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 5, 3]
    upsample_kernel_sizes: [16, 11, 7]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: [7, 7, 11]
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    conv_pre_look_right: 4
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.CausalConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: {cond_channels}

# data
get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <qwen_pretrain_path>
    skip_special_tokens: True
    version: cosyvoice3
allowed_special: 'all'
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: null
    center: False
"""
FULL = {  # sizes of the released model
    "llm_size": 896, "lookahead_channels": 1024, "dim": 1024, "depth": 22, "heads": 16, "base_channels": 512,
    "cond_channels": 512,
}  # fmt: skip
SMALL = {
    "llm_size": 32, "lookahead_channels": 32, "dim": 256, "depth": 2, "heads": 2, "base_channels": 32,
    "cond_channels": 16,
}  # fmt: skip


def write_token2wav(folder: str | Path, seed: int = 0, small: bool = True) -> Path:
    """Write the files of Fun-CosyVoice3-0.5B-2512 that ``CosyVoice3Token2Wav`` loads, with random weights.

    Args:
        folder: is created if necessary.
        seed: random seed of the weights.
        small: whether networks are small; otherwise, they have the sizes of the released ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cosyvoice3.yaml").write_text(YAML.format(**(SMALL if small else FULL)), encoding="utf-8")
    flow_config, vocoder_config = load_config(folder / "cosyvoice3.yaml")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        flow, hift = FlowNetwork(flow_config), VocoderNetwork(vocoder_config)
        torch.nn.init.normal_(hift.f0_predictor.classifier.bias, 200.0, 1.0)  # Hz; the default is no voice
    torch.save(flow.state_dict(), folder / "flow.pt")
    torch.save({f"generator.{name}": value for name, value in hift.state_dict().items()}, folder / "hift.pt")
    (save_campplus if small else save_full_campplus)(folder / "campplus.onnx")
    save_speech_tokenizer(folder / "speech_tokenizer_v3.onnx")
    return folder
