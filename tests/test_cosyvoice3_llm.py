"""Tests of CosyVoice3's language model: its conversion, and the ids that can be sampled.

The reference is the official module's computation, written again from its description in cosyvoice/llm/llm.py
(CosyVoice3LM at ace7c47). Tests of the module itself run where it can be imported, which PyPI's packages do not allow:

    PYTHONPATH=$cosyvoice_dir:$cosyvoice_dir/third_party/Matcha-TTS python -m pytest tests/test_cosyvoice3_llm.py
"""

import dataclasses
import importlib
import json
import shutil
import sys
import types

import cosyvoice.llm.llm
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from scripts.check import language_model_findings
from scripts.convert_llm import COSYVOICE3, check_ids, main
from tts_grpo.speech.generation import OFFICIAL, Sampling, generate, load_lm
from tts_grpo.speech.head_bias import load_head_bias, restrict_to_sampleable_ids, sampleable_ids
from tts_grpo.text.prompts import render_prompt
from tts_grpo.training.verl_cpu.log_probs import fused_linear

pytestmark = pytest.mark.slow

FIRST, SOS, EOS, TASK_ID = 151_924, 158_485, 158_486, 158_487  # ids of yuekai/Fun-CosyVoice3-0.5B-2512-LLM-HF
END_OF_PROMPT = 151_646  # the official module requires this id in a text
TEXT, PROMPT_TEXT, PROMPT_SPEECH, SPEECH = "今天 ok[breath]", "早。", [3, 6560], [7, 0, 4000, 6560, 12]
needs_source = pytest.mark.skipif(
    not hasattr(cosyvoice.llm.llm, "CosyVoice3LM"), reason="needs CosyVoice's source in PYTHONPATH"
)


@pytest.fixture(scope="module")
def official(cosyvoice3_dir, tmp_path_factory):
    """The model with weights in which no direction of the hidden states is constant."""
    folder = tmp_path_factory.mktemp("official")
    state = torch.load(cosyvoice3_dir / "llm.pt")
    torch.manual_seed(1)
    for name, tensor in state.items():
        if name != "llm.model.lm_head.weight":  # tied to the embedding
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.1)
    torch.save(state, folder / "llm.pt")
    (folder / "CosyVoice-BlankEN").symlink_to(cosyvoice3_dir / "CosyVoice-BlankEN")
    return folder


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llm"
    main(["to-hf", "--cosyvoice-dir", str(official), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def loaded(converted):
    return load_lm(converted)


def qwen_of(official, state) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(AutoConfig.from_pretrained(official / "CosyVoice-BlankEN")).float()
    model.load_state_dict({name[10:]: tensor for name, tensor in state.items() if name.startswith("llm.model.")})
    return model.eval()


def official_logits(official, state, text_ids, speech) -> torch.Tensor:
    """Logits after the task id and after each speech token: (1 + len(speech), 6761)."""
    special = state["speech_embedding.weight"]
    model = qwen_of(official, state)
    with torch.no_grad():
        text = model.model.embed_tokens(torch.tensor(text_ids))
        inputs = torch.cat([special[6561:6562], text, special[6563:6564], special[speech]])
        hidden = model.model(inputs_embeds=inputs[None]).last_hidden_state[0, -1 - len(speech) :]
        return hidden @ state["llm_decoder.weight"].T


def prompt_ids(tokenizer, prompt_text="", prompt_speech=(), instruct=""):
    prompt = render_prompt(tokenizer, TEXT, prompt_text, prompt_speech, instruct)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "prompt", [{}, {"prompt_text": PROMPT_TEXT, "prompt_speech": PROMPT_SPEECH}, {"instruct": "请用广东话表达。"}]
)
def test_logits_are_the_official_ones(official, loaded, prompt):
    model, tokenizer = loaded
    ids, prompt_speech = prompt_ids(tokenizer, **prompt), prompt.get("prompt_speech", [])
    text_ids = ids[1 : len(ids) - 1 - len(prompt_speech)]
    assert (ids[0], ids[len(text_ids) + 1]) == (SOS, TASK_ID) and END_OF_PROMPT in text_ids
    speech = [*prompt_speech, *SPEECH]
    expected = official_logits(official, torch.load(official / "llm.pt"), text_ids, speech)
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *(FIRST + token for token in SPEECH)]])).logits[0, -1 - len(speech) :]
    codebook, end = slice(FIRST, FIRST + 6561), EOS
    torch.testing.assert_close(logits[:, codebook], expected[:, :6561], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, end], expected[:, 6562], atol=1e-4, rtol=0)
    probs = logits.softmax(-1)
    assert (probs[:, codebook].sum(-1) + probs[:, end]).sub(1).abs().max() < 1e-5
    probs[:, codebook], probs[:, end] = 0, 0
    assert probs.max() == 0  # exactly: text ids and rows beyond the codebook cannot be sampled


