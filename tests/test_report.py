"""Tests of the report of a small experiment: speech and scores by the tiny stack, and a TensorBoard log."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from scripts import report, summarise
from tools import compare
from tts_grpo.evaluation.protocols import count_all
from tts_grpo.evaluation.report import figures
from tts_grpo.evaluation.report.alignment import cells
from tts_grpo.evaluation.report.clips import band_levels
from tts_grpo.evaluation.report.disagreements import find_disagreements
from tts_grpo.evaluation.report.experiment import Sample, Utterance, load_scalars
from tts_grpo.evaluation.report.page import same_recogniser
from tts_grpo.evaluation.report.selection import select
from tts_grpo.speech.audio import save_audio
from tts_grpo.speech.token2wav import decode
from tts_grpo.text.errors import ErrorCounts, pinyin_error_rate
from tts_grpo.text.jsonl import read_jsonl, write_json, write_jsonl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NUM_UTTERANCES = 14
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on PATH (Debian: chromium, chromium-driver)"
)


def synthesise(token2wav, rows, output_dir, seeds, truncate) -> None:
    """Write manifests and recordings like infer_dist.py; utterances for which ``truncate`` is true lack a half."""
    for seed in seeds:
        tokens = [
            row["speech_tokens"][: len(row["speech_tokens"]) // 2] if truncate(i + seed) else row["speech_tokens"]
            for i, row in enumerate(rows)
        ]
        lines = []
        for row, speech_tokens, waveform in zip(rows, tokens, decode(token2wav, tokens), strict=True):
            save_audio(output_dir / f"seed_{seed}/wavs/{row['id']}.wav", waveform, 16000)
            lines.append({
                "id": row["id"], "target_text": row["text"], "seed": seed, "num_speech_tokens": len(speech_tokens),
                "error": None, "finish_reason": "eos", "wav": f"wavs/{row['id']}.wav",
                "duration_s": len(speech_tokens) / 25,
            })  # fmt: skip
        write_jsonl(output_dir / f"seed_{seed}/manifest.jsonl", lines)


def log_training(folder) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step in range(1, 31):
            values = {"critic/score/mean": 0.7 + step / 200, "response_length/mean": 50 - step / 10,
                      "actor/grad_norm": 0.1, "actor/entropy": 2.0, "rollout_corr/kl": 0.001}  # fmt: skip
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
        for step in (0, 15, 30):
            writer.add_scalar("val-core/text-to-speech/reward/mean@1", 0.7 + step / 200, step)
            writer.add_scalar("val-aux/text-to-speech/pinyin_error_rate/mean@1", 0.08 - step / 1000, step)


@pytest.fixture(scope="module")
def exp_dir(assets, token2wav, test_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("an experiment") / "exp"
    rows = test_rows[:NUM_UTTERANCES]
    write_jsonl(folder / "set.jsonl", rows)
    log_training(folder / "tensorboard")
    for model, truncate in (("sft", lambda n: n % 3 == 0), ("grpo", lambda n: n % 9 == 4)):
        output_dir = folder / "eval" / model
        synthesise(token2wav, rows, output_dir, (0, 1), truncate)
        command = ["bash", str(ROOT / "scripts/compute_wer.sh"), str(output_dir), str(folder / "set.jsonl")]
        environment = os.environ | {"python": sys.executable, "eval_asr_dir": str(assets / "asr_eval")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    edit_utterances(folder, assets)
    summarise.main(["--exp-dir", str(folder), "--settings", '{"seed": "42", "note": "<b>&</b>"}'])
    return folder


def edit_utterances(folder, assets) -> None:
    """Add a voice prompt to one utterance, and remove the audio of another one."""
    prompt = assets / "prompts" / read_jsonl(assets / "prompts/prompts.jsonl")[0]["prompt_audio"]
    for path in (folder / "eval/sft").glob("seed_*/utterances.jsonl"):
        lines = read_jsonl(path)
        lines[0] |= {"prompt_audio": str(prompt)}
        lines[3] |= {"audio": None, "error": "no speech tokens"}
        write_jsonl(path, lines)


@pytest.fixture(scope="module")
def page(exp_dir) -> str:
    start = time.process_time()
    report.main(["--exp-dir", str(exp_dir)])
    assert time.process_time() - start < 20
    return (exp_dir / "report.html").read_text(encoding="utf-8")


def test_values_in_the_page_are_those_of_the_summary(page, exp_dir):
    summary = json.loads((exp_dir / "summary.json").read_text())
    for metric in summary["metrics"]:
        for model in ("sft", "grpo"):
            assert f"{summary[model]['pooled'][metric]['rate']:.2%}" in page
        low, high = summary["relative_drop_ci"][metric]
        assert f"{summary['relative_drop'][metric]:.1%}" in page and f"{low:.1%} to {high:.1%}" in page
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in page and "<b>&</b>" not in page
    assert page.count('<figure class="plot">') >= 9
    for title in ("Reward", "Entropy, nats per token", "KL between rollout and training policy", "Gradient norm"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "KL of the update" not in page, "a curve without values is drawn"


def test_page_loads_nothing_from_outside(page):
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and "sets" not in ids
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert len(page) < 6 * 2**20


def test_audio_matches_the_texts(page, exp_dir, asr):
    """Transcribes the MP3 audio of each player."""
    rows = {row["id"]: row for row in read_jsonl(exp_dir / "eval/grpo/seed_0/utterances.jsonl")}
    recordings, texts = [], []
    for article in re.findall(r"<article .*?</article>", page, re.DOTALL):
        utt_id = re.search(r'id="utt-([^"]+)"', article)[1]
        for kind, uri in re.findall(r'class="sample (\w+)".*?src="data:audio/mpeg;base64,([^"]+)"', article, re.DOTALL):
            speech, rate = sf.read(io.BytesIO(base64.b64decode(html.unescape(uri))), dtype="float32")
            assert rate == 16000
            if kind == "grpo":
                recordings.append(speech)
                texts.append(rows[utt_id]["target_text"])
    assert len(texts) >= 10
    assert pinyin_error_rate(texts, asr.transcribe(recordings), tones=False) < 0.35
    assert pinyin_error_rate(texts[1:] + texts[:1], asr.transcribe(recordings), tones=False) > 0.7
    assert page.count('class="sample prompt"') == 1 and "No audio: no speech tokens" in page


def test_missing_files(exp_dir, tmp_path):
    shutil.copytree(exp_dir, tmp_path / "exp")
    shutil.rmtree(tmp_path / "exp/tensorboard")
    report.main(["--exp-dir", str(tmp_path / "exp"), "--examples", "1"])
    assert "no training log" in (tmp_path / "exp/report.html").read_text()
    path = tmp_path / "exp/eval/grpo/seed_1/utterances.jsonl"
    write_jsonl(path, read_jsonl(path)[1:])
    with pytest.raises(SystemExit, match="same utterances"):
        report.main(["--exp-dir", str(tmp_path / "exp")])
    (tmp_path / "exp/summary.json").unlink()
    with pytest.raises(SystemExit, match=r"summary.json is missing: run bash run.sh 4 4"):
        report.main(["--exp-dir", str(tmp_path / "exp")])


@pytest.fixture(scope="module")
def comparison(exp_dir, tmp_path_factory):
    """A page of seven experiments: one twice, with other settings; runs of tools/repeat.py; and one without scores."""
    folder = tmp_path_factory.mktemp("comparison")
    shutil.copytree(exp_dir, folder / "a")
    shutil.copytree(exp_dir / "eval", folder / "eval/hard-t1")
    for name in ("b", "c", "d", "e", "f", "grpo"):  # the last one has scores in eval/hard-t1/grpo
        log_training(folder / name / "tensorboard")
    shutil.copytree(exp_dir, folder / "b", dirs_exist_ok=True)
    summary = json.loads((folder / "b/summary.json").read_text())
    summary["settings"] |= {"seed": "43", "exp_name": "b", "eval_jsonl": "c/test.jsonl", "eval_jsonls": "c/hard.jsonl"}
    summary["set"] = "hard"
    write_json(folder / "b/summary.json", summary)
    output = folder / "comparison.html"
    compare.main([*(str(folder / name) for name in ("a", "b", "c", "d", "e", "f", "grpo")), "--output", str(output)])
    return output


def test_the_comparison_has_the_curves_and_scores_of_all_experiments(comparison, exp_dir):
    page = comparison.read_text(encoding="utf-8")
    summary = json.loads((exp_dir / "summary.json").read_text())
    rows = re.findall(r"<tr><th scope=\"row\">(\w+)</th>(.*?)</tr>", page, re.DOTALL)
    scores = {name: row for name, row in rows if "%" in row}
    assert scores.keys() == {"a", "b", "grpo"} and "<td>hard-t1</td>" in scores["grpo"]
    assert "<td>hard</td>" in scores["b"]
    for row in scores.values():
        for model in ("sft", "grpo"):
            assert f"{summary[model]['pooled']['pinyin_error_rate_toneless']['rate']:.2%}" in row
    plots = re.findall(r'<figure class="plot">.*?</figure>', page, re.DOTALL)
    reward = next(plot for plot in plots if "<figcaption>Reward</figcaption>" in plot)
    assert all(f"var(--run{number})" in reward for number in range(6)) and "stroke-dasharray" in reward
    assert "0.705" in reward and reward.count("<tr>") == 1 + 30
    assert '<th scope="row">seed</th><td>42</td><td>43</td><td>–</td>' in page and "exp_name" not in page
    test_page_loads_nothing_from_outside(page)


def test_experiments_that_cannot_be_compared_are_named(exp_dir, tmp_path):
    with pytest.raises(SystemExit, match="named twice"):
        compare.main([str(exp_dir), str(exp_dir)])
    with pytest.raises(SystemExit, match=f"{tmp_path} has neither scores nor a training log"):
        compare.main([str(exp_dir), str(tmp_path)])


def test_quality_metrics_and_verdicts_are_shown(exp_dir, tmp_path):
    shutil.copytree(exp_dir, tmp_path / "exp")
    for model in ("sft", "grpo"):
        path = tmp_path / "exp/eval" / model / "scores.json"
        scores = json.loads(path.read_text())
        dnsmos = {"title": "DNSMOS overall", "model": "DNSMOS P.835", "unit": "MOS", "better": "higher"}
        scores["quality"] = {
            "dnsmos_ovrl": dnsmos | {"value": 2.5, "ci": [2.25, 2.75], "n": 8},
            "eos_share": {"title": "ended", "value": 0.5, "ci": None, "n": 8, "unit": "share"},
        }
        write_json(path, scores)
    path = tmp_path / "exp/summary.json"
    summary = json.loads(path.read_text())
    summary["metrics"] = {name: {"title": f"the {name}", "mean": "micro"} for name in summary["relative_drop"]}
    summary["verdict"] = dict.fromkeys(summary["relative_drop"], "better")
    summary["quality_change"] = {
        "dnsmos_ovrl": {"difference": -0.3, "ci": [-0.5, -0.125], "verdict": "worse"},
        "eos_share": {"difference": 0.05, "ci": [-0.1, 0.2], "verdict": "not significant (95%)"},
    }
    summary["relative_drop"]["cer"] = summary["relative_drop_ci"]["cer"] = None
    write_json(path, summary)
    report.main(["--exp-dir", str(tmp_path / "exp"), "--examples", "1"])
    page = (tmp_path / "exp/report.html").read_text()
    assert "<h1>GRPO lowers the the pinyin_error_rate_toneless by " in page
    for part in (
        "DNSMOS overall, MOS",
        "DNSMOS P.835",
        "2.250 to 2.750",
        "-0.500 to -0.125",
        "+5.0 points",
        "-10.0 to +20.0",
        '"verdict worse"',
        "the cer",
    ):
        assert part in page


@pytest.mark.parametrize(
    ("target", "transcript", "kinds", "language"),
    [
        ("今天好", "今天好", ["same"] * 3, "zh"),
        ("他买花", "她卖画", ["homophone", "tone", "tone"], "zh"),
        ("很好吃", "很吃", ["same", "missing", "same"], "zh"),
        ("很吃", "很好吃", ["same", "extra", "same"], "zh"),
        ("好", "", ["missing"], "zh"),
        ("用 GPU 算", "用 CPU 算", ["same", "other", "same", "same", "same"], "zh"),  # by letter
        ("一会儿", "一会", ["same", "same", "optional"], "zh"),
        ("He paid $5", "he paid five dollars", ["same"] * 4, "en"),
    ],
)
def test_alignment(target, transcript, kinds, language):
    assert [cell.kind for cell in cells(target, transcript, language)] == kinds


def test_alignments_agree_with_the_error_counts(exp_dir):
    for row in read_jsonl(exp_dir / "eval/sft/seed_0/utterances.jsonl"):
        aligned = cells(row["target_text"], row["hypothesis"], "zh")
        errors = sum(cell.kind in ("other", "missing", "extra") for cell in aligned)
        assert errors == ErrorCounts(**row["errors"]["pinyin_error_rate_toneless"]).errors


def test_disagreements_of_the_protocols_are_shown_with_their_reason():
    texts = {"a": ("約50%", "约百分之五十"), "b": ("今天好", "今天好"), "c": ("说OK", "说o k"), "d": ("二百", "200")}
    utterances = []
    for utt_id, (target, transcript) in texts.items():
        counts = count_all(target, transcript, "zh")
        sample = Sample(None, None, transcript, 0, 1.0, counts["cer"].errors, counts["spoken"].errors)
        utterances.append(Utterance(utt_id, target, 3, {model: {"0": sample} for model in ("sft", "grpo")}))
    shown, reasons = find_disagreements(utterances)
    assert {d.utt_id: (d.spoken_text, d.why, d.spoken) for d in shown} == {
        "a": ("约百分之五十", "percent, traditional characters", 0), "d": ("二百", "digits in the transcript", 0),
    }  # fmt: skip
    assert sum(reasons.values()) == 2 and all(d.published > 0 for d in shown)


def utterance(number: int, sft: list[int], grpo: list[int]) -> Utterance:
    samples = {
        model: {str(seed): Sample(None, None, "", n, 1.0) for seed, n in enumerate(errors)}
        for model, errors in (("sft", sft), ("grpo", grpo))
    }
    return Utterance(f"u{number}", "好" * 10, 10, samples)


def test_selection():
    utterances = [utterance(0, [3, 0], [0, 0]), utterance(1, [1, 0], [1, 2]), utterance(2, [5, 4], [4, 5])]
    utterances += [utterance(n, [0, 0], [0, 0]) for n in range(3, 20)]
    groups = {group.title: [(u.utt_id, seed) for u, seed in group.chosen] for group in select(utterances, 2)}
    assert groups.pop("Drawn at random") and groups == {
        "Most improved": [("u0", "0")], "Most worsened": [("u1", "1")], "Worst after GRPO": [("u2", "1")]
    }  # fmt: skip


def test_length_bins_contain_every_utterance():
    rng = np.random.default_rng(0)
    for lengths in ([4], [4, 4, 9], rng.integers(1, 40, 300).tolist(), [1] * 50 + [9]):
        bins = figures.length_bins(lengths)
        members = [sum(first <= n <= last for n in lengths) for first, last in bins]
        assert sum(members) == len(lengths) and min(members) > 0


def test_repeated_steps_of_a_resumed_training_count_once(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for suffix, steps, value in ((".a", range(1, 8), 1.0), (".b", range(5, 10), 2.0)):
        with SummaryWriter(str(tmp_path), filename_suffix=suffix) as writer:
            for step in steps:
                writer.add_scalar("critic/score/mean", value, step)
        time.sleep(1.1)  # the file name contains the time in seconds
    expected = [(step, 1.0 if step < 5 else 2.0) for step in range(1, 10)]
    assert load_scalars(tmp_path) == {"critic/score/mean": expected}


def test_spectrogram_shows_a_tone_at_its_frequency():
    second = np.arange(16000) / 16000
    tone = np.sin(2 * np.pi * 1000 * second).astype(np.float32)
    levels = band_levels(np.concatenate([tone, np.zeros_like(tone)]), 16000)
    loud, mel = levels[:, levels.shape[1] // 4], 2595 * np.log10(1 + np.array([1000, 8000]) / 700)
    assert abs(int(loud.argmax()) - (len(loud) + 1) * mel[0] / mel[1] + 1) <= 1
    assert levels[:, levels.shape[1] * 3 // 4].max() == 0.0
    assert band_levels(np.zeros(16000, np.float32), 16000).max() == 0.0


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync autoplay-policy=no-user-gesture-required"
    )
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def fetched(browser) -> set[str]:
    """URLs that the browser requested since the last call, without data URIs."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if not url.startswith("data:")}


