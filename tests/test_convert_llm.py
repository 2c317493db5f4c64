"""Conversion of the official CosyVoice2 language model, held against the official module with random weights."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from cosyvoice.llm.llm import Qwen2Encoder, Qwen2LM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from scripts.check import language_model_findings
from scripts.convert_llm import NUM_OUTPUTS, check_ids, main
from tests.conftest import ROOT
from tts_grpo.cosyvoice2_lm import CosyVoice2LMForCausalLM
from tts_grpo.generate import OFFICIAL, Sampling, generate, load_lm
from tts_grpo.prompts import render_prompt

TEXT, PROMPT_TEXT, PROMPT_SPEECH, SPEECH = "今天 ok\n", "早。", [3, 6560], [7, 0, 4000, 6560, 12]
TEXT_ROWS = 320  # more than the tokenizer has tokens, as in the official model


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


def make_cosyvoice_dir(folder, bias_scale=1.0, shared=0.0):
    """A CosyVoice2-0.5B folder of small shapes; ``shared`` is added to every embedding."""
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
    Qwen2(config).save_pretrained(text_dir)
    model = official_model(text_dir)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:
                parameter.normal_(std=bias_scale)
            if "embed" in name:
                parameter += shared
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


def hf_logits(model, tokenizer, text, prompt_text="", prompt_speech=(), speech=()):
    prompt = render_prompt(tokenizer, text, prompt_text, prompt_speech)
    first = tokenizer.convert_tokens_to_ids("<|s_0|>")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] + [first + token for token in speech]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1 - len(prompt_speech) - len(speech) :], first


def same_logits(official_dir, hf_dir, state):
    """The largest difference, with and without a zero-shot prompt."""
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
        # the probabilities too: all the mass is on what the official model says
        probs = logits.softmax(-1)
        torch.testing.assert_close(probs[:, first : first + NUM_OUTPUTS], expected.softmax(-1), atol=1e-6, rtol=1e-3)
        if model.lm_head.bias is not None:
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
    model.to(dtype).save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    like, output = official / "llm.pt", tmp_path / "llm.pt"
    main(["to-official", "--hf", str(tmp_path / "trained"), "--like", str(like), "--output", str(output)])
    state = torch.load(output)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert not torch.equal(state["llm_decoder.weight"], torch.load(like)["llm_decoder.weight"])
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
        model.lm_head.weight *= 0.01  # nearly uniform over what can be reached
    ids = tokenizer(render_prompt(tokenizer, TEXT), add_special_tokens=False)["input_ids"]
    first = check_ids(tokenizer, converted)
    sampling = dataclasses.replace(sampling, max_new_tokens=100)
    said = [token for response in generate(model, [ids] * 8, range(8), sampling) for token in response.token_ids]
    assert len(said) > 300 and all(first <= token < first + NUM_OUTPUTS for token in said)
    with torch.no_grad():
        probs = model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
    assert probs[:first].sum() == probs[first + NUM_OUTPUTS :].sum() == 0


def test_what_verl_loads_passes_the_pre_flight_check(tmp_path):
    official = make_cosyvoice_dir(tmp_path, bias_scale=0.03, shared=3.0)
    main(["to-hf", "--cosyvoice-dir", str(official), "--output", str(tmp_path / "hf"), "--without-head-bias"])
    found = list(language_model_findings(tmp_path / "hf"))
    assert len(found) > 4 and all(good for good, _ in found), found


def test_who_does_not_know_the_bias_does_not_load_it(converted):
    # as veRL's processes do: they import tts_grpo.generate and load the folder themselves
    code = "import sys, tts_grpo.generate, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, str(converted)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    assert "model type `cosyvoice2_lm`" in run.stderr


def test_without_head_bias(tmp_path, capsys):
    official = make_cosyvoice_dir(tmp_path, bias_scale=0.03, shared=3.0)
    args = ["to-hf", "--cosyvoice-dir", str(official), "--output", str(tmp_path / "hf"), "--without-head-bias"]
    main(args)
    report = json.loads(capsys.readouterr().out)
    assert report["text_mass_max"] < 1e-6
    assert 0 < report["kl_mean"] < report["kl_bound"] < 0.02
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is Qwen2
    assert AutoConfig.from_pretrained(tmp_path / "hf").model_type == "qwen2"
    logits, first = hf_logits(model, AutoTokenizer.from_pretrained(tmp_path / "hf"), TEXT, speech=SPEECH)
    mass = logits.softmax(-1)
    assert mass[:, :first].sum(-1).max() + mass[:, first + NUM_OUTPUTS :].sum(-1).max() < 1e-6
    like, output = official / "llm.pt", tmp_path / "back.pt"
    main(["to-official", "--hf", str(tmp_path / "hf"), "--like", str(like), "--output", str(output)])
    before, after = torch.load(like), torch.load(output)
    assert not after.pop("llm_decoder.bias").any()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert same_logits(official, tmp_path / "hf", torch.load(output)) < 1e-4


def test_without_head_bias_stops_where_text_would_be_said(official, tmp_path):
    args = ["to-hf", "--cosyvoice-dir", str(official), "--output", str(tmp_path / "hf"), "--without-head-bias"]
    with pytest.raises(ValueError, match="leave out --without-head-bias"):
        main(args)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("llm_decoder.bias"), "llm_decoder.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda s: s.update(epoch=3), "epoch is unknown"),
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
    model, tokenizer = load_lm(converted)
    state = model.state_dict()
    state.pop("lm_head.bias")
    CosyVoice2LMForCausalLM.save_pretrained(model, tmp_path / "hf", state_dict=state)
    tokenizer.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="lm_head.bias"):
        output = str(tmp_path / "back.pt")
        main(["to-official", "--hf", str(tmp_path / "hf"), "--like", str(official / "llm.pt"), "--output", output])


def test_foreign_folder(official, assets, tmp_path):
    with pytest.raises(ValueError, match="eos1"):
        output = str(tmp_path / "back.pt")
        main(["to-official", "--hf", str(assets / "llm"), "--like", str(official / "llm.pt"), "--output", output])


def test_output_that_exists(official, converted):
    with pytest.raises(FileExistsError, match="remove it"):
        main(["to-hf", "--cosyvoice-dir", str(official), "--output", str(converted)])
