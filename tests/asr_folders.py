"""Folders of recognisers in the formats of the real ones, with small random networks."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml

TOKENS = ["<blank>", "<s>", "</s>", *"你好我们去他是不在有大小上下来吗", "<unk>"]
SMALL = {"attention_heads": 2, "linear_units": 32, "num_blocks": 1, "dropout_rate": 0.0, "kernel_size": 3}


def make_paraformer(folder: Path, tokens_per_frame: float = 0.5, seaco: bool = False, seed: int = 0) -> Path:
    """A Paraformer for funasr, that hears about ``tokens_per_frame`` tokens in each frame of 60 ms.

    ``seaco``: a SeACo-Paraformer, which is what "paraformer-zh" is.
    """
    import funasr.models.bicif_paraformer.cif_predictor
    import funasr.models.paraformer.cif_predictor
    import funasr.models.paraformer.decoder
    import funasr.models.sanm.encoder  # noqa: F401  # these register themselves
    from funasr.models.paraformer.model import Paraformer
    from funasr.models.seaco_paraformer.model import SeacoParaformer

    encoder = {**SMALL, "output_size": 16, "input_layer": "pe", "pos_enc_class": "SinusoidalPositionEncoder",
               "normalize_before": True, "sanm_shfit": 0, "selfattention_layer_type": "sanm"}  # fmt: skip
    decoder = {**SMALL, "att_layer_num": 1, "sanm_shfit": 0}
    config = {
        "model": "Paraformer", "model_conf": {"ctc_weight": 0.0, "predictor_weight": 1.0, "sampling_ratio": 0.75},
        "encoder": "SANMEncoder", "encoder_conf": encoder, "decoder": "ParaformerSANMDecoder", "decoder_conf": decoder,
        "predictor": "CifPredictorV2",
        "predictor_conf": {"idim": 16, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.0},
        "frontend": "WavFrontend",
        "frontend_conf": {"fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10,
                          "lfr_m": 7, "lfr_n": 6, "cmvn_file": None, "dither": 0.0},
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True, "token_list": None},
    }  # fmt: skip
    if seaco:
        config |= {
            "model": "SeacoParaformer",
            "predictor": "CifPredictorV3",
            "seaco_decoder": "ParaformerSANMDecoder",
            "seaco_decoder_conf": decoder | {"wo_input_layer": True},
        }
        config["predictor_conf"] |= {"upsample_times": 3, "upsample_type": "cnn_blstm", "use_cif1_cnn": False}
        config["model_conf"] |= {"inner_dim": 16, "bias_encoder_type": "lstm", "NO_BIAS": 0}
    torch.manual_seed(seed)
    names = ("encoder", "decoder", "predictor", "seaco_decoder")
    parts = {key: config[key] for key in config if key.removesuffix("_conf") in names}
    model = (SeacoParaformer if seaco else Paraformer)(
        **parts, **config["model_conf"], input_size=560, vocab_size=len(TOKENS)
    )
    state = model.state_dict()
    state["predictor.cif_output.weight"] *= 0.01
    state["predictor.cif_output.bias"][:] = float(np.log(tokens_per_frame / (1 - tokens_per_frame)))
    folder.mkdir(parents=True)
    torch.save(state, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "tokens.json").write_text(json.dumps(TOKENS, ensure_ascii=False))
    ones, zeros = " ".join(["1.0"] * 560), " ".join(["0.0"] * 560)
    shift = f"<AddShift> 560 560\n<LearnRateCoef> 0 [ {zeros} ]\n<Rescale> 560 560\n<LearnRateCoef> 0 [ {ones} ]\n"
    (folder / "am.mvn").write_text(f"<Nnet>\n<Splice> 560 560\n[ 0 ]\n{shift}</Nnet>\n")
    (folder / "configuration.json").write_text(json.dumps({
        "framework": "pytorch", "task": "auto-speech-recognition", "model": {"type": "funasr"},
        "file_path_metas": {"init_param": "model.pt", "config": "config.yaml",
                            "tokenizer_conf": {"token_list": "tokens.json"},
                            "frontend_conf": {"cmvn_file": "am.mvn"}},
    }))  # fmt: skip
    return folder


def make_whisper(folder: Path, seed: int = 0) -> Path:
    """A Whisper for faster-whisper: a Hugging Face one through CTranslate2's converter."""
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
    named = ["endoftext", "startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev",
             "nospeech", "notimestamps"]  # fmt: skip
    tokenizer.add_special_tokens([f"<|{name}|>" for name in named])
    tokenizer.add_special_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    end, start = (tokenizer.token_to_id(f"<|{name}|>") for name in named[:2])
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
    """A model with inputs, outputs and metadata of a Paraformer of sherpa-onnx: a token a frame, by one matrix."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(seed).normal(size=(560, len(TOKENS))).astype(np.float32)
    weights[:, :3] = 0  # blank and ends of sentences
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
