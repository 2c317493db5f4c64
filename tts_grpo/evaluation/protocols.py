"""Protocols of error rates: how two texts become units, and how utterances become one figure.

One set of transcripts is scored by all protocols of its language, so that the figures stand side by side. Before any
of them, the hypothesis of a Chinese set is converted to simplified characters (``zhconv``, zh-cn).

``seed-tts-eval``
    github.com/BytedanceSpeech/seed-tts-eval, run_wer.py and average_wer.py at commit 95003fe. Removed from both texts
    are the characters of ``zhon.hanzi.punctuation`` and ``string.punctuation``, except the apostrophe. Chinese: a unit
    is a character, spaces are none, case and full-width letters count. English: a unit is a word, in lower case. The
    rate is the MEAN OVER UTTERANCES of errors / units, each utterance counting alike (macro).
    Recognisers: paraformer-zh through funasr; whisper-large-v3 for English.
``cv3-eval``
    github.com/FunAudioLLM/CV3-Eval, utils/run_wer.py at commit f3b7ed5: made from the file above, with the same rules
    for the text, hence the same figure from the same transcripts. What differs is how Whisper is run (openai-whisper,
    told the language). Its averaging is not in that file: taken as seed-tts-eval's, whose output format it writes.
``cer``, the protocol ``micro`` (``wer`` for English)
    Total errors over total units. Chinese: after github.com/FunAudioLLM/CosyVoice,
    examples/grpo/cosyvoice2/scripts/offline-decode-files.py at commit 62d0826, and the original recipe's. Spaces and
    the punctuation above are removed, letters made upper case, full-width letters ASCII (there some of them by hand,
    here by NFKC). There that is done to the reference only, so that English letters, which Paraformer writes in lower
    case and after a space, are errors: here it is done to both texts. WeNet's compute-wer.py, which later versions of
    the original recipe run as well, is a third way: a run of letters or digits is one unit. All three agree on Chinese
    characters. Recogniser there: sherpa-onnx-paraformer-zh-2023-09-14. English: seed-tts-eval's words.
``spoken``
    This recipe's: both texts are put into words (tts_grpo/text/spoken.py), of a number's right readings the one that
    fits the transcript counts, Chinese is counted by character and English by word. Total errors over total units of
    the usual reading. The protocols above compare what is written: a right reading of "50%" is all errors there.
``pinyin_error_rate``, ``pinyin_error_rate_toneless``
    As ``spoken``, but Chinese is compared by syllable, with and without tones, so that homophones are no errors. The
    reward is made of one of them. Chinese only.

One rule is ours in all of them: an utterance of the set without usable audio is there with an empty hypothesis, all
deletions, an error of 100%. The published scripts leave it out, so that failing on what is hard improves the score.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
import zhconv
from zhon import hanzi

from tts_grpo.text.errors import ErrorCounts, align_texts

_PUNCTUATION = str.maketrans("", "", (hanzi.punctuation + string.punctuation).replace("'", ""))
_BETWEEN_CHINESE = re.compile(r"(?<=[㐀-䶿一-鿿])\s+(?=[㐀-䶿一-鿿])")


@dataclass(frozen=True)
class Metric:
    """One error rate of one protocol.

    Attributes:
        title: its name in tables.
        macro: mean over utterances; otherwise total errors over total units.
        units: of a published protocol, how a text is cut.
        match: of ours, what counts as right, see :func:`tts_grpo.text.errors.align_sentences`.
    """

    title: str
    macro: bool
    units: Callable[[str], list[str]] | None = None
    match: str = ""

    @property
    def mean(self) -> str:
        return "macro" if self.macro else "micro"


def seed_characters(text: str) -> list[str]:
    """Characters without punctuation and spaces, otherwise as they are."""
    return [c for c in text.translate(_PUNCTUATION) if not c.isspace()]


def seed_words(text: str) -> list[str]:
    """Words in lower case without punctuation; an apostrophe stays in its word."""
    text = re.sub(r"\s\s+", " ", text.translate(_PUNCTUATION).lower()).strip()
    return text.split(" ") if text else []


def micro_characters(text: str) -> list[str]:
    """Characters without punctuation and spaces, full-width ones as ASCII, letters in upper case."""
    return seed_characters(unicodedata.normalize("NFKC", text).upper())


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
MAIN_METRIC = {"zh": "cer", "en": "wer"}  # whose units the alignments are of


def prepare_hypothesis(text: str, language: str) -> str:
    """A transcript as all metrics of the language take it.

    Chinese characters are made simplified, and spaces between them, which Paraformer writes, taken out: pinyin goes by
    words.
    """
    return _BETWEEN_CHINESE.sub("", zhconv.convert(text, "zh-cn")) if language == "zh" else text


def align_units(reference: Sequence[str], hypothesis: Sequence[str]) -> jiwer.WordOutput:
    """jiwer's alignment of two sequences of units with the fewest edits, and its counts."""
    return jiwer.process_words(" ".join(reference), " ".join(hypothesis))


def count_all(target_text: str, hypothesis: str, language: str) -> dict[str, ErrorCounts]:
    """Errors of one utterance by metric.

    Args:
        target_text: what should be said.
        hypothesis: what was heard, as :func:`prepare_hypothesis` gives it; "" where there is no audio.
        language: one of :data:`tts_grpo.text.spoken.LANGUAGES`.

    Raises:
        ValueError: nothing is left of the target text, so that it has no error rate.
    """
    counts = {}
    for name, metric in METRICS[language].items():
        if metric.units is None:
            counts[name] = align_texts(target_text, hypothesis, metric.match, language).counts
        elif reference := metric.units(target_text):
            found = align_units(reference, metric.units(hypothesis))
            counts[name] = ErrorCounts(found.substitutions, found.deletions, found.insertions, len(reference))
        if name not in counts or counts[name].length == 0:
            raise ValueError(f"{target_text!r} has no unit for {metric.title}: take the utterance out of the set")
    return counts


def pool(counts: Iterable[ErrorCounts], macro: bool) -> tuple[float, ErrorCounts]:
    """Rate of utterances together, and their summed counts."""
    counts = list(counts)
    total = sum(counts, ErrorCounts())
    return (float(np.mean([c.rate for c in counts])) if macro else total.rate), total
