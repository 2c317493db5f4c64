"""Model folders of CosyVoice2 and SenseVoiceSmall with random weights, for tests and benchmarks."""

import struct
from pathlib import Path

import numpy as np
import onnx
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper

from tts_grpo.speech.audio import ASR_HZ, save_audio
from tts_grpo.text.jsonl import write_json

# The released cosyvoice2.yaml (FunAudioLLM/CosyVoice2-0.5B, revision eec1ae6) with placeholders for the sizes.
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

llm: !new:cosyvoice.llm.llm.Qwen2LM
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

flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: {dim}
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 6561
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        output_size: {dim}
        attention_heads: 8
        linear_units: {linear_units}
        num_blocks: {num_blocks}
        dropout_rate: 0.1
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: {dim}
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: !ref <chunk_size>
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
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [{channels}]
            dropout: 0.0
            attention_head_dim: 64
            n_blocks: {n_blocks}
            num_mid_blocks: {num_mid_blocks}
            num_heads: {num_heads}
            act_fn: 'gelu'
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>

hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
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
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: {cond_channels}

# GAN training
mel_spec_transform1: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: null
    center: False
hifigan: !new:cosyvoice.hifigan.hifigan.HiFiGan
    generator: !ref <hift>
    discriminator: !new:cosyvoice.hifigan.discriminator.MultipleDiscriminator
        mpd: !new:matcha.hifigan.models.MultiPeriodDiscriminator
        mrd: !new:cosyvoice.hifigan.discriminator.MultiResSpecDiscriminator
    mel_spec_transform: [
        !ref <mel_spec_transform1>
    ]

# data
parquet_opener: !name:cosyvoice.dataset.processor.parquet_opener
get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <qwen_pretrain_path>
    skip_special_tokens: True
allowed_special: 'all'
tokenize: !name:cosyvoice.dataset.processor.tokenize
    get_tokenizer: !ref <get_tokenizer>
    allowed_special: !ref <allowed_special>
filter: !name:cosyvoice.dataset.processor.filter
    max_length: 40960
    min_length: 100
    token_max_length: 200
    token_min_length: 1
resample: !name:cosyvoice.dataset.processor.resample
    resample_rate: !ref <sample_rate>
truncate: !name:cosyvoice.dataset.processor.truncate
    truncate_length: 24480
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: 8000
    center: False
compute_fbank: !name:cosyvoice.dataset.processor.compute_fbank
    feat_extractor: !ref <feat_extractor>
compute_f0: !name:cosyvoice.dataset.processor.compute_f0
    sample_rate: !ref <sample_rate>
    hop_size: 480
parse_embedding: !name:cosyvoice.dataset.processor.parse_embedding
    normalize: True
shuffle: !name:cosyvoice.dataset.processor.shuffle
    shuffle_size: 1000
sort: !name:cosyvoice.dataset.processor.sort
    sort_size: 500
batch: !name:cosyvoice.dataset.processor.batch
    batch_type: 'dynamic'
    max_frames_in_batch: 2000
padding: !name:cosyvoice.dataset.processor.padding
    use_spk_embedding: False

data_pipeline: [
    !ref <parquet_opener>,
    !ref <tokenize>,
    !ref <filter>,
    !ref <resample>,
    !ref <compute_fbank>,
    !ref <parse_embedding>,
    !ref <shuffle>,
    !ref <sort>,
    !ref <batch>,
    !ref <padding>,
]
data_pipeline_gan: [
    !ref <parquet_opener>,
    !ref <tokenize>,
    !ref <filter>,
    !ref <resample>,
    !ref <truncate>,
    !ref <compute_fbank>,
    !ref <compute_f0>,
    !ref <parse_embedding>,
    !ref <shuffle>,
    !ref <sort>,
    !ref <batch>,
    !ref <padding>,
]

train_conf:
    optim: adam
    optim_conf:
        lr: 1e-5
    scheduler: constantlr
    scheduler_conf:
        warmup_steps: 2500
    max_epoch: 200
    grad_clip: 5
    accum_grad: 2
    log_interval: 100
    save_per_step: -1
train_conf_gan:
    optim: adam
    optim_conf:
        lr: 0.0002
    scheduler: constantlr
    optim_d: adam
    optim_conf_d:
        lr: 0.0002
    scheduler_d: constantlr
    max_epoch: 200
    grad_clip: 5
    accum_grad: 1
    log_interval: 100
    save_per_step: -1