@needs_browser
def test_the_page_in_a_browser(browser, page, exp_dir):
    address = (exp_dir / "report.html").resolve().as_uri()
    browser.get("about:blank")
    fetched(browser)  # discards requests of the browser's start page
    browser.get(address)
    metrics = json.loads((exp_dir / "summary.json").read_text())["relative_drop"]
    assert len(browser.find_elements("css selector", "#headline tbody tr")) == len(metrics)
    plots = browser.find_elements("css selector", "figure.plot svg")
    assert len(plots) >= 9 and all(plot.size["width"] > 150 and plot.size["height"] > 80 for plot in plots)
    first, second = browser.find_elements("css selector", ".player button")[:2]
    browser.execute_script("arguments[0].scrollIntoView()", first)
    first.send_keys(" ")  # press the button by keyboard
    position = "return arguments[0].closest('.player').querySelector('audio').currentTime"
    wait_until(lambda: browser.execute_script(position, first) > 0.1)
    assert first.get_attribute("aria-pressed") == "true"
    second.click()
    wait_until(lambda: browser.execute_script(position, second) > 0.1)
    assert (first.get_attribute("aria-pressed"), second.get_attribute("aria-pressed")) == ("false", "true")
    assert browser.get_log("browser") == []
    assert fetched(browser) == {address}


