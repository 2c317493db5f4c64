"""CosyVoice2 and SenseVoiceSmall folders in the official formats, with random weights: for tests and benchmarks."""

import json
import struct
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tts_grpo.audio import ASR_HZ, save_audio

YAML = """
__set_seed: !apply:random.seed [1986]
sample_rate: 24000
spk_embed_dim: 192
qwen_pretrain_path: ''
llm: !new:cosyvoice.llm.llm.Qwen2LM
    llm_input_size: 896
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: {dim}
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    vocab_size: 6561
    input_frame_rate: 25
    token_mel_ratio: 2
    pre_lookahead_len: 3
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        input_size: {dim}
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
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: 25
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
            static_chunk_size: 50
            num_decoding_left_chunks: -1
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
tokenize: !name:cosyvoice.dataset.processor.tokenize
    allowed_special: 'all'
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: 24000
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: 8000
    center: False
data_pipeline: [
    !ref <tokenize>,
]
"""
FULL = {  # shapes of iic/CosyVoice2-0.5B (examples/libritts/cosyvoice2/conf/cosyvoice2.yaml)
    "dim": 512, "linear_units": 2048, "num_blocks": 6, "channels": 256, "n_blocks": 4, "num_mid_blocks": 12,
    "num_heads": 8, "base_channels": 512, "cond_channels": 512,
}  # fmt: skip
SMALL = FULL | {
    "linear_units": 64, "num_blocks": 1, "channels": 64, "n_blocks": 1, "num_mid_blocks": 1, "num_heads": 2,
    "base_channels": 32, "cond_channels": 16,
}  # fmt: skip


def save_campplus(path: Path) -> None:
    """(1, T, 80) -> (1, 192): the mean, through a random matrix."""
    weight = np.random.default_rng(0).standard_normal((80, 192)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["output"]),
    ]
    initial = [numpy_helper.from_array(np.array([1]), "axes"), numpy_helper.from_array(weight, "weight")]
    save_graph(
        path, nodes, initial, [("input", TensorProto.FLOAT, [1, "T", 80])], ("output", TensorProto.FLOAT, [1, 192])
    )


def save_speech_tokenizer(path: Path) -> None:
    """(1, 128, T) and its length -> T / 4 ids, made of each fourth frame's mean."""
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
    """Write the files that ``CosyVoice2Token2Wav`` reads."""
    from tts_grpo.cosyvoice2 import load_modules

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cosyvoice2.yaml").write_text(YAML.format(**shape))
    torch.manual_seed(0)
    modules = load_modules(folder)
    # unit scale everywhere: the default start of some layers is so small that errors would not show
    torch.nn.init.normal_(modules["hift"].f0_predictor.classifier.bias, 200.0, 1.0)
    torch.save(modules["flow"].state_dict(), folder / "flow.pt")
    torch.save({f"generator.{k}": v for k, v in modules["hift"].state_dict().items()}, folder / "hift.pt")
    save_campplus(folder / "campplus.onnx")
    save_speech_tokenizer(folder / "speech_tokenizer_v2.onnx")
    return folder


SENSEVOICE_BPE = "chn_jpn_yue_eng_ko_spectok.bpe.model"
SENSEVOICE_FULL = {  # shape of iic/SenseVoiceSmall (its config.yaml)
    "output_size": 512, "attention_heads": 4, "linear_units": 2048, "num_blocks": 50, "tp_blocks": 20,
    "vocab_size": 25055,
}  # fmt: skip
SENSEVOICE_SMALL = {
    "output_size": 64, "attention_heads": 2, "linear_units": 128, "num_blocks": 2, "tp_blocks": 1, "vocab_size": 300,
}  # fmt: skip


def save_sentencepiece(path: Path, vocab_size: int) -> None:
    """A vocabulary of single Chinese characters, as sentencepiece_model.proto's ModelProto says in bytes.

    (The package's own generated module needs a newer protobuf than Triton's client takes.)
    """
    unknown, control, normal = b"\x18\x02", b"\x18\x03", b"\x18\x01"  # field 3, type
    codes = [*range(0x4E00, 0x9FA5), *range(0x3400, 0x4DB5)][: vocab_size - 3]
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control), *((chr(code), normal) for code in codes)]
    with path.open("wb") as file:
        for piece, kind in pieces:
            text = piece.encode()
            body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1.0) + kind
            file.write(b"\x0a" + bytes([len(body)]) + body)
        file.write(b"\x12\x02\x18\x01")  # trainer_spec: model_type UNIGRAM
        file.write(b"\x1a\x0a\x0a\x08identity")  # normalizer_spec: name


def make_sensevoice_folder(folder: Path, shape: dict = SENSEVOICE_SMALL) -> Path:
    """Write the files that ``SenseVoice`` reads."""
    from funasr.models.sense_voice.model import SenseVoiceSmall

    folder.mkdir(parents=True, exist_ok=True)
    encoder = {name: value for name, value in shape.items() if name != "vocab_size"} | {
        "dropout_rate": 0.1, "positional_dropout_rate": 0.1, "attention_dropout_rate": 0.1, "input_layer": "pe",
        "pos_enc_class": "SinusoidalPositionEncoder", "normalize_before": True, "kernel_size": 11, "sanm_shfit": 0,
        "selfattention_layer_type": "sanm",
    }  # fmt: skip
    model = {"length_normalized_loss": True, "sos": 1, "eos": 2, "ignore_id": -1}
    config = {
        "encoder": "SenseVoiceEncoderSmall", "encoder_conf": encoder, "model": "SenseVoiceSmall", "model_conf": model,
        "tokenizer": "SentencepiecesTokenizer",
        "tokenizer_conf": {"bpemodel": None, "unk_symbol": "<unk>", "split_with_space": True},
        "frontend": "WavFrontend",
        "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10,
                          "lfr_m": 7, "lfr_n": 6, "cmvn_file": None},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    files = {"init_param": "model.pt", "config": "config.yaml", "tokenizer_conf": {"bpemodel": SENSEVOICE_BPE},
             "frontend_conf": {"cmvn_file": "am.mvn"}}  # fmt: skip
    (folder / "configuration.json").write_text(json.dumps({
        "framework": "pytorch", "task": "auto-speech-recognition", "model": {"type": "funasr"},
        "file_path_metas": files,
    }))  # fmt: skip
    rows = "".join(
        f"<{name}> 560 560 \n<LearnRateCoef> 0 [ {' '.join([value] * 560)} ]\n"
        for name, value in (("AddShift", "-8.0"), ("Rescale", "0.15"))
    )
    (folder / "am.mvn").write_text(f"<Nnet> \n<Splice> 560 560 \n[ 0 ]\n{rows}</Nnet> \n")
    save_sentencepiece(folder / SENSEVOICE_BPE, shape["vocab_size"])
    torch.manual_seed(0)
    network = SenseVoiceSmall(
        encoder="SenseVoiceEncoderSmall", encoder_conf=encoder, input_size=560, vocab_size=shape["vocab_size"], **model
    )
    torch.save(network.state_dict(), folder / "model.pt")
    return folder


def save_prompt(path: Path) -> None:
    """Three seconds of a hum with noise, to stand for a recording of a voice."""
    time = np.arange(3 * ASR_HZ) / ASR_HZ
    hum = 0.3 * np.sin(2 * np.pi * 180 * time) + 0.05 * np.random.default_rng(1).standard_normal(len(time))
    save_audio(path, hum.astype(np.float32), ASR_HZ)