@needs_source
def test_logits_are_those_of_the_official_module(official):
    state, model = torch.load(official / "llm.pt"), official_module(official)
    text_ids = [END_OF_PROMPT, 5, 1000]
    with torch.no_grad():
        embedding = model.speech_embedding.weight
        text = model.llm.model.model.embed_tokens(torch.tensor(text_ids))
        inputs = torch.cat([embedding[model.sos, None], text, embedding[model.task_id, None], embedding[SPEECH]])
        hidden, _ = model.llm(inputs[None], torch.tensor([len(inputs)]))
        expected = model.llm_decoder(hidden)[0, -1 - len(SPEECH) :]
    torch.testing.assert_close(official_logits(official, state, text_ids, SPEECH), expected, atol=1e-4, rtol=0)


@needs_source
def test_responses_are_those_of_the_official_module(official, loaded):
    """Greedy decoding among the ids that can be sampled.

    From its second step on, the official module passes an attention mask for one position to transformers. Version 5
    takes all other positions but the first for padding, so that the responses are not those of the weights.
    """
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer)
    text, empty = torch.tensor([ids[1:-1]]), torch.zeros(1, 0, dtype=torch.long)
    sampleable = torch.tensor([*range(6561), 6562])
    module = official_module(official, lambda scores, *_: sampleable[scores[sampleable].argmax()].item())
    step, cached = module.llm.forward_one_step, lambda cache: cache.get_seq_length() if cache else 0
    module.llm.forward_one_step = lambda xs, masks, cache=None: step(
        xs, torch.ones(1, 1, cached(cache) + xs.shape[1], dtype=torch.bool), cache
    )
    lens = [torch.tensor([n]) for n in (text.shape[1], 0, 0)]
    limits = {"min_token_text_ratio": 0, "max_token_text_ratio": 3}
    expected = list(module.inference(text, lens[0], empty, lens[1], empty, lens[2], None, **limits))
    (response,) = generate(model, [ids], [0], Sampling(temperature=0, max_new_tokens=3 * text.shape[1]))
    assert len(expected) > 20
    assert [id_ - FIRST for id_ in response.token_ids if id_ != EOS] == expected


def official_module(official, sampling=None, state=None):
    encoder = cosyvoice.llm.llm.Qwen2Encoder(str(official / "CosyVoice-BlankEN"))
    size = encoder.model.config.hidden_size
    model = cosyvoice.llm.llm.CosyVoice3LM(size, size, 6561, encoder.float(), sampling).eval()
    model.load_state_dict(state or torch.load(official / "llm.pt"))
    return model


