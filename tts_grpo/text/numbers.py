"""Convert numbers to words in Chinese and English, with all accepted readings.

A reading is a string of words as a recogniser writes them. ``[二两]`` stands for one character that may be either of
the two. The first reading of a list is the usual one.
"""

from functools import lru_cache

ZH_DIGITS = "零一二三四五六七八九"
_SECTION = ("", "十", "百", "千")
_LARGE = ("", "万", "亿", "万亿")
_TWO = "贰"  # placeholder for a 2 that may be read 二 or 两, until the reading is complete
# Each unit and the next higher one, after which it may be omitted at the end of a number: 一百五 for 一百五十.
_SHORTER = {"十": "百", "百": "千", "千": "万"}

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_THOUSANDS = ("", " thousand", " million", " billion", " trillion")
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip


def _section(number: int) -> str:
    """Return 1 to 9,999 in Chinese, independent of the digits before."""
    reading, gap = "", False
    for power in (3, 2, 1, 0):
        digit = number // 10**power % 10
        if digit == 0:
            gap = bool(reading)
            continue
        two = digit == 2 and power >= 2
        reading += ("零" if gap else "") + (_TWO if two else ZH_DIGITS[digit]) + _SECTION[power]
        gap = False
    return reading


def _chinese(number: int) -> str:
    if number == 0:
        return "零"
    reading, power = "", 3
    for power in (3, 2, 1, 0):
        section = number // 10_000**power % 10_000
        if section == 0:
            continue
        lacks_thousands = section < 1_000 or (number // 10_000 ** (power + 1) % 10 == 0)
        words = _TWO if section == 2 and (power or number == 2) else _section(section)
        reading += ("零" if reading and lacks_thousands and not reading.endswith("零") else "") + words + _LARGE[power]
    return reading


@lru_cache(maxsize=4096)
def zh_cardinals(digits: str) -> tuple[str, ...]:
    """Read a whole number as a quantity in Chinese: 2 is 二 or 两, 10 is 十 or 一十, 05 is 五 or 零五.

    Args:
        digits: ASCII digits; a number of more than 16 digits, leading zeros not counted, is read digit by digit.
    """
    plain = digits.lstrip("0") or "0"
    if len(plain) > 16:
        return (zh_digits(digits),)
    reading = _chinese(int(plain))
    found = [reading[1:], reading] if reading.startswith("一十") else [reading]
    found += [one.replace("零一十", "零十") for one in found if "零一十" in one]
    if digits[0] == "0" and len(digits) > 1:
        found += [zh_digits(digits)] if plain == "0" else ["零" + found[0]]
    return tuple(dict.fromkeys(one.replace(_TWO, "[两二]" if len(one) > 1 else "[二两]") for one in found))


@lru_cache(maxsize=4096)
def zh_digits(digits: str) -> str:
    """Read digits one by one in Chinese; 1 may be read yao in numbers of three or more digits: 119 is 幺幺九."""
    reading = "".join(ZH_DIGITS[int(digit)] for digit in digits)
    return reading.replace("一", "[一幺]") if len(digits) > 2 else reading


def zh_short(digits: str) -> tuple[str, ...]:
    """Read a number without its last unit, as at the end of a phrase: 150 is 一百五; empty if there is no such form."""
    reading = zh_cardinals(digits)[0]
    return (reading[:-1],) if len(reading) > 3 and _SHORTER.get(reading[-1]) == reading[-3] else ()


def zh_decimals(number: str) -> tuple[str, ...]:
    """Read a number as a quantity in Chinese, with or without a decimal point: 3.5 is 三点五."""
    whole, _, fraction = number.partition(".")
    if not fraction:
        return zh_cardinals(whole)
    rest = "点" + "".join(ZH_DIGITS[int(digit)] for digit in fraction)
    return tuple(one + rest for one in zh_cardinals(whole))


def zh_serials(digits: str, digits_first: bool = False) -> tuple[str, ...]:
    """Read a whole number in Chinese as a quantity or an identifier (year, room): 302 is 三百零二 or 三零二."""
    if len(digits) == 1:
        return zh_cardinals(digits)
    named, counted = (zh_digits(digits),), zh_cardinals(digits)
    if digits[0] == "0":
        return named + (counted if len(digits) == 2 and digits != "00" else ())
    first = digits_first or len(digits) > 8
    return tuple(dict.fromkeys(named + counted if first else counted + named))


def _english_hundreds(number: int, conjunction: str) -> str:
    reading = f"{_ONES[number // 100]} hundred" if number >= 100 else ""
    rest = number % 100
    if rest:
        tens = _ONES[rest] if rest < 20 else " ".join([_TENS[rest // 10], *([_ONES[rest % 10]] if rest % 10 else [])])
        reading += f"{conjunction if reading else ''} {tens}"
    return reading.strip()


def _english(number: int, conjunction: str) -> str:
    if number == 0:
        return "zero"
    parts = []
    for power in range(len(_THOUSANDS) - 1, -1, -1):
        section = number // 1_000**power % 1_000
        if section:
            bare = power == 0 and section < 100 and parts
            words = _english_hundreds(section, conjunction)
            parts.append((f"{conjunction} {words}" if bare else words) + _THOUSANDS[power])
    return " ".join(" ".join(parts).split())


@lru_cache(maxsize=4096)
def en_cardinals(digits: str) -> tuple[str, ...]:
    """Read a whole number as a quantity in English: 105 is "one hundred five" or "one hundred and five"."""
    plain = digits.lstrip("0") or "0"
    if len(plain) > 3 * len(_THOUSANDS):
        return (en_digits(digits)[0],)
    found = [_english(int(plain), conjunction) for conjunction in ("", " and")]
    found += [one.replace("one ", "a ", 1) for one in found if one.startswith(("one hundred", "one thousand"))]
    return tuple(dict.fromkeys(found))


@lru_cache(maxsize=4096)
def en_digits(digits: str) -> tuple[str, ...]:
    """Read digits one by one in English; 0 is "zero", "oh" or "o"."""
    reading = [" ".join(_ONES[int(digit)] for digit in digits)]
    return (reading[0], *(reading[0].replace("zero", zero) for zero in ("oh", "o") if "0" in digits))


def en_pairs(digits: str) -> tuple[str, ...]:
    """Read four digits like a year ("nineteen ninety nine") or three like a room number ("three oh two")."""
    if len(digits) not in (3, 4) or digits[0] == "0":
        return ()
    left, right = digits[:-2], digits[-2:]
    if right == "00":
        return (f"{_english(int(left), '')} hundred",)
    zeros = ("oh ", "o ", "zero ") if right[0] == "0" else ("",)
    return tuple(f"{_english(int(left), '')} {zero}{_english(int(right), '')}" for zero in zeros)


def en_decimals(number: str) -> tuple[str, ...]:
    """Read a number as a quantity in English, with or without a decimal point."""
    whole, _, fraction = number.partition(".")
    if not fraction:
        return en_cardinals(whole)
    rests = [f" point {rest}" for rest in en_digits(fraction)]
    return tuple(one + rest for one in en_cardinals(whole) for rest in rests)


def en_serials(digits: str) -> tuple[str, ...]:
    """Read a whole number in English as a quantity, a year or an identifier."""
    pairs, cardinals = en_pairs(digits), en_cardinals(digits)
    year = len(digits) == 4 and "1100" <= digits <= "2099" and not "2000" <= digits <= "2009"
    found = pairs + cardinals if year else cardinals + pairs
    return tuple(dict.fromkeys(found + en_digits(digits))) if len(digits) > 1 else cardinals


def en_ordinals(digits: str) -> tuple[str, ...]:
    """Read a whole number as an English ordinal: 21 is "twenty first"."""
    return tuple(" ".join([*one.split()[:-1], _ordinal(one.split()[-1])]) for one in en_cardinals(digits))


def _ordinal(word: str) -> str:
    return _ORDINALS.get(word) or (f"{word[:-1]}ieth" if word.endswith("y") else f"{word}th")