@needs_browser
@pytest.mark.parametrize("kind", ["report", "comparison"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout_fits_and_contrast_is_sufficient(browser, page, exp_dir, comparison, kind, width, scheme):
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get({"report": exp_dir / "report.html", "comparison": comparison}[kind].resolve().as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 50
    assert min(contrasts) >= 4.5, sorted(contrasts)[:5]


# The contrast of each text with its background (WCAG 2.2, relative luminance and contrast ratio).
CONTRASTS = """
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const rgba = (css) => css.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
};
const own = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
return [...document.querySelectorAll("body *")].filter((e) => own(e) && e.checkVisibility()).map((e) => {
  const style = getComputedStyle(e);
  const a = light(rgba(e instanceof SVGElement ? style.fill : style.color)), b = light(ground(e));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
"""


def wait_until(condition, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_several_sets_have_a_common_table_and_a_page_each(exp_dir, tmp_path):
    for name in ("zero_shot_zh", "test_zh"):
        (tmp_path / "eval").mkdir(exist_ok=True)
        (tmp_path / "eval" / name).mkdir()
        for model in ("sft", "grpo"):
            (tmp_path / "eval" / name / model).symlink_to(exp_dir / "eval" / model)
    sets = ["--exp-dir", str(tmp_path), "--sets", "zero_shot_zh", "test_zh"]
    summarise.main(sets)
    report.main([*sets, "--examples", "1"])
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = re.search('<section id="sets">.*?</section>', first, re.DOTALL)[0]
    assert re.findall('<th scope="row">(.*?)</th><td>(.*?)</td>', table) == [
        (name, title) for name in sets[3:] for title in ("seed-tts-eval CER", "micro CER")
    ]
    assert f"{tmp_path.name} zero_shot_zh" in first
    second = (tmp_path / "eval/test_zh/report.html").read_text(encoding="utf-8")
    assert f"{tmp_path.name} test_zh" in second and not (tmp_path / "eval/zero_shot_zh/report.html").exists()


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"reward_asr_dir": "/a b/asr", "reward_asr_dirs": ""}, True),
        ({"reward_asr_dir": "/c", "reward_asr_dirs": r"/c /a\ b/asr"}, True),
        ({"reward_asr_dir": "/a b/asr", "reward_asr_dirs": "/c /d"}, False),  # reward_asr_dirs replaces the other
        ({}, False),
    ],
)
def test_a_recogniser_that_rewards_and_evaluates_is_noticed(settings, same):
    """Also if the set has another recogniser than most, such as eval_asr_dir_en."""
    assert same_recogniser(settings | {"eval_asr_dir": "/e"}, "/a b/asr") is same