@needs_source
def test_text_ids_are_those_of_the_official_tokenizer(official, loaded, monkeypatch):
    for name in ("whisper", "whisper.tokenizer"):  # the module imports Whisper's tokenizer for CosyVoice's first model
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Tokenizer=object))
    reference = importlib.import_module("cosyvoice.tokenizer.tokenizer").CosyVoice3Tokenizer(
        str(official / "CosyVoice-BlankEN")
    )
    tokens = reference.special_tokens["additional_special_tokens"]
    assert list(COSYVOICE3.text_tokens) == tokens
    for text in ("".join(tokens), f"You are a helpful assistant.<|endofprompt|>高管[j][ǐ]予好评 {TEXT}"):
        assert loaded[1](text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_vocabulary(loaded, converted):
    model, tokenizer = loaded
    assert check_ids(tokenizer, converted, COSYVOICE3) == FIRST
    ids = tokenizer.convert_tokens_to_ids(["<|endofprompt|>", "<|sos|>", "<|eos1|>", "<|task_id|>", "<|fill|>", "[ǜ]"])
    assert ids == [END_OF_PROMPT, SOS, EOS, TASK_ID, EOS + 2, FIRST - 1]
    assert len(tokenizer) == 158_685 and model.config.vocab_size == 158_720
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == [EOS]
    assert tokenizer.decode([FIRST, EOS, FIRST + 6565], skip_special_tokens=True) == "<|s_0|>"
    bias = load_head_bias(converted, tokenizer)
    assert sampleable_ids(bias).tolist() == [*range(FIRST, FIRST + 6561), EOS] and not bias[FIRST : FIRST + 6561].any()
    found = list(language_model_findings(converted))
    assert len(found) > 5 and all(good for good, _ in found), found


@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [(torch.float32, Sampling(temperature=1.5)), (torch.bfloat16, dataclasses.replace(OFFICIAL, top_k=3))],
)
def test_only_speech_and_the_end_are_sampled(converted, dtype, sampling):
    model, tokenizer = load_lm(converted, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight *= 0.01  # nearly uniform over the ids that can be sampled
    sampling = dataclasses.replace(sampling, max_new_tokens=15, max_token_text_ratio=0)
    responses = generate(model, [prompt_ids(tokenizer)] * 8, range(8), sampling, text_lens=[9] * 8)
    generated = [token for response in responses for token in response.token_ids]
    assert len(generated) > 80 and all(FIRST <= token < FIRST + 6561 or token == EOS for token in generated)


def test_training_and_rollouts_have_the_same_probabilities(loaded, converted):
    model, tokenizer = loaded
    ids = prompt_ids(tokenizer)
    (response,) = generate(model, [ids], [3], Sampling(max_new_tokens=60))
    labels = torch.tensor([[*ids, *response.token_ids]])
    with torch.no_grad():
        hidden = model.model(labels).last_hidden_state[:, :-1]
        log_probs_of = restrict_to_sampleable_ids(fused_linear, load_head_bias(converted))
        log_probs, _ = log_probs_of(None, hidden, model.lm_head.weight, labels[:, 1:])
    torch.testing.assert_close(log_probs[0, len(ids) - 1 :].tolist(), response.log_probs, atol=1e-5, rtol=0)


def test_round_trip_is_bit_equal(official, converted, tmp_path, capsys):
    """A checkpoint of CosyVoice's trainer has two more entries."""
    like = tmp_path / "epoch_3_whole.pt"
    torch.save(torch.load(official / "llm.pt") | {"epoch": 3, "step": 12_000}, like)
    main(["to-official", "--hf", str(converted), "--like", str(like), "--output", str(tmp_path / "back.pt")])
    assert '"changed_tensors": 0' in capsys.readouterr().out
    before, after = torch.load(official / "llm.pt"), torch.load(tmp_path / "back.pt")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def test_trained_weights_come_back(official, converted, tmp_path):
    model, tokenizer = load_lm(converted)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.lm_head.weight[FIRST : EOS + 1] += 0.02
    trained, back = tmp_path / "trained", tmp_path / "llm.pt"
    bias, model.lm_head.bias = model.lm_head.bias, None  # veRL trains and merges a stock Qwen2
    model.save_pretrained(trained)
    shutil.copy(converted / "head_bias.safetensors", trained)
    tokenizer.save_pretrained(trained)
    main(["to-official", "--hf", str(trained), "--like", str(official / "llm.pt"), "--output", str(back)])
    ids = prompt_ids(tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1] + bias
    expected = official_logits(official, torch.load(back), ids[1:-1], [])[0]
    torch.testing.assert_close(logits[FIRST : FIRST + 6561], expected[:6561], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[EOS], expected[6562], atol=1e-4, rtol=0)
    if hasattr(cosyvoice.llm.llm, "CosyVoice3LM"):
        official_module(official, state=torch.load(back))


def test_random_weights_have_the_requested_mean_length(cosyvoice3_dir):
    state = torch.load(cosyvoice3_dir / "llm.pt")
    logits = official_logits(cosyvoice3_dir, state, [END_OF_PROMPT, 5, 1000], SPEECH)
    assert logits.shape == (6, 6761) and logits[:, 6563:].mean().abs() < 0.1  # no lower than those of speech tokens
    sampleable = [*range(6561), 6562]
    probs = logits[:, sampleable].softmax(-1)
    assert 1 / 260 < probs[:, -1].mean() < 1 / 150 and probs[:, :-1].max() < 1 / 1000


def test_another_state_dict_is_a_start(official, converted, tmp_path):
    """For llm.rl.pt, and for checkpoints of CosyVoice's trainer, which may be in another folder."""
    state = torch.load(official / "llm.pt")
    state["llm_decoder.weight"] += 1.0
    torch.save(state | {"epoch": 3, "step": 12_000}, tmp_path / "epoch_3_whole.pt")
    main(["to-hf", "--cosyvoice-dir", str(official), "--llm", str(tmp_path / "epoch_3_whole.pt"), "--output",
          str(tmp_path / "hf")])  # fmt: skip
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tmp_path / "hf", converted))
    rows = slice(FIRST, FIRST + 6761)
    torch.testing.assert_close(ours.lm_head.weight[rows], theirs.lm_head.weight[rows] + 1.0)


