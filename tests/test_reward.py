import asyncio
import concurrent.futures
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import reward_tts
import token2wav_asr_server
from tests.conftest import RewardServer
from token2wav_asr_server import Instance, get_args, load_scorer
from tts_grpo.reward.client import RewardClient, RewardServerError, UnscoredRolloutError, cause
from tts_grpo.reward.protocol import (
    MODEL_NAME,
    SECRET_FILE,
    RolloutScore,
    SampleError,
    decode_response,
    encode_request,
    encode_response,
)
from tts_grpo.reward.scorer import RewardScorer
from tts_grpo.text.jsonl import read_jsonl
from tts_grpo.text.tokens import format_speech_tokens
from tts_grpo.text.units import pinyin

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows(assets):
    return read_jsonl(assets / "data" / "dev.jsonl")[:40]


def score_all(client: RewardClient, pairs):
    async def go():
        try:
            return await asyncio.gather(*(client.score(*pair) for pair in pairs), return_exceptions=True)
        finally:
            await client.close()

    return asyncio.run(go())


def metric(server, name: str) -> float:
    with urllib.request.urlopen(f"{server.metrics_url}/metrics", timeout=10) as answer:
        found = re.findall(rf"^{name}{{[^}}]*}} ([\d.]+)", answer.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def post(server, body: dict) -> int:
    request = urllib.request.Request(f"{server.url}/v2/models/{MODEL_NAME}/infer", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_server_scores_as_in_process_and_batches(reward_server, rows, token2wav, asr):
    before = metric(reward_server, "nv_inference_exec_count")
    served = score_all(RewardClient([reward_server.url]), [(r["speech_tokens"], r["text"]) for r in rows * 4])
    executions = metric(reward_server, "nv_inference_exec_count") - before
    assert executions < 0.8 * 4 * len(rows), "concurrent requests were not batched"
    scorer = RewardScorer(token2wav, asr, tones=False)
    for row, scored in zip(rows * 4, served, strict=True):
        (alone,) = scorer.score([row["speech_tokens"]], [row["text"]])
        assert (scored.transcript, scored.reward) == (alone.transcript, pytest.approx(alone.reward, abs=1e-6))


def test_mixed_lengths_and_concurrent_clients(reward_server, rows):
    tokens = rows[0]["speech_tokens"]
    pairs = [(tokens * repeats, rows[0]["text"]) for repeats in (1, 2, 5, 9) for _ in range(6)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: score_all(RewardClient([reward_server.url]), pairs), range(3))
    assert all(other == first for other in others)
    assert all(first[i] == first[i - i % 6] for i in range(len(pairs)))


def test_bad_input_is_refused_or_named(reward_server, rows):
    body = encode_request(rows[0]["speech_tokens"], rows[0]["text"])
    assert post(reward_server, body) == 200
    assert post(reward_server, body | {"inputs": body["inputs"][:2]}) == 400
    foreign = [(rows[0]["speech_tokens"], rows[0]["text"], language) for language in ("fr", "en")]
    unknown, english = score_all(RewardClient([reward_server.url]), foreign)
    assert "LANGUAGE is b'fr': the reward server scores zh and en" in str(unknown)
    assert isinstance(english, UnscoredRolloutError) and "does not know the language en" in str(english)
    (out_of_range,) = score_all(RewardClient([reward_server.url]), [([7000, 1, 2], "你好")])
    (no_word,) = score_all(RewardClient([reward_server.url]), [(rows[0]["speech_tokens"], "。")])
    good, bad = score_all(
        RewardClient([reward_server.url]), [(rows[0]["speech_tokens"], rows[0]["text"]), ([9999], "好")]
    )
    assert isinstance(out_of_range, UnscoredRolloutError) and "not in [0, 6561)" in str(out_of_range)
    assert isinstance(no_word, RewardServerError) and "no word" in str(no_word)
    assert good.reward > 0.3 and isinstance(bad, RewardServerError)


def test_known_answers(reward_server, assets, capsys):
    flags = ["--jsonl", str(assets / "data" / "dev.jsonl"), "--limit", "32", "--server-urls", reward_server.url]
    reward_tts.main([*flags, "--check"])
    result = json.loads(capsys.readouterr().out)
    assert result["mean_reward"] > 0.6 > 0.2 > result["mean_reward_of_wrong_texts"]
    assert result["lost_by_digits"] == 0.0  # over three texts, whose spoken forms do not change with digits
    assert "expected at least" in reward_tts.known_answer_check(0.5, 0.0)
    assert "expected at most" in reward_tts.known_answer_check(0.9, 0.5)
    assert reward_tts.known_answer_check(0.9, 0.1) is None
    assert "written with digits" in reward_tts.known_answer_check(0.9, 0.1, 0.3)


class FakeClient:
    """Stands for a client of one server, which answers batches of 8; ``shift`` gives answers to other requests."""

    def __init__(self, texts: dict, server: str, shift: int = 0, right: float = 1.0):
        self.texts, self.server, self.shift, self.right, self.waiting = texts, server, shift, right, []
        self.languages = []

    async def score(self, speech_tokens, text, language):
        self.languages.append(language)
        reward = self.right if self.texts[tuple(speech_tokens)] == text else 1.0 - self.right
        answer = asyncio.get_running_loop().create_future()
        # other parts give any text the score 1
        self.waiting.append((answer, RolloutScore((reward + 1) / 2, 1.0 - reward, text, server=self.server,
                                                  parts={"intelligibility": reward, "pitch": 1.0})))  # fmt: skip
        if len(self.waiting) == 8:
            answers, scores = zip(*self.waiting)
            self.waiting = []
            for i, one in enumerate(answers):
                one.set_result(scores[(i + self.shift) % 8])
        return await answer

    async def close(self):
        pass


def test_servers_with_swapped_outputs_or_other_models_fail_the_known_answer_check(monkeypatch):
    rows = [{"speech_tokens": [i], "text": f"第{i}句", "language": "zh"} for i in range(64)]
    texts = {(i,): row["text"] for i, row in enumerate(rows)}

    def check(*clients: FakeClient, languages: int = 1):
        made = iter(clients)
        monkeypatch.setattr(reward_tts, "RewardClient", lambda urls, patience_s: next(made))
        return reward_tts.check_servers(rows, ",".join("abc"[: len(clients) // languages]), 0.0)

    results = check(FakeClient(texts, "one"), FakeClient(texts, "one"))
    assert [result["server"] for result in results] == ["a", "b"]
    assert (results[0]["mean_reward"], results[0]["mean_reward_of_wrong_texts"]) == (1.0, 0.0)
    for shift in range(1, 8):  # answers of a batch in another order
        with pytest.raises(RewardServerError, match="known-answer check of b failed"):
            check(FakeClient(texts, "one"), FakeClient(texts, "one", shift))
    with pytest.raises(RewardServerError, match="known-answer check of a failed"):  # rewards and error rates swapped
        check(FakeClient(texts, "one", right=0.0))
    with pytest.raises(RewardServerError, match="b computes other rewards than a"):
        check(FakeClient(texts, "one"), FakeClient(texts, "two"))
    for row in rows[:8]:
        row["language"] = "en"
    english = FakeClient(texts, "one", right=0.0)
    with pytest.raises(RewardServerError, match="known-answer check of a failed in language en: speech of the right"):
        check(english)
    assert english.languages == ["en"] * 16
    results = check(FakeClient(texts, "one"), FakeClient(texts, "one"), languages=2)
    assert [(result["language"], result["samples"]) for result in results] == [("en", 8), ("zh", 56)]


def test_compute_score(reward_server, rows, monkeypatch):
    async def go():
        monkeypatch.setattr(reward_tts, "_client", None)
        score = lambda text: reward_tts.compute_score(  # noqa: E731
            "", text, rows[0]["text"], server_urls=reward_server.url, by_syllable=True
        )
        results = [await score(s) for s in (format_speech_tokens(rows[0]["speech_tokens"]), "hello", "<|s_7000|>")]
        await reward_tts._client.close()
        return results

    good, silent, out_of_range = asyncio.run(go())
    assert good["score"] > 0.3 and good["bad_rollout"] == 0.0
    assert re.fullmatch("[0-9a-f]{16}", good["reward_server"]) and silent["reward_server"] == ""
    losses, starts = json.loads(good["syllable_losses"])
    syllables = pinyin(rows[0]["text"], tones=False)
    assert len(losses) == len(starts) == len(syllables) and sum(losses) == pytest.approx(1 - good["score"], abs=1e-5)
    assert good["reward_parts/intelligibility"] == pytest.approx(good["score"])
    assert starts == sorted(starts) and 0 <= starts[0] < starts[-1] < len(rows[0]["speech_tokens"])
    for bad in (silent, out_of_range):
        assert (bad["score"], bad["bad_rollout"], bad["syllable_losses"]) == (0.0, 1.0, "[[], []]")
        assert bad["reward_parts/intelligibility"] == 0.0


def test_a_response_that_continues_its_recording_is_scored_with_it(reward_server, rows, monkeypatch):
    tokens, size = rows[0]["speech_tokens"], 20

    async def go():
        monkeypatch.setattr(reward_tts, "_client", None)
        splits = [(tokens, None), (tokens[size:], {"speech_prefix": tokens[:size]}), ([], {"speech_prefix": tokens})]
        results = [
            await reward_tts.compute_score(
                "", format_speech_tokens(response), rows[0]["text"], extra_info=extra, server_urls=reward_server.url,
                by_syllable=True,
            )
            for response, extra in splits
        ]  # fmt: skip
        await reward_tts._client.close()
        return results

    whole, continued, empty = asyncio.run(go())
    assert continued["score"] == whole["score"] > 0.3 and continued["num_speech_tokens"] == len(tokens) - size
    (errors, starts), (same, shifted) = (json.loads(r["syllable_losses"]) for r in (whole, continued))
    assert same == errors and shifted == [start - size for start in starts] and shifted[0] < 0
    assert (empty["score"], empty["bad_rollout"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        ({"server_urls": None}, "AttributeError"),  # stands for any bug in this program or its settings
        ({"solution_str": None}, "TypeError"),
        ({"solution_str": "hello", "ground_truth": None}, "TypeError"),
        ({}, "no reward after"),
    ],
)
def test_any_exception_is_reported_and_gives_no_reward(tmp_path, monkeypatch, arguments, reported):
    arguments = {"solution_str": "<|s_1|>", "ground_truth": "今天"} | arguments
    failure_file = tmp_path / "failure"

    async def go():
        nobody = RewardClient(["http://127.0.0.1:9"], patience_s=0.02, backoff_s=0.01)
        monkeypatch.setattr(reward_tts, "_client", None if "server_urls" in arguments else nobody)
        with pytest.raises((AttributeError, TypeError, RewardServerError)):  # raised if there is no failure file
            await reward_tts.compute_score("", **arguments)
        with pytest.raises(asyncio.TimeoutError):  # it never returns, and train.py stops the training
            await asyncio.wait_for(reward_tts.compute_score("", **arguments, failure_file=str(failure_file)), 2.0)
        await nobody.close()

    asyncio.run(go())
    assert reported in failure_file.read_text(encoding="utf-8")


def test_unscored_rollouts_are_counted_up_to_a_small_share(monkeypatch):
    """With at most 10%, and one more, the third of 12 rollouts that servers cannot score stops the training."""

    async def score(client, tokens, text, language):
        if tokens == [0]:
            raise UnscoredRolloutError("not finite")
        return RolloutScore(0.5, 0.1, "好", parts={"intelligibility": 0.5})

    monkeypatch.setattr(RewardClient, "score", score)
    monkeypatch.setattr(reward_tts, "_client", None)
    for name in ("_rollouts", "_unscored_rollouts"):
        monkeypatch.setattr(reward_tts, name, 0)

    def compute(tokens, **options):
        return asyncio.run(reward_tts.compute_score("", tokens, "好", **options))

    bad, good = "<|s_0|>", "<|s_1|>"
    results = [compute(tokens, max_unscored_share=0.1) for tokens in [good] * 9 + [bad] * 2]
    assert [r["unscored_rollout"] for r in results] == [r["bad_rollout"] for r in results] == [0.0] * 9 + [1.0] * 2
    assert [r["score"] for r in results[-3:]] == [0.5, 0.0, 0.0]
    with pytest.raises(
        RewardServerError, match="3 of 12 rollouts could not be scored, more than max_unscored_share=0.1"
    ):
        compute(bad, max_unscored_share=0.1)
    monkeypatch.setattr(reward_tts, "_unscored_rollouts", 0)
    with pytest.raises(RewardServerError, match="1 of 13 rollouts"):
        compute(bad)


def test_no_server_is_an_error_and_never_a_reward(rows):
    client = RewardClient(["http://127.0.0.1:9"], patience_s=0.05, backoff_s=0.01)
    (result,) = score_all(client, [(rows[0]["speech_tokens"], rows[0]["text"])])
    assert isinstance(result, RewardServerError)
    assert "no reward after" in str(result) and "bash run.sh 1 1" in str(result)


def test_an_unreachable_server_is_skipped(reward_server, rows):
    client = RewardClient(["http://127.0.0.1:9", reward_server.url], patience_s=0.05, backoff_s=0.01)
    pairs = [(row["speech_tokens"], row["text"]) for row in rows[:6]]
    assert score_all(client, pairs) == score_all(RewardClient([reward_server.url]), pairs)


def test_requests_are_sent_round_robin(monkeypatch):
    asked = []

    async def answer(self, url, *request):
        asked.append(url)

    monkeypatch.setattr(RewardClient, "_request", answer)
    urls = ["http://a:1", "http://b:1", "http://c:1"]
    score_all(RewardClient(urls), [([1], "好")] * 12)
    assert sorted(asked) == sorted(urls * 4)


def test_the_cause_of_a_failed_request_is_the_last_exception_of_the_servers_traceback():
    lines = ["Failed to process the request(s), message: TritonModelException: Model execute error: Traceback:"]
    lines += ["c_python_backend_utils.TritonModelException: Traceback (most recent call last):", *["  File x"] * 40]
    lines += [
        "token2wav_asr_server.BatchError: MemoryError: cuda:0 is full",
        "",
        "At:",
        "  /tmp/x/model.py(501): execute",
    ]
    assert cause(json.dumps({"error": "\n".join(lines)})) == lines[-4]
    assert cause('{"error": "Exceeds maximum queue size"}') == "Exceeds maximum queue size"
    assert cause("<html>Bad gateway</html>") == "<html>Bad gateway</html>"


class Servers:
    """Fakes of the client's requests: each answer is a score or an error, and each request is noted."""

    def __init__(self, monkeypatch, *answers):
        self.asked, answers = [], list(answers)

        async def answer(client, url, *request):
            self.asked.append(url)
            result = answers.pop(0)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(RewardClient, "_request", answer)


def test_a_rollout_that_one_server_cannot_score_is_tried_once_more_on_the_next(monkeypatch):
    bad, scored = SampleError("not finite"), RolloutScore(0.5, 0.2, "好")
    servers = Servers(monkeypatch, bad, scored, bad, bad)
    client = RewardClient(["http://a:1", "http://b:1"], patience_s=0)
    (result,) = score_all(client, [([1], "好")])
    assert (result.reward, result.attempts) == (0.5, 2) and servers.asked == ["http://a:1", "http://b:1"]
    (result,) = score_all(RewardClient(["http://a:1", "http://b:1"], patience_s=0), [([1], "好")])
    assert isinstance(result, UnscoredRolloutError) and "http://b:1: not finite; before that, http://a:1" in str(result)
    assert len(servers.asked) == 4


def test_an_answer_to_another_request_is_no_reward_and_the_request_is_sent_again(monkeypatch):
    scores = RolloutScore(0.5, 0.2, "好"), RolloutScore(1.0, 0.0, "不好")
    requests = ([1, 2], "好", "zh"), ([3], "不好", "en")
    tensors = encode_response(scores, "hash", requests)
    rows = [{n: [v.decode() for v in row] if row.dtype.kind == "S" else row.tolist()
             for n, row in ((n, tensor[i]) for n, tensor in tensors.items())} for i in (0, 1)]  # fmt: skip
    bodies = [{"outputs": [{"name": name, "data": data} for name, data in row.items()]} for row in rows]
    answers = [1, 0, 1]  # the first answer is that to the other request

    async def answer(client, url, body, *request):
        return decode_response(bodies[answers.pop(0)], *request)

    monkeypatch.setattr(RewardClient, "_request", answer)
    client = RewardClient(["http://a:1"], patience_s=5, backoff_s=0.01)
    first, second = (score_all(client, [request])[0] for request in requests)
    assert (first.reward, first.attempts, second.reward, second.attempts) == (0.5, 2, 1.0, 1)
    answers += [1] * 9
    (failed,) = score_all(RewardClient(["http://a:1"], patience_s=0), requests[:1])
    assert isinstance(failed, RewardServerError) and "not that to this request" in str(failed)


def test_a_server_that_computes_other_rewards_is_refused(monkeypatch, assets, tmp_path):
    """Whether it is another one of several, or the same address after a restart with other models."""
    first, other = (RolloutScore(0.5, 0.2, "好", server=name) for name in ("first", "other"))
    Servers(monkeypatch, first, other, first)
    results = score_all(RewardClient(["http://a:1", "http://b:1"]), [([1], "好")] * 3)
    assert results[0] == results[2] == first and isinstance(results[1], RewardServerError)
    assert "http://b:1 computes other rewards than http://a:1 does" in str(results[1])
    Servers(monkeypatch, first, other)
    results = score_all(RewardClient(["http://a:1"]), [([1], "好")] * 2)
    assert "http://a:1 computes other rewards than it did before" in str(results[1])
    shutil.copytree(assets / "asr_reward", tmp_path / "asr")
    flags = ["--token2wav-dir", str(assets / "token2wav"), "--asr-dir"]
    same = token2wav_asr_server.identity(get_args([*flags, str(assets / "asr_reward")]))
    assert token2wav_asr_server.identity(get_args([*flags, str(tmp_path / "asr")])) == same
    (tmp_path / "asr/am.mvn").write_text("other features")
    changed = [[*flags, str(tmp_path / "asr")]]
    changed += [
        [*flags, str(assets / "asr_reward"), *extra]
        for extra in (
            ["--no-tones"], ["--reward-curve", "exp"], ["--precision", "fp16"],
            ["--rewards", "intelligibility:2 pauses"], ["--more-asr-dirs", str(assets / "asr_eval")],
            ["--asr-pool", "worst"],
        )
    ]  # fmt: skip
    assert len({token2wav_asr_server.identity(get_args(arguments)) for arguments in changed} | {same}) == 8


def test_patience_begins_with_the_first_failure(monkeypatch):
    """The time that a request waited in the server's queue before it failed does not count."""
    asked = []

    async def slow_failure(client, url, *request):
        asked.append(url)
        await asyncio.sleep(0.3)
        raise TimeoutError("no answer")

    monkeypatch.setattr(RewardClient, "_request", slow_failure)
    (result,) = score_all(RewardClient(["http://a:1"], patience_s=0.2, backoff_s=0.01), [([1], "好")])
    assert len(asked) == 2 and "no reward after 2 attempts" in str(result)


def test_an_instance_that_is_closed_is_not_restarted(monkeypatch):
    """A batch that arrives while the server stops would start a process that nobody ends."""
    started = []

    def start(instance):
        started.append(instance)
        instance.pipe, other = multiprocessing.Pipe()
        other.close()
        instance.process = multiprocessing.get_context("spawn").Process(target=print)
        instance.process.start()

    monkeypatch.setattr(Instance, "_start", start)
    instance = Instance(get_args(["--token2wav-dir", "a", "--asr-dir", "b"]), "cpu")
    instance.close()
    with pytest.raises(RuntimeError, match="died at this batch"):
        instance.call("score", [[1]], ["好"])
    assert started == [instance] and instance.deaths == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_answers_what_is_in_flight_and_a_secret_is_needed(assets, tmp_path, rows, number, monkeypatch):
    """The server of the first case asks for a secret, that of the second one does not."""
    secret = tmp_path / "secret"
    secret.write_text("a-secret-of-25-characters\n")
    flags = ["--secret-file", str(secret)] if number == signal.SIGTERM else []
    server = RewardServer(assets, tmp_path / "log", *flags)
    server.wait_ready()
    if flags:
        for text in ("", "another-secret-of-that-sort"):
            (tmp_path / "wrong").write_text(text)
            monkeypatch.setenv(SECRET_FILE, str(tmp_path / "wrong") if text else "")
            (refused,) = score_all(RewardClient([server.url], patience_s=0), [([1, 2], "好")])
            assert isinstance(refused, RewardServerError) and "refused a request with status 40" in str(refused)
        monkeypatch.setenv(SECRET_FILE, str(secret))
    pairs = [(row["speech_tokens"], row["text"]) for row in rows] * 3

    async def go():
        client = RewardClient([server.url], patience_s=0)
        tasks = [asyncio.create_task(client.score(*pair)) for pair in pairs]
        while not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        server.process.send_signal(number)
        try:
            return await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await client.close()

    results = asyncio.run(go())
    assert server.process.wait(timeout=60) == 0, server.log.read_text()[-2000:]
    assert secret.read_text().strip() not in server.log.read_text()
    answered = [r for r in results if not isinstance(r, RewardServerError)]
    assert answered and all(scored.transcript for scored in answered)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url, timeout=5)


def kill_instance(server: RewardServer, number: int = signal.SIGKILL) -> None:
    """Kill the scoring process with SIGKILL, as the kernel does when memory runs out."""
    children = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(server.process.pid)], capture_output=True, text=True
    )
    (pid,) = [int(line.split()[0]) for line in children.stdout.splitlines() if "spawn_main" in line]
    os.kill(pid, number)


def test_a_dead_or_hung_instance_is_restarted_until_it_dies_too_often(assets, tmp_path, rows, monkeypatch):
    """The client waits for the restart, and then gets the same rewards as from a server that never failed."""
    server = RewardServer(assets, tmp_path / "log", "--batch-timeout-s", "20", patch="server.MAX_DEATHS = 2")
    server.wait_ready()
    pairs = [(row["speech_tokens"], row["text"]) for row in rows[:4]]
    before = score_all(RewardClient([server.url]), pairs)
    for number, message in ((signal.SIGKILL, "has died with code -9"), (signal.SIGSTOP, "hangs: it is killed")):
        kill_instance(server, number)
        assert score_all(RewardClient([server.url], patience_s=120), pairs) == before
        assert server.process.poll() is None and message in server.log.read_text()
    assert server.log.read_text().count("is ready again") == 2
    kill_instance(server)
    assert server.process.wait(timeout=60) == 1
    assert "instances have died 3 times; stopping" in server.log.read_text()


# The first two starts end as they do when a model is not connected to PyTriton within a second: while the models are
# bound, or, if PyTriton was not connected to Triton then, when it runs.
FAILS_TO_LOAD_TWICE = """
from pytriton.triton import Triton

def fails_once(method):
    failed = []

    def patched(*args, **kwargs):
        method(*args, **kwargs)
        if not failed:
            failed.append(True)
            raise TimeoutError("Timeout occurred while waiting for config file")

    return patched

Triton.bind, Triton.run = fails_once(Triton.bind), fails_once(Triton.run)
"""


def test_triton_is_started_again_if_it_ends_or_does_not_load_the_models(assets, tmp_path, rows):
    server = RewardServer(assets, tmp_path / "log", "--instances", "2", patch=FAILS_TO_LOAD_TWICE)
    try:
        server.wait_ready()
        pairs = [(row["speech_tokens"], row["text"]) for row in rows[:16]]
        before = score_all(RewardClient([server.url]), pairs)
        children = subprocess.run(["ps", "--ppid", str(server.process.pid), "-o", "pid=,comm="], capture_output=True,
                                  text=True, check=True).stdout.splitlines()  # fmt: skip
        (triton,) = (int(line.split()[0]) for line in children if "tritonserver" in line)
        threading.Timer(0.3, os.kill, (triton, signal.SIGKILL)).start()
        after = [score_all(RewardClient([server.url], patience_s=120, max_backoff_s=0.5), pairs) for _ in range(3)]
        assert after == [before] * 3 and max(score.attempts for scores in after for score in scores) > 1
        log = server.log.read_text()
        assert log.count("Triton has not loaded the models") == 2 and log.count("Triton has ended") == 3
    finally:
        status = server.stop()
    assert status == 0


# Rollouts are told apart by their first token: 11 fails in a batch with others, 12 fails once alone, 13 hangs once, and
# 14 takes a second.
FAULTS = """
import time
from pathlib import Path
from tts_grpo.reward.scorer import RewardScorer

def first(name):
    seen = Path(name).exists()
    Path(name).touch()
    return not seen

def score(self, speech_tokens, *texts, scored=RewardScorer._score):
    ids = {tokens[0] for tokens in speech_tokens}
    if 11 in ids and len(ids) > 1:
        Path("split").touch()
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: injected")
    if 12 in ids and first("memory"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: injected")
    if 13 in ids and first("hang"):
        time.sleep(3600)
    if 14 in ids:
        time.sleep(1)
    return scored(self, speech_tokens, *texts)

RewardScorer._score = score
"""


def test_faults_of_the_machine_change_no_reward_and_changed_models_are_noticed(assets, tmp_path, rows):
    flags = ["--batch-timeout-s", "6", "--max-queue-delay-ms", "300", "--max-queue-size", "4"]
    shutil.copytree(assets / "asr_reward", tmp_path / "asr_reward")
    (tmp_path / "token2wav").symlink_to(assets / "token2wav")
    server = RewardServer(tmp_path, tmp_path / "log", *flags, patch=FAULTS)
    server.wait_ready()
    pairs = [([first, *row["speech_tokens"][1:]], row["text"]) for first, row in zip((10, 11, 12, 13), rows)]
    try:
        together = score_all(RewardClient([server.url], patience_s=120), pairs[:2])
        assert (tmp_path / "split").exists()
        (failed,) = score_all(RewardClient([server.url], patience_s=0), pairs[2:3])
        assert "status 500" in str(failed) and "can't allocate memory: injected" in str(failed)
        later = score_all(RewardClient([server.url], patience_s=120), pairs[2:])
        assert later[1].attempts > 1 and server.log.read_text().count("is ready again") == 1
        again = [score_all(RewardClient([server.url], patience_s=0), [pair])[0] for pair in pairs]
        assert [*together, *later] == again

        slow = [([14, *row["speech_tokens"][1:]], row["text"]) for row in rows[:12] * 2]  # in batches of 8
        served = score_all(RewardClient([server.url], patience_s=0), slow)
        refused = [result for result in served if isinstance(result, RewardServerError)]
        assert refused and all("Exceeds maximum queue size" in str(result) for result in refused)
        served = score_all(RewardClient([server.url], patience_s=300, max_backoff_s=1.0), slow)
        assert served[:12] == served[12:] and max(score.attempts for score in served) > 1

        async def score_before_and_after_a_change():
            client = RewardClient([server.url], patience_s=120)
            await client.score(*pairs[0])
            (tmp_path / "asr_reward/another_file").touch()
            kill_instance(server)
            try:
                return await client.score(*pairs[0])
            finally:
                await client.close()

        with pytest.raises(RewardServerError, match="computes other rewards than it did before"):
            asyncio.run(score_before_and_after_a_change())
    finally:
        server.stop()


def test_a_signal_while_it_loads_ends_the_server(assets, tmp_path):
    server = RewardServer(assets, tmp_path / "log")
    end = time.monotonic() + 60
    while not subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True).stdout:
        assert time.monotonic() < end and server.process.poll() is None, server.log.read_text()
        time.sleep(0.02)
    assert server.stop() == 1 and "stopped while loading" in server.log.read_text()


def test_a_taken_port_is_named_before_anything_is_loaded(assets, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, str(ROOT / "token2wav_asr_server.py"), "--token2wav-dir", str(tmp_path), "--asr-dir",
                   str(tmp_path), "--metrics-port", str(port), "--http-port", "0", "--grpc-port", "0"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"process {os.getpid()}" in done.stderr
    assert f"metrics_port {port}: Address already in use" in done.stderr
    assert "no token2wav model found" not in done.stderr


def run_instance(monkeypatch, score) -> list:
    """Run an instance's loop on one batch, with a fake of the scorer; returns what it sent after its ready message."""
    scorer = types.SimpleNamespace(score=score)
    monkeypatch.setattr(token2wav_asr_server, "load_scorer", lambda *_: scorer)
    monkeypatch.setattr(token2wav_asr_server, "warm_up", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "disable", lambda *_: None)
    batches = iter([("score", [[1]], ["好"])])
    sent = []

    def receive():
        try:
            return next(batches)
        except StopIteration:
            raise EOFError from None

    pipe = types.SimpleNamespace(recv=receive, send=sent.append)
    token2wav_asr_server.serve_instance(
        pipe, types.SimpleNamespace(threads=1, max_batch_size=1, known_answers=None, language="zh"), "cpu"
    )
    assert sent[0] == ""
    return sent[1:]


def test_an_instance_that_loses_its_cuda_context_exits(monkeypatch):
    """Otherwise every later sample would fail. A process that has ended is restarted."""

    def failing(message: str):
        def score(*_):
            raise RuntimeError(message)

        return score

    for message in ("CUDA error: device-side assert triggered", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"):
        assert run_instance(monkeypatch, failing(message)) == []
    assert len(run_instance(monkeypatch, failing("CUDA out of memory"))) == 1
    scored = types.SimpleNamespace(error="")
    assert run_instance(monkeypatch, lambda *_: [scored]) == [[scored]]


def test_an_instance_that_is_not_ready_in_time_is_killed():
    """Otherwise the message that it is ready could be taken for the answer to a batch later."""
    ended = []
    instance = object.__new__(token2wav_asr_server.Instance)
    instance.pipe = types.SimpleNamespace(poll=lambda _: False)
    instance.process = types.SimpleNamespace(kill=lambda: ended.append("killed"), join=lambda: ended.append("ended"))
    with pytest.raises(RuntimeError, match="could not start: not ready after 1 s"):
        instance.wait_ready(1.0)
    assert ended == ["killed", "ended"]


def test_an_instance_does_not_keep_the_kernels_of_all_shapes(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    run_instance(monkeypatch, lambda *_: [])
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def test_too_little_memory_for_a_batch_is_not_an_answer(monkeypatch):
    """Triton answers such a batch with status 500, and the client sends it again."""

    def score(*_):
        raise MemoryError("cuda:0 is full")

    (sent,) = run_instance(monkeypatch, score)
    assert isinstance(sent, token2wav_asr_server.BatchError) and "MemoryError: cuda:0 is full" in str(sent)
    instance = object.__new__(token2wav_asr_server.Instance)
    instance.lock, instance.args = threading.Lock(), types.SimpleNamespace(batch_timeout_s=1.0)
    instance.pipe = types.SimpleNamespace(send=lambda _: None, poll=lambda _: True, recv=lambda: sent)
    with pytest.raises(token2wav_asr_server.BatchError, match="cuda:0 is full"):
        instance.call("score", [[1]], ["好"])


def test_a_broken_model_folder_is_named_at_start(assets, tmp_path):
    command = [sys.executable, str(ROOT / "token2wav_asr_server.py"), "--token2wav-dir", str(tmp_path), "--asr-dir",
               str(assets / "asr_reward")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no token2wav model found" in done.stderr


def test_an_instance_on_a_second_gpu_makes_it_the_current_one(monkeypatch):
    """CUDA graphs can only be captured on the current GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("tts_grpo.speech.token2wav.load_token2wav", lambda *_: pytest.fail(f"on {chosen}"))
    args = get_args(["--token2wav-dir", "x", "--asr-dir", "y", "--devices", "cuda:1"])
    with pytest.raises(pytest.fail.Exception, match="cuda:1"):
        load_scorer(args, args.devices[0])


def test_other_machines_are_served_only_with_a_secret(tmp_path, capsys):
    flags = ["--token2wav-dir", "x", "--asr-dir", "y", "--address"]
    for address in ("127.0.0.1", "::1", "localhost"):
        assert get_args([*flags, address]).secret is None
    (tmp_path / "short").write_text("0123456789")
    for extra, message in (([], "needs --secret-file"), (["--secret-file", str(tmp_path / "short")], "at least 16"),
                           (["--secret-file", str(tmp_path / "none")], "No such file")):  # fmt: skip
        with pytest.raises(SystemExit):
            get_args([*flags, "0.0.0.0", *extra])
        assert message in capsys.readouterr().err
