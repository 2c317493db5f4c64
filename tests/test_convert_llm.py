"""Compares the converted CosyVoice2 language model with the official module, both with random weights.

With these weights no direction of the hidden states is nearly constant, so that only a bias can exclude text ids.
"""

import dataclasses
import json
import shutil
import sys
import types

import pytest
import torch
from cosyvoice.llm.llm import Qwen2Encoder, Qwen2LM
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers import Qwen2ForCausalLM as Qwen2

from scripts.check import language_model_findings
from scripts.convert_llm import COSYVOICE2, check_ids, main
from tests.hub_repositories import draw_biases, make_cosyvoice2_llm
from tts_grpo.speech.generation import OFFICIAL, Sampling, generate, load_lm
from tts_grpo.speech.head_bias import UNREACHABLE, load_head_bias, restrict_to_sampleable_ids, sampleable_ids
from tts_grpo.text.prompts import render_prompt
from tts_grpo.training.verl_cpu.log_probs import fused_linear

pytestmark = pytest.mark.slow

TEXT, PROMPT_TEXT, PROMPT_SPEECH, SPEECH = "今天 ok\n", "早。", [3, 6560], [7, 0, 4000, 6560, 12]
NUM_OUTPUTS = COSYVOICE2.num_outputs
TEXT_ROWS = 320  # more than the tokenizer has tokens, as in the official model
BLANK_EN_GENERATION = {  # Qwen2-0.5B-Instruct's; the token ids differ here
    "do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    "eos_token_id": [1, 0], "pad_token_id": 0, "bos_token_id": 0,
}  # fmt: skip


def official_model(text_dir, state=None) -> Qwen2LM:
    size = AutoConfig.from_pretrained(text_dir).hidden_size
    model = Qwen2LM(size, size, 6561, Qwen2Encoder(str(text_dir)), sampling=None).eval()
    if state is not None:
        model.load_state_dict(state)
    return model


def official_logits(model: Qwen2LM, text_ids, speech) -> torch.Tensor:
    """Logits after the task id and after each speech token, from the input that ``Qwen2LM.inference`` builds."""
    with torch.no_grad():
        parts = [
            model.llm_embedding.weight[:1],
            model.llm.model.model.embed_tokens(torch.tensor(text_ids)),
            model.llm_embedding.weight[1:],
            model.speech_embedding(torch.tensor(speech)),
        ]
        inputs = torch.cat(parts)[None]
        hidden, _ = model.llm(inputs, torch.tensor([inputs.shape[1]]))
        return model.llm_decoder(hidden)[0, -1 - len(speech) :]


def make_cosyvoice_dir(folder):
    """Make a CosyVoice2-0.5B folder with small shapes."""
    text_dir = folder / "CosyVoice-BlankEN"
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    ).save_pretrained(text_dir)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=TEXT_ROWS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    text_model = Qwen2(config)
    text_model.generation_config = GenerationConfig(**BLANK_EN_GENERATION)
    text_model.save_pretrained(text_dir)
    model = official_model(text_dir)
    draw_biases(model)
    torch.save(model.state_dict(), folder / "llm.pt")
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return make_cosyvoice_dir(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "llm"
    main(["to-hf", "--cosyvoice-dir", str(official), "--output", str(folder)])
    assert not folder.with_name("llm.part").exists()
    return folder


@pytest.fixture(scope="module")
def upstream(official, tmp_path_factory):
    return make_cosyvoice2_llm(tmp_path_factory.mktemp("upstream") / "cosyvoice2_llm", official)


def hf_logits(model, tokenizer, text, prompt_text="", prompt_speech=(), speech=()):
    prompt = render_prompt(tokenizer, text, prompt_text, prompt_speech)
    first = tokenizer.convert_tokens_to_ids("<|s_0|>")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] + [first + token for token in speech]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1 - len(prompt_speech) - len(speech) :], first


def same_logits(official_dir, hf_dir, state):
    """Largest difference of the logits, with and without a zero-shot prompt."""
    model, tokenizer = load_lm(hf_dir)
    reference = official_model(official_dir / "CosyVoice-BlankEN", state)
    text_tokenizer = AutoTokenizer.from_pretrained(official_dir / "CosyVoice-BlankEN")
    worst = 0.0
    for prompt_text, prompt_speech in (("", []), (PROMPT_TEXT, PROMPT_SPEECH)):
        logits, first = hf_logits(model, tokenizer, TEXT, prompt_text, prompt_speech, SPEECH)
        text_ids = text_tokenizer(prompt_text + TEXT, add_special_tokens=False)["input_ids"]
        expected = official_logits(reference, text_ids, prompt_speech + SPEECH)
        assert logits.shape[0] == expected.shape[0] == 1 + len(prompt_speech) + len(SPEECH)
        worst = max(worst, (logits[:, first : first + NUM_OUTPUTS] - expected).abs().max().item())
        # the probabilities agree, too: all mass is on ids that the official model can output
        probs = logits.softmax(-1)
        torch.testing.assert_close(probs[:, first : first + NUM_OUTPUTS], expected.softmax(-1), atol=1e-6, rtol=1e-3)
        assert probs[:, :first].max() == probs[:, first + NUM_OUTPUTS :].max() == 0
    return worst