"""
FULL = {  # sizes of the released model
    "llm_size": 896, "dim": 512, "linear_units": 2048, "num_blocks": 6, "channels": 256, "n_blocks": 4,
    "num_mid_blocks": 12, "num_heads": 8, "base_channels": 512, "cond_channels": 512,
}  # fmt: skip
SMALL = FULL | {
    "llm_size": 32, "linear_units": 64, "num_blocks": 1, "channels": 64, "n_blocks": 1, "num_mid_blocks": 1,
    "num_heads": 2, "base_channels": 32, "cond_channels": 16,
}  # fmt: skip


def save_campplus(path: Path) -> None:
    """Write an ONNX model (1, T, 80) -> (1, 192): the mean over time, multiplied by a random matrix."""
    weight = np.random.default_rng(0).standard_normal((80, 192)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["output"]),
    ]
    initial = [numpy_helper.from_array(np.array([1]), "axes"), numpy_helper.from_array(weight, "weight")]
    save_graph(
        path, nodes, initial, [("input", TensorProto.FLOAT, [1, "T", 80])], ("output", TensorProto.FLOAT, [1, 192])
    )


def save_full_campplus(path: Path) -> None:
    """Write CAM++ with random weights, exported as the released ``campplus.onnx``: (1, T, 80) -> (1, 192)."""
    from funasr.models.campplus.model import CAMPPlus

    torch.manual_seed(0)
    model = CAMPPlus().eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):  # as after training, in which they differ
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.onnx.export(
        model, (torch.randn(1, 345, 80),), path, input_names=["input"], output_names=["output"], opset_version=11,
        dynamic_axes={"input": {1: "T"}}, dynamo=False,
    )  # fmt: skip


def save_speech_tokenizer(path: Path) -> None:
    """Write an ONNX model (1, 128, T) and length -> T / 4 ids, computed from the mean of every fourth frame."""
    arrays = {"starts": [0], "ends": [1 << 30], "axes": [2], "steps": [4], "mels": [1]}
    nodes = [
        helper.make_node("Slice", ["feats", "starts", "ends", "axes", "steps"], ["fourth"]),
        helper.make_node("ReduceMean", ["fourth", "mels"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Abs", ["whole"], ["positive"]),
        helper.make_node("Mod", ["positive", "size"], ["indices"]),
    ]
    initial = [numpy_helper.from_array(np.array(value), name) for name, value in arrays.items()]
    initial += [numpy_helper.from_array(np.float32(1000), "scale"), numpy_helper.from_array(np.int32(6561), "size")]
    inputs = [("feats", TensorProto.FLOAT, [1, 128, "T"]), ("feats_length", TensorProto.INT32, [1])]
    save_graph(path, nodes, initial, inputs, ("indices", TensorProto.INT32, [1, "N"]))


def save_graph(path: Path, nodes, initial, inputs, output) -> None:
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*output)], initial,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def make_cosyvoice2_folder(folder: Path, shape: dict = SMALL) -> Path:
    """Write the files of CosyVoice2-0.5B that ``CosyVoice2Token2Wav`` loads, with random weights."""
    from tts_grpo.speech.cosyvoice2.token2wav import load_modules

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cosyvoice2.yaml").write_text(YAML.format(**shape))
    torch.manual_seed(0)
    modules = load_modules(folder)
    # The default initialisation of this layer is so small that errors would not show.
    torch.nn.init.normal_(modules["hift"].f0_predictor.classifier.bias, 200.0, 1.0)
    torch.save(modules["flow"].state_dict(), folder / "flow.pt")
    torch.save({f"generator.{k}": v for k, v in modules["hift"].state_dict().items()}, folder / "hift.pt")
    save = save_full_campplus if shape["llm_size"] == FULL["llm_size"] else save_campplus
    save(folder / "campplus.onnx")
    save_speech_tokenizer(folder / "speech_tokenizer_v2.onnx")
    return folder


SENSEVOICE_BPE = "chn_jpn_yue_eng_ko_spectok.bpe.model"
SENSEVOICE_FULL = {  # sizes in config.yaml of iic/SenseVoiceSmall
    "output_size": 512, "attention_heads": 4, "linear_units": 2048, "num_blocks": 50, "tp_blocks": 20,
    "vocab_size": 25055,
}  # fmt: skip
SENSEVOICE_SMALL = {
    "output_size": 64, "attention_heads": 2, "linear_units": 128, "num_blocks": 2, "tp_blocks": 1, "vocab_size": 300,
}  # fmt: skip


def sensevoice_config(shape: dict, lfr_m: int = 7, lfr_n: int = 6) -> dict:
    """config.yaml of iic/SenseVoiceSmall with other sizes. As in the original, ``frontend_conf`` has no ``dither``.

    Source: FunASR's docs/tutorial/Tables.md, which contains the complete file.
    """
    encoder = {name: value for name, value in shape.items() if name != "vocab_size"}
    return {
        "encoder": "SenseVoiceEncoderSmall",
        "encoder_conf": encoder | {
            "dropout_rate": 0.1, "positional_dropout_rate": 0.1, "attention_dropout_rate": 0.1, "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder", "normalize_before": True, "kernel_size": 11,
            "sanm_shfit": 0, "selfattention_layer_type": "sanm",
        },
        "model": "SenseVoiceSmall",
        "model_conf": {"length_normalized_loss": True, "sos": 1, "eos": 2, "ignore_id": -1},
        "tokenizer": "SentencepiecesTokenizer",
        "tokenizer_conf": {"bpemodel": None, "unk_symbol": "<unk>", "split_with_space": True},
        "frontend": "WavFrontend",
        "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10,
                          "lfr_m": lfr_m, "lfr_n": lfr_n, "cmvn_file": None},
        "dataset": "SenseVoiceCTCDataset",
        "dataset_conf": {
            "index_ds": "IndexDSJsonl", "batch_sampler": "EspnetStyleBatchSampler", "data_split_num": 32,
            "batch_type": "token", "batch_size": 14000, "max_token_length": 2000, "min_token_length": 60,
            "max_source_length": 2000, "min_source_length": 60, "max_target_length": 200, "min_target_length": 0,
            "shuffle": True, "num_workers": 4, "sos": "${model_conf.sos}", "eos": "${model_conf.eos}",
            "IndexDSJsonl": "IndexDSJsonl", "retry": 20,
        },
        "train_conf": {
            "accum_grad": 1, "grad_clip": 5, "max_epoch": 20, "keep_nbest_models": 10, "avg_nbest_model": 10,
            "log_interval": 100, "resume": True, "validate_interval": 10000, "save_checkpoint_interval": 10000,
        },
        "optim": "adamw", "optim_conf": {"lr": 0.00002},
        "scheduler": "warmuplr", "scheduler_conf": {"warmup_steps": 25000},
    }  # fmt: skip


def save_funasr_configs(folder: Path, config: dict, tokenizer_files: dict[str, str]) -> None:
    """Write config.yaml and configuration.json in the format of FunASR's models on ModelScope."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(folder / "configuration.json", {
        "framework": "pytorch", "task": "auto-speech-recognition", "model": {"type": "funasr"},
        "pipeline": {"type": "funasr-pipeline"}, "model_name_in_hub": {"ms": "", "hf": ""},
        "file_path_metas": {"init_param": "model.pt", "config": "config.yaml", "tokenizer_conf": tokenizer_files,
                            "frontend_conf": {"cmvn_file": "am.mvn"}},
    })  # fmt: skip


