"""Makes ASR model folders in the real file formats, with small random networks."""

import json
from pathlib import Path

import numpy as np
import torch

from tts_grpo.speech.cosyvoice2.random_weights import make_sensevoice_folder, save_cmvn, save_funasr_configs

TOKENS = [
    "<blank>",
    "<s>",
    "</s>",
    *map(chr, range(0x4E00, 0x4E00 + 8400)),
    "<unk>",
]  # 8,404 tokens, as in paraformer-zh


def paraformer_config(seaco: bool) -> dict:
    """config.yaml of Paraformer-large or SeACo-Paraformer, with small sizes.

    Source: funasr/models/seaco_paraformer/template.yaml of FunASR, and paraformer/template.yaml, which is a subset. The
    templates set ``dither``; it is omitted here, to test that transcripts are deterministic without it, too.
    """
    dropout = {"dropout_rate": 0.1, "positional_dropout_rate": 0.1}
    sizes = {"attention_heads": 2, "linear_units": 32, "num_blocks": 1}
    attention = dropout | {"self_attention_dropout_rate": 0.1, "src_attention_dropout_rate": 0.1}
    config = {
        "model": "Paraformer",
        "model_conf": {"ctc_weight": 0.0, "lsm_weight": 0.1, "length_normalized_loss": True, "predictor_weight": 1.0,
                       "predictor_bias": 1, "sampling_ratio": 0.75},
        "encoder": "SANMEncoder",
        "encoder_conf": sizes | dropout | {
            "output_size": 16, "attention_dropout_rate": 0.1, "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder", "normalize_before": True, "kernel_size": 11,
            "sanm_shfit": 0, "selfattention_layer_type": "sanm",
        },
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": sizes | attention | {"att_layer_num": 1, "kernel_size": 11, "sanm_shfit": 0},
        "predictor": "CifPredictorV2",
        "predictor_conf": {"idim": 16, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        "frontend": "WavFrontend",
        "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10,
                          "lfr_m": 7, "lfr_n": 6},
        "specaug": "SpecAugLFR",
        "specaug_conf": {
            "apply_time_warp": False, "time_warp_window": 5, "time_warp_mode": "bicubic", "apply_freq_mask": True,
            "freq_mask_width_range": [0, 30], "lfr_rate": 6, "num_freq_mask": 1, "apply_time_mask": True,
            "time_mask_width_range": [0, 12], "num_time_mask": 1,
        },
        "dataset": "AudioDataset",
        "dataset_conf": {"index_ds": "IndexDSJsonl", "batch_sampler": "DynamicBatchLocalShuffleSampler",
                         "batch_type": "example", "batch_size": 1, "max_token_length": 2048, "buffer_size": 500,
                         "shuffle": True, "num_workers": 0},
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
        "ctc_conf": {"dropout_rate": 0.0, "ctc_type": "builtin", "reduce": True, "ignore_nan_grad": True},
        "normalize": None,
    }  # fmt: skip
    if seaco:
        config |= {
            "model": "SeacoParaformer", "predictor": "CifPredictorV3", "seaco_decoder": "ParaformerSANMDecoder",
            "seaco_decoder_conf": sizes | attention | {
                "kernel_size": 21, "sanm_shfit": 0, "use_output_layer": False, "wo_input_layer": True,
            },
        }  # fmt: skip
        config["predictor_conf"] |= {
            "smooth_factor2": 0.25, "noise_threshold2": 0.01, "upsample_times": 3, "use_cif1_cnn": False,
            "upsample_type": "cnn_blstm",
        }  # fmt: skip
        config["model_conf"] |= {
            "inner_dim": 16, "bias_encoder_type": "lstm", "bias_encoder_bid": False, "seaco_lsm_weight": 0.1,
            "seaco_length_normal": True, "train_decoder": False, "NO_BIAS": 8377,
        }  # fmt: skip
    return config