def test_logits_are_the_official_ones(official, converted):
    assert same_logits(official, converted, torch.load(official / "llm.pt")) < 1e-4


def test_round_trip_is_bit_equal(official, converted, tmp_path):
    main(["to-official", "--hf", str(converted), "--like", str(official / "llm.pt"), "--output", str(tmp_path / "a")])
    before, after = torch.load(official / "llm.pt"), torch.load(tmp_path / "a")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_size < 1.1 * (official / "llm.pt").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_come_back(official, converted, tmp_path, dtype):
    model, tokenizer = load_lm(converted)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.02 * torch.randn_like(parameter)
    model.lm_head.bias = None  # veRL trains and merges a stock Qwen2
    model.to(dtype).save_pretrained(tmp_path / "trained")
    shutil.copy(converted / "head_bias.safetensors", tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    like, output = official / "llm.pt", tmp_path / "llm.pt"
    main(["to-official", "--hf", str(tmp_path / "trained"), "--like", str(like), "--output", str(output)])
    state = torch.load(output)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert not torch.equal(state["llm_decoder.weight"], torch.load(like)["llm_decoder.weight"])
    assert torch.equal(state["llm_decoder.bias"], torch.load(like)["llm_decoder.bias"])
    assert same_logits(official, tmp_path / "trained", state) < 1e-4


def test_tokenizer(converted):
    tokenizer, config = AutoTokenizer.from_pretrained(converted), AutoConfig.from_pretrained(converted)
    speech = tokenizer.convert_tokens_to_ids([f"<|s_{i}|>" for i in range(6561)])
    rest = tokenizer.convert_tokens_to_ids(["<|eos1|>", "<|eos2|>", "<|eos3|>", "<|sos|>", "<|task_id|>"])
    assert speech + rest == list(range(speech[0], speech[0] + 6566))
    assert speech[0] == tokenizer.convert_tokens_to_ids("[mn]") + 1
    assert len(tokenizer) == rest[-1] + 1 <= config.vocab_size
    assert tokenizer.decode([*speech[:2], rest[0]], skip_special_tokens=True) == "<|s_0|><|s_1|>"
    assert len(tokenizer("\n", add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == config.eos_token_id == rest[0]
    assert not config.tie_word_embeddings
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == rest[:3]
    for flag in (True, False):
        messages = [{"role": "user", "content": TEXT}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=flag)
        assert rendered == f"<|sos|>{TEXT}<|task_id|>"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (rest[3], rest[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5), dataclasses.replace(OFFICIAL, top_k=3)])
def test_only_speech_and_ends_are_sampled(converted, dtype, sampling):
    model, tokenizer = load_lm(converted, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight *= 0.01  # nearly uniform over the ids that the bias allows
    ids = tokenizer(render_prompt(tokenizer, TEXT), add_special_tokens=False)["input_ids"]
    first = check_ids(tokenizer, converted, COSYVOICE2)
    sampling = dataclasses.replace(sampling, max_new_tokens=100)
    responses = generate(model, [ids] * 8, range(8), sampling, text_lens=[9] * 8)
    generated = [token for response in responses for token in response.token_ids]
    assert len(generated) > 300 and all(first <= token < first + NUM_OUTPUTS for token in generated)
    with torch.no_grad():
        probs = model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
    assert probs[:first].sum() == probs[first + NUM_OUTPUTS :].sum() == 0


def test_text_would_be_sampled_without_the_bias(converted, upstream):
    """Shows why the bias is needed: stock Qwen2 models ignore it, and give text ids a large probability."""
    for folder in (converted, upstream):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(model) is Qwen2 and model.lm_head.bias is None
        logits, first = hf_logits(model, tokenizer, TEXT, speech=SPEECH)
        assert logits.softmax(-1)[:, :first].sum(-1).min() > 0.01


@pytest.mark.parametrize("kind", ["converted", "upstream"])
def test_what_verl_loads_passes_the_pre_flight_check(kind, request):
    found = list(language_model_findings(request.getfixturevalue(kind)))
    assert len(found) > 5 and all(good for good, _ in found), found
    assert any(f"{NUM_OUTPUTS} of" in text for _, text in found)


def test_pre_flight_check_without_a_bias(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "hf")
    (tmp_path / "hf/head_bias.safetensors").unlink()
    (text,) = [text for good, text in language_model_findings(tmp_path / "hf") if not good]
    assert "no bias" in text and "convert_llm.py" in text
    with pytest.raises(ValueError, match="has no bias"):
        load_lm(tmp_path / "hf")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_training_and_rollouts_have_the_same_probabilities(converted, dtype, tolerance):
    model, tokenizer = load_lm(converted, dtype=dtype)
    first = check_ids(tokenizer, converted, COSYVOICE2)
    ids = tokenizer(render_prompt(tokenizer, TEXT), add_special_tokens=False)["input_ids"]
    (response,) = generate(model, [ids], [3], Sampling(max_new_tokens=60))
    labels = torch.tensor([[*ids, *response.token_ids]])
    log_probs_of = restrict_to_sampleable_ids(fused_linear, load_head_bias(converted))
    with torch.no_grad():
        hidden = model.model(labels).last_hidden_state[:, :-1]
        log_probs, entropy = log_probs_of(None, hidden, model.lm_head.weight, labels[:, 1:])
        every = model(labels).logits[0, :-1].float().log_softmax(-1)
    response_slice = slice(len(ids) - 1, None)
    torch.testing.assert_close(log_probs[0, response_slice].tolist(), response.log_probs, atol=tolerance, rtol=0)
    expected_entropy = -(every.exp() * every)[:, first : first + NUM_OUTPUTS].sum(-1)
    torch.testing.assert_close(entropy[0].float(), expected_entropy, atol=tolerance, rtol=0.01)
    assert (log_probs[0, : len(ids) - 2] == UNREACHABLE).all()  # positions of the prompt


def test_gradients_are_those_of_a_head_with_a_bias():
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.full((40,), UNREACHABLE)
    bias[[3, 11, 12, 13, 39]] = torch.randn(5)
    labels, scale = sampleable_ids(bias)[torch.randint(0, 5, (2, 9))], torch.randn(2, 9, dtype=torch.float64)
    log_probs, _ = restrict_to_sampleable_ids(fused_linear, bias)(None, hidden, weight, labels, 0.7)
    ours = torch.autograd.grad((scale * log_probs).sum(), (hidden, weight))
    # the bias is added to the logits before they are divided by the temperature
    dense = ((hidden @ weight.T + bias.double()) / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(log_probs, dense)
    for our, their in zip(ours, torch.autograd.grad((scale * dense).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(our, their)


def test_vllm_adds_the_bias(converted, monkeypatch):
    """Tests the extension of vLLM's workers with fakes of vLLM's model and of veRL's own extension."""

    class Model(torch.nn.Linear):
        def compute_logits(self, hidden):
            return self(hidden)

    class Extension:
        def monkey_patch_model(self, vocab_size, banned_token_ids=None):
            self.vocab_size = vocab_size

    utils = types.ModuleType("utils")
    utils.vLLMColocateWorkerExtension = Extension
    for name in ("verl", "verl.workers", "verl.workers.rollout", "verl.workers.rollout.vllm_rollout"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "verl.workers.rollout.vllm_rollout.utils", utils)
    monkeypatch.delitem(sys.modules, "tts_grpo.training.verl_vllm", raising=False)
    from tts_grpo.training.verl_vllm import HeadBiasExtension

    bias, hidden = load_head_bias(converted), torch.randn(3, 8, dtype=torch.bfloat16)
    model = Model(8, len(bias), bias=False, dtype=torch.bfloat16)
    stock = model(hidden)
    worker = HeadBiasExtension()
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(model=str(converted)))
    worker.model_runner = types.SimpleNamespace(model=model, vllm_config=config)
    worker.monkey_patch_model(vocab_size=7, banned_token_ids=[])
    assert worker.vocab_size == 7
    logits = model.compute_logits(hidden)
    assert logits.dtype == torch.float32 and torch.equal(logits, stock.float() + bias)


def test_upstream_folder_has_the_probabilities_of_the_official_model(official, upstream):
    rounded = {name: t.to(torch.bfloat16).float() for name, t in torch.load(official / "llm.pt").items()}
    model, tokenizer = load_lm(upstream)
    logits, first = hf_logits(model, tokenizer, TEXT, speech=SPEECH)
    text_tokenizer = AutoTokenizer.from_pretrained(official / "CosyVoice-BlankEN")
    text_ids = text_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = official_logits(official_model(official / "CosyVoice-BlankEN", rounded), text_ids, SPEECH)
    torch.testing.assert_close(logits[:, first : first + NUM_OUTPUTS], expected, atol=1e-4, rtol=1e-4)
    probs = logits.softmax(-1)
    assert probs[:, :first].max() == probs[:, first + NUM_OUTPUTS :].max() == 0


def test_upstream_folder_becomes_official(official, upstream, tmp_path):
    like, output = official / "llm.pt", tmp_path / "llm.pt"
    main(["to-official", "--hf", str(upstream), "--like", str(like), "--output", str(output)])
    before, after = torch.load(like), torch.load(output)
    assert list(before) == list(after)
    for name, tensor in before.items():  # rows beyond the tokenizer's size are not in the folder
        kept = (tensor if "embed_tokens" in name or "lm_head" in name else tensor.bfloat16()).float()
        rows = slice(0, None) if kept is not tensor else slice(300, None)
        assert torch.equal(kept[rows], after[name].float()[rows]), name


def test_folder_that_was_trained_without_a_bias(official, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "hf")
    (tmp_path / "hf/head_bias.safetensors").unlink()
    like, output = str(official / "llm.pt"), tmp_path / "llm.pt"
    main(["to-official", "--hf", str(tmp_path / "hf"), "--like", like, "--output", str(output)])
    assert not torch.load(output)["llm_decoder.bias"].any()


def test_bias_of_another_size_is_an_error(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "hf")
    for bias, message in ((torch.zeros(5), "has 5 values"), (torch.full((5,), torch.nan), "NaN or infinite")):
        save_file({"lm_head.bias": bias}, tmp_path / "hf/head_bias.safetensors")
        with pytest.raises(ValueError, match=message):
            load_lm(tmp_path / "hf")


def test_checkpoint_of_the_official_trainer(official, converted, tmp_path):
    """CosyVoice's trainer writes epoch and step in addition to the weights."""
    state = torch.load(official / "llm.pt")
    torch.save({**state, "epoch": 3, "step": 12000}, tmp_path / "llm.pt")
    (tmp_path / "CosyVoice-BlankEN").symlink_to(official / "CosyVoice-BlankEN")
    main(["to-hf", "--cosyvoice-dir", str(tmp_path), "--output", str(tmp_path / "hf")])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", converted))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    like, output = str(tmp_path / "llm.pt"), str(tmp_path / "back.pt")
    main(["to-official", "--hf", str(converted), "--like", like, "--output", output])
    assert torch.load(output).keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("llm_decoder.bias"), "llm_decoder.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda s: s.update({"llm_embedding.weight": torch.zeros(3, 32)}), r"llm_embedding.weight is \(3, 32\), not"),
        (lambda s: s.update({"llm_decoder.bias": torch.full((6564,), torch.nan)}), "llm_decoder.bias is not finite"),
        (lambda s: s.pop("llm.model.model.norm.weight"), "llm.model.model.norm.weight is missing"),
    ],
)
def test_wrong_state_dict(official, converted, tmp_path, change, message):
    state = torch.load(official / "llm.pt")
    change(state)
    torch.save(state, tmp_path / "llm.pt")
    (tmp_path / "CosyVoice-BlankEN").symlink_to(official / "CosyVoice-BlankEN")
    with pytest.raises(ValueError, match=message):
        main(["to-hf", "--cosyvoice-dir", str(tmp_path), "--output", str(tmp_path / "hf")])
    with pytest.raises(ValueError, match=message):
        like, output = str(tmp_path / "llm.pt"), str(tmp_path / "back.pt")
        main(["to-official", "--hf", str(converted), "--like", like, "--output", output])
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / "back.pt").exists()


def test_folder_that_lacks_a_weight(official, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight"):
        output = str(tmp_path / "back.pt")
        main(["to-official", "--hf", str(tmp_path / "hf"), "--like", str(official / "llm.pt"), "--output", output])


def test_foreign_folder(official, assets, tmp_path):
    with pytest.raises(ValueError, match="eos1"):
        output = str(tmp_path / "back.pt")
        main(["to-official", "--hf", str(assets / "llm"), "--like", str(official / "llm.pt"), "--output", output])


def test_output_that_exists(official, converted):
    with pytest.raises(FileExistsError, match="remove it"):
        main(["to-hf", "--cosyvoice-dir", str(official), "--output", str(converted)])
