#!/usr/bin/env python3
"""Reward function for veRL: the transcript of a rollout's speech is compared with the reference text.

veRL calls :func:`compute_score` (``reward.custom_reward_function.path=reward_tts.py``). As a program, it scores a JSONL
with ``text`` and ``speech_tokens`` on a running server. With ``--check`` it runs a known-answer check of the server:
in each language, speech tokens must score high against their own text and low against another text, and a text that the
file also has with digits (``written``) must score about as high as in words.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import logging
import random
from pathlib import Path

from tts_grpo.reward.client import RewardClient, RewardServerError, UnscoredRolloutError
from tts_grpo.reward.protocol import PART_KEY, ROLLOUT_COUNTS, SERVER_KEY, RolloutScore
from tts_grpo.reward.rewards import DEFAULT as DEFAULT_REWARDS
from tts_grpo.reward.rewards import parse_rewards
from tts_grpo.text.input_files import LANGUAGES, read_known_answers
from tts_grpo.text.jsonl import write_jsonl, write_text
from tts_grpo.text.tokens import parse_speech_tokens
from tts_grpo.training import credit

logger = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8000"
CHECK_BOUNDS = (0.6, 0.2)  # bounds on the mean reward: at least, for right texts; at most, for wrong texts
MAX_WRITTEN_LOSS = 0.05  # largest loss of mean reward if texts have digits instead of words

_client: RewardClient | None = None
_bad_rollouts = _unscored_rollouts = _rollouts = 0  # of this worker


async def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, server_urls=DEFAULT_URL, failure_file=None,
    by_syllable=False, patience_s=180.0, max_unscored_share=0.0, rewards=DEFAULT_REWARDS, language="zh", **_
):  # fmt: skip
    """Score one rollout.

    Args:
        data_source: data source of the sample; not used.
        solution_str: the response as text, with ``<|s_N|>`` for each speech token.
        ground_truth: the reference text.
        extra_info: further data of the sample: the ``language`` of its text; and the response continues the speech
            tokens in ``speech_prefix``, if any (speech_prefix=recording): they are decoded and transcribed together.
        server_urls: URLs of the reward servers, separated by commas or spaces.
        failure_file: file to which every exception is reported. scripts/train.py watches it and stops the training at
            once; veRL itself would log the exception and let the other rollouts finish.
        patience_s: time in seconds for which failed requests are retried before the training is stopped.
        by_syllable: whether to return the losses of each syllable too, for tts_grpo/training/credit.py.
        max_unscored_share: largest share of this worker's rollouts that servers may fail to score although they score
            others; one more is allowed. Each of these is counted, and scores 0 like a bad one. With 0, the first one
            stops the training.
        rewards: the setting ``rewards``, with the parts that the server's rewards must have.
        language: language of samples whose ``extra_info`` has none.

    Returns:
        ``score`` in [0, 1]; for the metrics, ``pinyin_error_rate``, ``num_speech_tokens``, the numbers of
        ``ROLLOUT_COUNTS``, and ``reward_parts/NAME`` for each part of the reward; ``reward_server``, the hash that the
        server sent, or "" for a rollout without an answer; and ``syllable_losses`` with ``by_syllable``. A rollout
        without speech tokens, or with an id outside the codebook, is given a score of 0, also for each part, and counts
        as bad.

    Raises:
        Exception: any error that prevented a reward, if there is no ``failure_file``. With one, the error is reported
            there and the call never returns.
    """
    try:
        prefix = (extra_info or {}).get("speech_prefix")
        prefix = [] if prefix is None else [int(token) for token in prefix]
        language = (extra_info or {}).get("language") or language
        return await _score(
            solution_str, prefix, ground_truth, language, server_urls, by_syllable, patience_s, max_unscored_share,
            rewards,
        )  # fmt: skip
    except Exception as error:
        if failure_file is None:
            raise
        await _stop_training(error, ground_truth, failure_file)


@functools.cache
def _part_names(rewards: str) -> tuple[str, ...]:
    return tuple(spec.name for spec in parse_rewards(rewards))


async def _score(
    solution_str: str, prefix: list[int], ground_truth: str, language: str, server_urls: str, by_syllable: bool,
    patience_s: float, max_share: float, rewards: str,
) -> dict[str, float | str]:  # fmt: skip
    global _client, _rollouts, _unscored_rollouts
    _rollouts += 1
    names = _part_names(rewards)
    try:
        speech_tokens = parse_speech_tokens(solution_str)
    except ValueError as error:
        return _bad_rollout(str(error), ground_truth, by_syllable, names)
    if not speech_tokens:
        return _bad_rollout("no speech tokens", ground_truth, by_syllable, names)
    if _client is None:
        _client = RewardClient(server_urls.replace(",", " ").split(), patience_s=patience_s)
    try:
        score = await _client.score([*prefix, *speech_tokens], ground_truth, language)
        if set(score.parts) != set(names):
            raise RewardServerError(
                f"the reward server's reward has the parts {', '.join(score.parts)}, this training's "
                f"{', '.join(names)}: start the server with the same setting rewards"
            )
        # syllables that begin in the prefix have negative positions in the response
        score = dataclasses.replace(score, unit_starts=tuple(start - len(prefix) for start in score.unit_starts))
        return _result(score, len(speech_tokens), by_syllable)
    except UnscoredRolloutError as error:
        _unscored_rollouts += 1
        if max_share == 0 or _unscored_rollouts > 1 + max_share * _rollouts:
            raise RewardServerError(
                f"{_unscored_rollouts} of {_rollouts} rollouts could not be scored, more than max_unscored_share="
                f"{max_share} allows; the last, for {ground_truth!r}: {error}. Mend the cause, or allow a larger "
                "share; the same command then resumes from the last checkpoint"
            ) from error
        logger.warning("unscored rollout %d of %d scores 0: %s", _unscored_rollouts, _rollouts, error)
        score = RolloutScore(0.0, 1.0, parts=dict.fromkeys(names, 0.0))
        return _result(score, len(speech_tokens), by_syllable, bad_rollout=1.0, unscored_rollout=1.0)


async def _stop_training(error: Exception, ground_truth: str, failure_file: str) -> None:
    """Report the failure and never return, so that the model is not trained on a step with missing rewards."""
    reason = str(error)
    if not isinstance(error, RewardServerError):  # an error in this program, whose message needs context
        reason = f"the reward of {ground_truth!r} failed with {type(error).__name__}: {error}"
    logger.error("stopping the training: %s", reason, exc_info=error)
    write_text(failure_file, f"{reason}\n")
    await asyncio.Event().wait()


def _bad_rollout(
    reason: str, ground_truth: str, by_syllable: bool, names: tuple[str, ...]
) -> dict[str, float | str]:  # fmt: skip
    global _bad_rollouts
    _bad_rollouts += 1
    logger.warning("bad rollout %d of this worker (%s) for %r scores 0", _bad_rollouts, reason, ground_truth[:40])
    return _result(RolloutScore(0.0, 1.0, parts=dict.fromkeys(names, 0.0)), 0, by_syllable, bad_rollout=1.0)


def _result(score: RolloutScore, num_speech_tokens: int, by_syllable: bool, **counts: float) -> dict[str, float | str]:
    """Return the result for veRL: numbers, which become metrics, and texts for the trainer."""
    result = {
        "score": score.reward,
        "pinyin_error_rate": score.error_rate,
        "num_speech_tokens": float(num_speech_tokens),
        **dict.fromkeys(ROLLOUT_COUNTS, 0.0),
        "retried_rollout": float(score.attempts > 1),
        "rescored_rollout": float(score.rescored),
        "empty_transcript": float(not score.transcript.strip()),
        **counts,
        **{PART_KEY + name: value for name, value in score.parts.items()},
        SERVER_KEY: score.server,
    }
    return result | ({credit.KEY: credit.encode(score.unit_losses, score.unit_starts)} if by_syllable else {})


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jsonl", type=Path, required=True, help="lines with text and speech_tokens")
    parser.add_argument("--server-urls", default=DEFAULT_URL, help="reward servers, separated by commas or spaces")
    parser.add_argument("--limit", type=int, default=None, help="maximum number of lines to score, of each language")
    parser.add_argument("--language", choices=LANGUAGES, default="zh", help="language of lines without one")
    parser.add_argument("--patience-s", type=float, default=10.0, help="seconds for which failed requests are retried")
    parser.add_argument(
        "--check", action="store_true", help="known-answer check: right texts must score high, wrong ones low"
    )
    parser.add_argument("--train-parquet", type=Path, default=None, help="stage 0's training data; with --check, the "
                        "lines must have each of its languages")  # fmt: skip
    parser.add_argument("--output", type=Path, default=None, help="also write a JSONL with each line's score here")
    args = parser.parse_args(argv)
    if args.check and args.output:
        parser.error("--check and --output exclude each other")
    return args


async def score_rows(args, rows: list[dict], texts: list[str]) -> list:
    """Score the speech tokens of rows against ``texts``, in the languages of the rows."""
    client = RewardClient(args.server_urls.replace(",", " ").split(), patience_s=args.patience_s)
    try:
        pairs = zip(rows, texts, strict=True)
        return await asyncio.gather(*(client.score(row["speech_tokens"], text, row["language"]) for row, text in pairs))
    finally:
        await client.close()


def mean_reward(scores) -> float:
    return sum(scored.reward for scored in scores) / len(scores)


def mean_of_words(scores) -> float:
    """Mean score of the part that hears the words: other parts, such as the pitch, hardly depend on the text."""
    return sum(scored.parts.get("intelligibility", scored.reward) for scored in scores) / len(scores)


def known_answer_check(right: float, wrong: float, written_loss: float = 0.0) -> str | None:
    """Return why a reward server fails the known-answer check, or None if it passes.

    Args:
        right: mean reward for the right texts.
        wrong: mean reward for wrong texts.
        written_loss: loss of mean reward if texts have digits instead of words.
    """
    least, most = CHECK_BOUNDS
    if written_loss > MAX_WRITTEN_LOSS:
        return (
            f"texts written with digits have a mean reward {written_loss:.3f} lower than in words, expected at most "
            f"{MAX_WRITTEN_LOSS}: does the server run this version, with the same language?"
        )
    if right < least:
        return f"speech of the right texts has a mean reward of {right:.3f}, expected at least {least}"
    if wrong > most:
        return f"speech of wrong texts has a mean reward of {wrong:.3f}, expected at most {most}"
    return None


def lost_by_digits(args, rows: list[dict], scores: list) -> float:
    """Return the loss of mean reward with the texts in ``written``; 0 if no line has that key."""
    pairs = [(row, scored) for row, scored in zip(rows, scores, strict=True) if row.get("written")]
    if not pairs:
        return 0.0
    again = asyncio.run(score_rows(args, [row for row, _ in pairs], [row["written"] for row, _ in pairs]))
    return mean_of_words([scored for _, scored in pairs]) - mean_of_words(again)


def check_server(rows: list[dict], url: str, patience_s: float) -> dict[str, float | str]:
    """Run the known-answer check on one server, with rows of one language.

    Right and wrong texts are sent in random order, so that answers which are given to other requests are noticed.

    Returns:
        Mean rewards for the right and for wrong texts (of the part intelligibility, if there is one), what texts with
        digits lose, and the hash that the server sends.

    Raises:
        RewardServerError: the server does not answer, or fails the check.
    """
    args = argparse.Namespace(server_urls=url, patience_s=patience_s)
    texts = [row["text"] for row in rows]
    pairs = list(enumerate(zip(rows * 2, texts + texts[1:] + texts[:1], strict=True)))
    random.Random(0).shuffle(pairs)
    places, pairs = zip(*pairs, strict=True)
    shuffled = asyncio.run(score_rows(args, *map(list, zip(*pairs, strict=True))))
    scores = [score for _, score in sorted(zip(places, shuffled, strict=True), key=lambda placed: placed[0])]
    right, wrong = scores[: len(rows)], scores[len(rows) :]
    means = {
        "mean_reward": mean_of_words(right),
        "mean_reward_of_wrong_texts": mean_of_words(wrong),
        "lost_by_digits": lost_by_digits(args, rows, right),
    }
    if fault := known_answer_check(*means.values()):
        raise RewardServerError(f"known-answer check of {url} failed in language {rows[0]['language']}: {fault}")
    return means | {"server_hash": right[0].server}


def check_servers(rows: list[dict], server_urls: str, patience_s: float) -> list[dict[str, float | str]]:
    """Run the known-answer check on each server, in each language.

    Args:
        rows: known answers, see :func:`load_rows`.
        server_urls: URLs of the servers, separated by commas or spaces.
        patience_s: time in seconds for which failed requests are retried.

    Returns:
        For each server and language, its URL as ``server``, the ``language``, the number of ``samples``, and the result
        of :func:`check_server`.

    Raises:
        RewardServerError: a server does not answer, fails the check, or computes other rewards than the first one.
    """
    urls = server_urls.replace(",", " ").split()
    results = [
        {"server": url, "language": language, "samples": len(own)} | check_server(own, url, patience_s)
        for url in urls
        for language, own in by_language(rows).items()
    ]
    for result in results:
        if result["server_hash"] != results[0]["server_hash"]:
            raise RewardServerError(
                f"{result['server']} computes other rewards than {urls[0]}: its models, voices, curve, tones "
                "or precision differ. Start the same server everywhere"
            )
    return results


def by_language(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of each language."""
    return {name: [row for row in rows if row["language"] == name] for name in sorted({r["language"] for r in rows})}