def save_cmvn(path: Path, shift: float, scale: float, size: int = 560) -> None:
    """Write am.mvn: mean and standard deviation of the features, in Kaldi's nnet text format."""
    rows = "".join(
        f"<{name}> {size} {size} \n<LearnRateCoef> 0 [ {' '.join([str(value)] * size)} ]\n"
        for name, value in (("AddShift", shift), ("Rescale", scale))
    )
    path.write_text(f"<Nnet> \n<Splice> {size} {size} \n[ 0 ]\n{rows}</Nnet> \n")


def save_sentencepiece(path: Path, vocab_size: int) -> None:
    """Write a SentencePiece model of single letters and Chinese characters, as a serialised ``ModelProto``.

    (The generated module of the package sentencepiece needs a newer protobuf than Triton's client supports.)
    """
    unknown, control, normal = b"\x18\x02", b"\x18\x03", b"\x18\x01"  # field 3: type
    codes = [*range(0x61, 0x7B), *range(0x4E00, 0x9FA5), *range(0x3400, 0x4DB5)][: vocab_size - 3]
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control), *((chr(code), normal) for code in codes)]
    with path.open("wb") as file:
        for piece, kind in pieces:
            text = piece.encode()
            body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1.0) + kind
            file.write(b"\x0a" + bytes([len(body)]) + body)
        file.write(b"\x12\x02\x18\x01")  # trainer_spec: model_type UNIGRAM
        file.write(b"\x1a\x0a\x0a\x08identity")  # normalizer_spec: name


def make_sensevoice_folder(folder: Path, shape: dict = SENSEVOICE_SMALL) -> Path:
    """Write the files of iic/SenseVoiceSmall that ``SenseVoice`` loads, with random weights."""
    from funasr.models.sense_voice.model import SenseVoiceSmall

    folder.mkdir(parents=True, exist_ok=True)
    config = sensevoice_config(shape)
    save_funasr_configs(folder, config, {"bpemodel": SENSEVOICE_BPE})
    save_cmvn(folder / "am.mvn", -8.0, 0.15)
    save_sentencepiece(folder / SENSEVOICE_BPE, shape["vocab_size"])
    torch.manual_seed(0)
    encoder = {name: config[name] for name in ("encoder", "encoder_conf")}
    network = SenseVoiceSmall(input_size=560, vocab_size=shape["vocab_size"], **encoder, **config["model_conf"])
    torch.save(network.state_dict(), folder / "model.pt")
    return folder


def save_prompt(path: Path) -> None:
    """Write three seconds of a noisy tone, as a substitute for a prompt recording."""
    time = np.arange(3 * ASR_HZ) / ASR_HZ
    tone = 0.3 * np.sin(2 * np.pi * 180 * time) + 0.05 * np.random.default_rng(1).standard_normal(len(time))
    save_audio(path, tone.astype(np.float32), ASR_HZ)