def make_paraformer(folder: Path, tokens_per_frame: float = 0.5, seaco: bool = False, seed: int = 0) -> Path:
    """A Paraformer for funasr that outputs about ``tokens_per_frame`` tokens per frame of 60 ms.

    ``seaco``: make a SeACo-Paraformer, the kind of model that "paraformer-zh" is.
    """
    import funasr.models.bicif_paraformer.cif_predictor
    import funasr.models.paraformer.cif_predictor
    import funasr.models.paraformer.decoder
    import funasr.models.sanm.encoder
    import funasr.models.specaug.specaug  # noqa: F401  # importing them registers their classes
    from funasr.models.paraformer.model import Paraformer
    from funasr.models.seaco_paraformer.model import SeacoParaformer

    config = paraformer_config(seaco)
    torch.manual_seed(seed)
    names = ("encoder", "decoder", "predictor", "seaco_decoder")
    networks = {key: config[key] for key in config if key.removesuffix("_conf") in names}
    model = (SeacoParaformer if seaco else Paraformer)(
        **networks, **config["model_conf"], input_size=560, vocab_size=len(TOKENS)
    )
    state = model.state_dict()
    state["predictor.cif_output.weight"] *= 0.01
    state["predictor.cif_output.bias"][:] = float(np.log(tokens_per_frame / (1 - tokens_per_frame)))
    folder.mkdir(parents=True)
    torch.save(state, folder / "model.pt")
    save_funasr_configs(folder, config, {"token_list": "tokens.json", "seg_dict_file": "seg_dict"})
    save_cmvn(folder / "am.mvn", -8.0, 0.15)
    (folder / "tokens.json").write_text(json.dumps(TOKENS, ensure_ascii=False), encoding="utf-8")
    (folder / "seg_dict").write_text("".join(f"{token} {token}\n" for token in TOKENS[3:-1]), encoding="utf-8")
    return folder


def make_small_sensevoice(folder: Path) -> Path:
    """A SenseVoice with few weights, all random, whose vocabulary has letters and Chinese characters."""
    shape = {"output_size": 16, "attention_heads": 2, "linear_units": 32, "num_blocks": 1, "tp_blocks": 1}
    return make_sensevoice_folder(folder, shape | {"vocab_size": 2000})


def make_whisper(folder: Path, seed: int = 0) -> Path:
    """A Whisper for faster-whisper, made from a Hugging Face model with CTranslate2's converter."""
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special_tokens = ["endoftext", "startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev",
                      "nospeech", "notimestamps"]  # fmt: skip
    tokenizer.add_special_tokens([f"<|{name}|>" for name in special_tokens])
    tokenizer.add_special_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    end, start = (tokenizer.token_to_id(f"<|{name}|>") for name in special_tokens[:2])
    source = folder.with_name(folder.name + ".hf")
    config = WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    WhisperForConditionalGeneration(config).save_pretrained(source)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(source)
    WhisperFeatureExtractor().save_pretrained(source)
    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(source), copy_files=files).convert(str(folder))
    return folder


def make_sherpa(folder: Path, model_type: str = "paraformer", seed: int = 0) -> Path:
    """A model with the inputs, outputs and metadata of sherpa-onnx's Paraformer; one matrix gives a token per frame."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).normal(size=(560, len(TOKENS))).astype(np.float32)
    weights[:, :3] = 0  # blank, <s> and </s>
    nodes = [
        helper.make_node("MatMul", ["speech", "weights"], ["logits"]),
        helper.make_node("Identity", ["speech_lengths"], ["token_num"]),
    ]
    graph = helper.make_graph(
        nodes, "paraformer",
        [helper.make_tensor_value_info("speech", TensorProto.FLOAT, ["N", "T", 560]),
         helper.make_tensor_value_info("speech_lengths", TensorProto.INT32, ["N"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "T", len(TOKENS)]),
         helper.make_tensor_value_info("token_num", TensorProto.INT32, ["N"])],
        [numpy_helper.from_array(weights, "weights")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, {
        "model_type": model_type, "lfr_window_size": "7", "lfr_window_shift": "6", "vocab_size": str(len(TOKENS)),
        "neg_mean": ",".join(["0"] * 560), "inv_stddev": ",".join(["1"] * 560), "normalize_samples": "0",
    })  # fmt: skip
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))
    (folder / "tokens.txt").write_text("".join(f"{token} {i}\n" for i, token in enumerate(TOKENS)), encoding="utf-8")
    return folder