def load_rows(path: Path, limit: int | None, language: str = "zh") -> list[dict]:
    """Read the lines to score.

    Args:
        path: a file of known answers.
        limit: largest number of lines of each language.
        language: language of lines without one.

    Raises:
        SystemExit: there are fewer than two lines of a language, or a line has no text or no speech tokens.
    """
    try:
        rows = read_known_answers(path, limit, language)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward_tts.py: {error}") from error
    for name, own in by_language(rows).items():
        if len(own) < 2:
            raise SystemExit(f"reward_tts.py: {path}: needs at least two lines in language {name}")
    return rows


def check_languages(rows: list[dict], known_answers: Path, train_parquet: Path) -> None:
    """Check that there are known answers in each language of the training data.

    Raises:
        SystemExit: a language has none.
    """
    import pyarrow.parquet as pq

    texts = pq.ParquetFile(train_parquet).read(columns=["extra_info.language"])["extra_info"]
    languages = {info["language"] for info in texts.to_pylist()}
    if missing := sorted(languages - by_language(rows).keys()):
        raise SystemExit(
            f"reward_tts.py: {known_answers} has no line in language {missing[0]}, in which there are training texts: "
            "add real speech in it to known_answer_jsonl, or set check_reward=0"
        )


def main(argv=None):
    args = get_args(argv)
    rows = load_rows(args.jsonl, args.limit, args.language)
    if args.check and args.train_parquet:
        check_languages(rows, args.jsonl, args.train_parquet)
    try:
        if args.check:
            for result in check_servers(rows, args.server_urls, args.patience_s):
                print(json.dumps(result))
        else:
            scores = asyncio.run(score_rows(args, rows, [row["text"] for row in rows]))
            print(json.dumps({"samples": len(rows), "mean_reward": mean_reward(scores)}))
    except RewardServerError as error:
        raise SystemExit(f"reward_tts.py: {error}") from None
    if args.output:
        write_jsonl(args.output, (row | vars(scored) for row, scored in zip(rows, scores, strict=True)))


if __name__ == "__main__":
    main()
