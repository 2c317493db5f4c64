"""Error rate protocols: how texts are split into units, and how utterances are averaged.

All protocols of a language score the same transcripts, so that their error rates can be compared. Before scoring, the
hypotheses of a Chinese set are converted to simplified characters (``zhconv``, zh-cn).

``seed-tts-eval``
    Source: github.com/BytedanceSpeech/seed-tts-eval, run_wer.py and average_wer.py at commit 95003fe. The characters of
    ``zhon.hanzi.punctuation`` and ``string.punctuation``, except the apostrophe, are removed from both texts. Chinese:
    a unit is a character, spaces are ignored, and differences in case or width are errors. English: a unit is a word in
    lower case. The rate is the MEAN OVER UTTERANCES of errors / units, all utterances weighted equally (macro).
    ASR models: paraformer-zh through funasr; whisper-large-v3 for English.
``cv3-eval``
    Source: github.com/FunAudioLLM/CV3-Eval, utils/run_wer.py at commit f3b7ed5. It is derived from the file above and
    has the same text rules, hence the same error rate for the same transcripts. Only the use of Whisper differs
    (openai-whisper with the language passed). The file does not average; we average as seed-tts-eval, whose output
    format it writes.
``cer``, the protocol ``micro`` (``wer`` for English)
    The rate is total errors over total units. Chinese follows github.com/FunAudioLLM/CosyVoice,
    examples/grpo/cosyvoice2/scripts/offline-decode-files.py at commit 62d0826, and the original recipe's script. Spaces
    and the punctuation above are removed, letters become upper case, and full-width letters become ASCII (those
    scripts convert some of them by hand; here NFKC does). Those scripts normalise the reference only, so that English
    letters, which Paraformer writes in lower case and after a space, are errors; here both texts are normalised.
    WeNet's compute-wer.py, which later versions of the original recipe also run, differs again: a run of letters or
    digits is one unit. All three agree on Chinese characters. ASR model of those scripts:
    sherpa-onnx-paraformer-zh-2023-09-14. English: the units are the words of seed-tts-eval.
``spoken``
    This recipe's own protocol. Both texts are converted to words (tts_grpo/text/spoken.py). Of the accepted readings of
    a number, the one with the fewest errors counts. A unit is a Chinese character or an English word. The rate is total
    errors over total units of the usual reading. The protocols above compare written forms, so that a correct reading
    of "50%" consists of errors only.
``pinyin_error_rate``, ``pinyin_error_rate_toneless``
    These are like ``spoken``, but Chinese is compared by syllable, with or without tones, so that homophones are not
    errors. The reward is computed from one of them. Chinese, which may contain English words.
``mer`` (mixed error rate)
    For sets with texts in several languages, whose key ``language`` differs. As in published work on code-switching
    (github.com/wenet-e2e/wenet, tools/compute-wer.py, with --char=1), a unit is a Chinese character or a run of other
    letters and digits, in NFKC and lower case. The rate is total errors over total units. ``spoken`` and the pinyin
    error rates are computed over all texts, too, and the metrics above over those of each language (``cer_zh``,
    ``wer_en``).

One rule of ours applies to all protocols: an utterance without usable audio has an empty hypothesis, so that all its
units are deletions and its error rate is 100%. The published scripts omit such utterances, so that failing on difficult
utterances improves the score.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import jiwer
import numpy as np
import zhconv
from zhon import hanzi

from tts_grpo.text.errors import ErrorCounts, align_texts
from tts_grpo.text.units import sentence

_PUNCTUATION = str.maketrans("", "", (hanzi.punctuation + string.punctuation).replace("'", ""))
_CHINESE_PUNCTUATION = str.maketrans(dict.fromkeys(hanzi.punctuation, " "))
_QUOTE = re.compile("(?<![A-Za-z])['’]|['’](?![A-Za-z])")  # an apostrophe stands between letters
_MIXED_UNIT = re.compile(r"[㐀-䶿一-鿿]|[^\s㐀-䶿一-鿿]+")
_BETWEEN_CHINESE = re.compile(r"(?<=[㐀-䶿一-鿿])\s+(?=[㐀-䶿一-鿿])")


@dataclass(frozen=True)
class Metric:
    """One error rate of one protocol.

    Attributes:
        title: name of the metric in tables.
        macro: whether the rate is the mean over utterances; otherwise it is total errors over total units.
        units: function that splits a text into units, for the published protocols.
        match: how units are compared in our protocols, see :func:`tts_grpo.text.errors.align_sentences`.
        language: language of the utterances that it is computed over; empty: all.
    """

    title: str
    macro: bool
    units: Callable[[str], list[str]] | None = None
    match: str = ""
    language: str = ""

    def applies(self, language: str) -> bool:
        """Return whether it is computed for an utterance in a language."""
        return self.language in ("", language)

    @property
    def mean(self) -> str:
        return "macro" if self.macro else "micro"


def seed_characters(text: str) -> list[str]:
    """Split a text into characters, without punctuation and spaces."""
    return [c for c in text.translate(_PUNCTUATION) if not c.isspace()]


def seed_words(text: str) -> list[str]:
    """Split a text into words in lower case, without punctuation except apostrophes."""
    text = re.sub(r"\s\s+", " ", text.translate(_PUNCTUATION).lower()).strip()
    return text.split(" ") if text else []


def micro_characters(text: str) -> list[str]:
    """Split a text into characters, without punctuation and spaces, in NFKC and upper case."""
    return seed_characters(unicodedata.normalize("NFKC", text).upper())


def mixed_units(text: str) -> list[str]:
    """Split a text into Chinese characters and words, without punctuation except apostrophes, in NFKC, lower case.

    Chinese punctuation, which has no space after it, separates words. A typographic apostrophe is one, too, and single
    quotes are punctuation.
    """
    text = _QUOTE.sub(" ", text).replace("’", "'")
    text = unicodedata.normalize("NFKC", text.translate(_CHINESE_PUNCTUATION))
    return _MIXED_UNIT.findall(text.translate(_PUNCTUATION).lower())


METRICS = {
    "zh": {
        "seed-tts-eval": Metric("seed-tts-eval CER", True, seed_characters),
        "cv3-eval": Metric("cv3-eval CER", True, seed_characters),
        "cer": Metric("micro CER", False, micro_characters),
        "spoken": Metric("spoken-form CER", False, match="written"),
        "pinyin_error_rate": Metric("pinyin error rate", False, match="toned"),
        "pinyin_error_rate_toneless": Metric("pinyin error rate, toneless", False, match="toneless"),
    },
    "en": {
        "seed-tts-eval": Metric("seed-tts-eval WER", True, seed_words),
        "cv3-eval": Metric("cv3-eval WER", True, seed_words),
        "wer": Metric("micro WER", False, seed_words),
        "spoken": Metric("spoken-form WER", False, match="written"),
    },
}
MIXED = "mixed"  # language of a set whose texts are in several languages
METRICS[MIXED] = {
    f"{name}_{language}": replace(metric, title=f"{metric.title}, {language}", language=language)
    for language, metrics in METRICS.items()
    for name, metric in metrics.items()
} | {
    "mer": Metric("micro MER", False, mixed_units),
    "spoken": Metric("spoken-form MER", False, match="written"),
    "pinyin_error_rate": Metric("mixed error rate by pinyin", False, match="toned"),
    "pinyin_error_rate_toneless": Metric("mixed error rate by pinyin, toneless", False, match="toneless"),
}
MAIN_METRIC = {"zh": "cer", "en": "wer", MIXED: "mer"}  # the metric whose units the alignments use
SET_METRICS = {  # rows of tables of several sets
    "zh": ("seed-tts-eval", "cer"), "en": ("seed-tts-eval", "wer"), MIXED: ("mer", "cer_zh", "wer_en"),
}  # fmt: skip


def set_language(languages: Iterable[str]) -> str:
    """Return the language of a set, by those of its texts: a key of ``METRICS``."""
    found = set(languages)
    return found.pop() if len(found) == 1 else MIXED


def prepare_hypothesis(text: str, language: str) -> str:
    """Prepare a transcript for all metrics of the language.

    Chinese characters are converted to simplified ones. Spaces between them, which Paraformer writes, are removed,
    because pinyin depends on words.
    """
    return _BETWEEN_CHINESE.sub("", zhconv.convert(text, "zh-cn")) if language == "zh" else text


def align_units(reference: Sequence[str], hypothesis: Sequence[str]) -> jiwer.WordOutput:
    """Align two sequences of units with jiwer, with the fewest edits."""
    return jiwer.process_words(" ".join(reference), " ".join(hypothesis))


def count_all(target_text: str, hypothesis: str, language: str, of_set: str = "") -> dict[str, ErrorCounts]:
    """Count the errors of one utterance for each metric.

    Args:
        target_text: the reference text.
        hypothesis: the transcript, as returned by :func:`prepare_hypothesis`; "" if there is no audio.
        language: language of the text, one of :data:`tts_grpo.text.input_files.LANGUAGES`.
        of_set: language of the set, a key of ``METRICS``; by default, that of the text.

    Raises:
        ValueError: the target text has no unit for a metric, so that its error rate is undefined.
    """
    counts = {}
    for name, metric in METRICS[of_set or language].items():
        if not metric.applies(language):
            continue
        reference = metric.units(target_text) if metric.units else sentence(target_text, language).units
        if not reference:
            raise ValueError(f"{target_text!r} has no unit for {metric.title}: remove the utterance from the set")
        if metric.units:
            found = align_units(reference, metric.units(hypothesis))
            counts[name] = ErrorCounts(found.substitutions, found.deletions, found.insertions, len(reference))
        else:
            counts[name] = align_texts(target_text, hypothesis, metric.match, language).counts
    return counts


def pool(counts: Iterable[ErrorCounts], macro: bool) -> tuple[float, ErrorCounts]:
    """Return the error rate of several utterances, and their summed counts."""
    counts = list(counts)
    total = sum(counts, ErrorCounts())
    return (float(np.mean([c.rate for c in counts])) if macro else total.rate), total