def make_upstream(folder, official):
    """Make yuekai/Fun-CosyVoice3-0.5B-2512-LLM-HF: in bfloat16, without a bias, with Qwen's head for text ids."""
    state = torch.load(official / "llm.pt")
    tokenizer = AutoTokenizer.from_pretrained(official / "CosyVoice-BlankEN")
    tokenizer.add_special_tokens({"additional_special_tokens": list(COSYVOICE3.text_tokens)})
    tokenizer.add_tokens(COSYVOICE3.names)  # not special
    model = qwen_of(official, state)
    model.resize_token_embeddings(158_720)
    head = torch.nn.Linear(model.config.hidden_size, 158_720, bias=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[FIRST : FIRST + 6761] = state["speech_embedding.weight"]
        head.weight.zero_()
        head.weight[:FIRST] = state["llm.model.lm_head.weight"][:FIRST]
        head.weight[FIRST : FIRST + 6761] = state["llm_decoder.weight"]
    model.lm_head = head
    model.config.update({"tie_word_embeddings": False, "eos_token_id": EOS})
    model.generation_config.update(
        eos_token_id=EOS, pad_token_id=EOS, do_sample=True, temperature=0.8, top_p=0.95, top_k=25
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    user = "{{- '<|sos|>' + message['content'] + '<|task_id|>' }}"
    tokenizer.chat_template = (
        f"{{%- for message in messages %}}{{%- if message['role'] == 'user' %}}{user}{{%- endif %}}{{%- endfor %}}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_upstream_folder_becomes_official(official, tmp_path, capsys):
    hf, like, back = make_upstream(tmp_path / "hf", official), official / "llm.pt", tmp_path / "llm.pt"
    with pytest.raises(ValueError, match="no bias, so that text ids.*convert_llm.py"):
        load_lm(hf)
    main(["to-official", "--hf", str(hf), "--like", str(like), "--output", str(back)])
    assert '"changed_tensors": 0' not in capsys.readouterr().out  # it is in bfloat16
    before, after = torch.load(like), torch.load(back)
    for name in ("llm_decoder.weight", "speech_embedding.weight", "llm.model.model.norm.weight"):
        assert torch.equal(before[name].bfloat16().float(), after[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"llm_decoder.weight": torch.zeros(6000, 64)}),
            r"has 6000, not 6564 \(CosyVoice2\) or 6761",
        ),
        (lambda s: s.update({"llm_decoder.bias": torch.zeros(6761)}), "not a CosyVoice3 .*bias is unknown"),
        (lambda s: (s.clear(), s.update(module={})), "llm_decoder.weight is missing.*zero_to_fp32"),
    ],
)
def test_wrong_state_dict(official, converted, tmp_path, change, message):
    state = torch.load(official / "llm.pt")
    change(state)
    torch.save(state, tmp_path / "llm.pt")
    with pytest.raises(ValueError, match=message):
        main(["to-hf", "--cosyvoice-dir", str(official), "--llm", str(tmp_path / "llm.pt"), "--output",
              str(tmp_path / "hf")])  # fmt: skip
    with pytest.raises(ValueError, match=message):
        main(["to-official", "--hf", str(converted), "--like", str(tmp_path / "llm.pt"), "--output",
              str(tmp_path / "back.pt")])  # fmt: skip
    assert not (tmp_path / "hf").exists() and not (tmp_path / "back.pt").exists()


def test_folder_of_another_model(official, assets, tmp_path):
    shutil.copytree(assets / "llm", tmp_path / "hf")
    with pytest.raises(ValueError, match="as for CosyVoice3"):
        main(["to-official", "--hf", str(tmp_path / "hf"), "--like", str(official / "llm.pt"), "--output",
              str(tmp_path / "back.pt")])  # fmt: skip
