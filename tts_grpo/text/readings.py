"""Convert digits, signs and letters to their readings in words.

:func:`tokens` splits a plain text into Chinese characters, words, and numbers or signs that need a reading. Each kind
of token has a function that returns a sequence of groups, each with alternative readings, the usual one first ("" means
not read). Numbers are read by tts_grpo/text/numbers.py, units and currencies by tts_grpo/text/measures.py.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tts_grpo.text import measures
from tts_grpo.text.clean import HAN, is_han
from tts_grpo.text.numbers import (
    en_cardinals,
    en_decimals,
    en_digits,
    en_ordinals,
    en_serials,
    zh_cardinals,
    zh_decimals,
    zh_digits,
    zh_serials,
    zh_short,
)

Groups = list[tuple[str, ...]]
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_BEGIN = r"(?<![0-9])(?<![0-9][.,])"
_SIGN = r"(?:(?<![0-9A-Za-z%°)\]年月日号点时分楼级周])[-+±])?"
_UNIT = "|".join(sorted(map(re.escape, measures.ZH_UNITS), key=len, reverse=True))
_MONEY = "|".join(sorted(map(re.escape, measures.ZH_CURRENCIES), key=len, reverse=True))
_DOMAIN = r"(?:com|cn|net|org|io|ai|edu|gov|co|uk|me|tv|app|dev|info|top)"
_PATTERNS = {
    "address": r"(?:https?|ftp)://[A-Za-z0-9./_?=&%#:~-]+|[A-Za-z0-9][A-Za-z0-9._+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"
    rf"|(?<![A-Za-z0-9])(?:[A-Za-z0-9][A-Za-z0-9-]*\.)+{_DOMAIN}(?![A-Za-z0-9])(?:/[A-Za-z0-9._?=&%/-]*)?",
    "date": _BEGIN + r"(?P<year>[12][0-9]{3})(?P<mark>[-/.])(?P<month>0?[1-9]|1[0-2])(?P=mark)"
    r"(?P<day>3[01]|[12][0-9]|0?[1-9])(?![0-9])|"
    + _BEGIN
    + r"(?P<year2>[12][0-9]{3})/(?P<month2>0?[1-9]|1[0-2])(?![0-9/])|"
    + r"(?<![0-9/.])(?=(?:0?[1-9]|1[0-2])/|[0-9]+/(?:0?[1-9]|1[0-2])/)"  # one of the two can be a month
    r"(?P<part1>0?[1-9]|[12][0-9]|3[01])/(?P<part2>0?[1-9]|[12][0-9]|3[01])/(?P<year3>[12][0-9]{3})" + r"(?![0-9/])",
    "time": r"(?<![0-9:])(?P<hour>[01]?[0-9]|2[0-4]):(?P<minute>[0-5][0-9])(?::(?P<second>[0-5][0-9]))?(?![0-9:])"
    r"(?:\s?(?P<noon>[aApP])\.?[mM](?![A-Za-z])\.?)?|"
    + _BEGIN
    + r"(?P<hour2>1[0-2]|[1-9])\s?(?P<noon2>[aApP])\.?[mM](?![A-Za-z])\.?",
    "phone": r"(?<![0-9])(?:\+[0-9]{1,3}[- ]?)?1[3-9][0-9](?P<gap>[- ]?)[0-9]{4}(?P=gap)[0-9]{4}(?![0-9])"
    r"|(?<![0-9])\(?0[0-9]{2,3}\)?[- ]?[0-9]{3,4}[- ]?[0-9]{4}(?:-[0-9]{1,5})?(?![0-9])"
    r"|(?<![0-9])[48]00[- ]?[0-9]{3}[- ]?[0-9]{4}(?![0-9])|(?<![0-9])[0-9]{3}-[0-9]{3}-[0-9]{4}(?![0-9])"
    r"|(?<![0-9])[0-9]{3}-[0-9]{4}(?![0-9年])",
    "version": r"(?<![0-9])[0-9]+(?:\.[0-9]+){2,}",
    "money": rf"(?P<currency>{_MONEY})\s?(?P<amount>{_NUMBER})"
    r"(?P<scale>[万亿千百]+|\s?(?:k|K|[MB]n?|bn|[mb]illion)(?![A-Za-z]))?",
    "minutes": r"(?<![0-9.])(?P<minutes>[0-9]{1,2})'(?P<seconds>[0-9]{1,2})(?:''|\")",
    "percent": rf"(?P<psign>{_SIGN}){_BEGIN}(?P<share>{_NUMBER})(?:[%‰]?(?P<range>\s?[-~—]\s?)(?P<upto>{_NUMBER}))?"
    r"\s?(?P<percent>[%‰])",
    "decade": r"(?<![0-9.])'?(?P<decade>(?:1[0-9]|20)?[0-9]0)'?s(?![A-Za-z])",
    "anniversary": r"(?<![0-9])(?P<nth>1[0-2]|[1-9])·(?P<of>[0-9]{1,2})(?![0-9])",
    "fraction": r"(?<![0-9./])(?:(?P<ones>[0-9]+) )?(?P<numerator>[0-9]+)/(?P<denominator>[0-9]+)"
    r"(?![0-9./]|\s?[A-Za-z]+/)",
    "power": rf"{_BEGIN}(?P<base>{_NUMBER})\^(?P<power>-?[0-9]+)",
    "height": rf"{_BEGIN}(?<![A-Za-z])(?P<metres>[0-9])\.(?P<rest>[0-9]{{1,2}})(?:米|\s?m(?![A-Za-z0-9^/]))(?![/^])",
    "measure": rf"(?P<msign>{_SIGN}){_BEGIN}(?<![A-Za-z])(?P<size>{_NUMBER})"
    rf"(?:(?P<mrange>\s?[-~—]\s?)(?P<mupto>{_NUMBER}))?\s?(?P<unit>{_UNIT})"
    rf"(?:/(?P<per>{_UNIT}|d|人|天|次|个|年|月|日))?(?![A-Za-z0-9])",
    "price": rf"{_BEGIN}(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]+)\.(?P<cents>[0-9]{{1,2}})(?P<yuan>[元块])",
    "ordinal": r"(?<![0-9.])(?P<rank>[0-9]+)(?:st|nd|rd|th)(?![A-Za-z])",
    "numero": r"(?<![A-Za-z])[Nn][Oo]\.?\s?(?=[0-9])",
    "cross": r"(?<=[0-9])\s?[xX]\s?(?=[0-9])",
    "unknown": rf"(?P<usign>{_SIGN}){_BEGIN}(?<![A-Za-z])(?P<count>{_NUMBER})"
    r"(?P<odd>[A-Za-z]{2,6}(?:/[A-Za-z]{1,3})?)(?![A-Za-z0-9])",
    "number": rf"(?P<nsign>{_SIGN}){_BEGIN}(?P<number>{_NUMBER})|[0-9]+",
    "word": r"[A-Za-z]+(?:'[A-Za-z]+)*",
    "han": f"[{HAN}]",
    "other": rf"[^\W_0-9A-Za-z{HAN}]+",
    "exponent": r"(?<=[A-Za-z])\^(?P<exponent>-?[0-9]+)",
    "degree": r"°(?:[CF](?![A-Za-z]))?",
    "sign": r"[~—](?=[-+]?[0-9])|[-~—+±*×÷=<>≤≥≈≠:/&@^_·#%.]+",
    "mark": r"[^\w\s]|_",
}
_TOKEN = re.compile("|".join(f"(?P<{kind}_>{pattern})" for kind, pattern in _PATTERNS.items()))
_ENDS_IN_NUMBER = re.compile(r"(?:[0-9%‰°]|°[CF])$")
_DATED = frozenset("年月日号点时分秒度元岁天周楼级米")  # a dash between one of these and a number is a range
_LONE_UNITS = frozenset(("kg", "km", "cm", "mm", "ml", "mL", "GB", "MB", "TB", "kWh", "mAh"))
_DOTTED = re.compile(
    r"(?:1[0-2]|[1-9])\.(?:[0-9]折|[0-9]{1,2}(?:节|事件|大促|假|活动|黄金周|晚会|购物|运动|地震|妇女|劳动|国庆))"
)
_SHORT = re.compile(r"[A-Z]{2,5}s?$")
_COUNTED = frozenset("个只位条张本次天块件台辆家种名口把杯瓶双套间层年岁点分小周遍部座")  # 2 before these is usually 两
_NAMES = frozenset("年后版式级届款型班")  # a number before one of these is often read digit by digit
# A number before one of these is a quantity and is not read digit by digit.
_QUANTITIES = _COUNTED - {"年"} | frozenset(
    "月日秒人元毛角度米斤公千百万亿倍成碗句首部支篇颗粒头匹页道题章节轮步群枚根盒袋箱份亩吨克升瓦伏平立厘毫英里"
)
_NAMED = re.compile(
    r"(?:电话|拨打|热线|号码|短信|微信|邮编|编号|密码|证码|尾号|卡号|房间|航班|车次|车牌|工号|学号|账号|客服|代码|股票|QQ)"
    r"[是为：:\s]{0,3}$"
)
_CALLS = re.compile(r"1(?:10|12|14|19|2[0-2]|2306|23[14]5|00(?:00|10|86))|315|911|95[0-9]{3}")  # phone numbers
_SPELLED = frozenset(
    ("KB", "kb", "MB", "GB", "TB", "B", "M", "px", "ppm", "K", "bps", "kbps", "Mbps", "Gbps", "A", "N", "J")
)  # units that are usually spelled


@dataclass(frozen=True)
class Token:
    """A token of a plain text: its offsets, its kind, and its readings as a sequence of groups of alternatives."""

    start: int
    end: int
    kind: str
    groups: Groups


def tokens(text: str, language: str) -> Iterator[Token]:
    """Yield the tokens of a plain text in order, without spaces."""
    for found in _TOKEN.finditer(text):
        kind = found.lastgroup[:-1]  # lastgroup is the outermost group, as it closes last
        yield Token(found.start(), found.end(), kind, _READERS[kind](found, language))


def _options(*parts) -> tuple[str, ...]:
    """Return the concatenations of parts (at most 96), each part a string or a tuple of alternatives."""
    choices = [(part,) if isinstance(part, str) else part for part in parts]
    return tuple(
        dict.fromkeys(" ".join("".join(one).split()) for one in itertools.islice(itertools.product(*choices), 96))
    )


def _spaced(*parts) -> tuple[str, ...]:
    """Return :func:`_options` with spaces between the parts, for English words."""
    return _options(*(tuple(f" {one} " for one in ((part,) if isinstance(part, str) else part)) for part in parts))


def _near_latin(found: re.Match) -> bool:
    """Return whether a token is next to Latin letters, so that its numbers may be read in English."""
    before, after = found.string[: found.start()].rstrip(" -."), found.string[found.end() :].lstrip(" -")
    return any(c.isascii() and c.isalpha() for c in (before[-1:], after[:1]) if c)


def _word(found: re.Match, language: str) -> Groups:
    word = found[0]
    if word in _LONE_UNITS and language == "zh":
        return [(word, *measures.ZH_UNITS[word].split())]
    if _SHORT.match(word):
        return [(" ".join(word),)]
    title = word.lower() in ("mr", "mrs", "dr")
    names = measures.EN_ABBREVIATIONS.get(word.lower(), "") if language == "en" or title else ""
    if names and (found.string[found.end() :][:1] == "." or title):
        return [(*names.split(), word)] if word.lower() != "etc" else [(names, word)]
    return [(word,)]


def _cross(found: re.Match, language: str) -> Groups:
    return [measures.ZH_SIGNS["x"] if language == "zh" else measures.EN_SIGNS["x"]]


def _anniversary(found: re.Match, language: str) -> Groups:
    """Read a date that is used as a name, such as 3·15, digit by digit or as two numbers."""
    nth, of = found["nth"], found["of"]
    if language == "en":
        return [en_cardinals(nth), en_cardinals(of)]
    return [(zh_digits(nth + of), *_options(zh_cardinals(nth), ("", "点"), zh_cardinals(of)))]


def _number_words(number: str, language: str, both: bool) -> tuple[str, ...]:
    """Read a number without a unit."""
    number = number.replace(",", "") if "," in number else number
    if "." in number:
        zh, en = zh_decimals(number), en_decimals(number)
    else:
        zh, en = zh_serials(number), en_serials(number)
    return en if language == "en" else zh + en if both else zh


def _zh_number(number: str, before: str, after: str) -> tuple[str, ...]:
    """Read a number in Chinese as a quantity, a year or an identifier, depending on the text before and after it."""
    ranged = re.match(r"\s?[-~—]\s?[0-9.,]+", after)
    follows = after[ranged.end() :][:1] if ranged else after[:1]
    neighbour = before.rstrip(" -")[-1:]
    name = (neighbour.isascii() and neighbour.isalpha()) or follows in _NAMES or neighbour in ("米", "块")
    pair = len(number) == 2 and number[0] != "0" and not _NAMED.search(before)  # rarely read digit by digit
    if "." in number or "," in number or ((follows in _QUANTITIES or pair) and not name):
        words = zh_decimals(number.replace(",", ""))
        if _DOTTED.match(number + after):  # 9.11事件 and 4.5折 are read digit by digit
            words += (zh_digits(number.replace(".", "")),)
        return ("[两二]",) if words[0] == "[二两]" and follows in _COUNTED and before[-1:] not in ("第", "-") else words
    year = len(number) == 4 and "1900" <= number <= "2099" and not is_han(follows or " ")
    year |= follows in ("年", "后", "学", "届", "赛") and len(number) in (2, 4) and number not in ("10", "20", "30")
    short = () if is_han(follows or " ") and follows != "块" else zh_short(number)
    return zh_serials(number, year or bool(_CALLS.fullmatch(number)) or bool(_NAMED.search(before))) + short


def _number(found: re.Match, language: str) -> Groups:
    number, after = found["number"] or found[0], found.string[found.end() :]
    before, latin = found.string[: found.start()], _near_latin(found)
    if language == "en":
        words = _number_words(number, "en", False)
    else:
        words = _zh_number(number, before + (found["nsign"] or ""), after) + (
            _number_words(number, "en", False) if latin else ()
        )
    if number in ("2", "4") and before[-1:].isalpha() and after[:1].isalpha() and latin:
        words += {"2": ("to",), "4": ("for",)}[number]
    return [*_signed(found["nsign"], language, after[:1] == "度"), words]


def _signed(sign: str | None, language: str, cold: bool = False) -> Groups:
    if not sign:
        return []
    names = {
        "zh": {"-": ("负", "零下") if cold else ("负", "减"), "+": ("正", "加", "零上", ""), "±": ("正负",)},
        "en": {"-": ("minus", "negative"), "+": ("plus", ""), "±": ("plus or minus",)},
    }
    return [names[language][sign]]


def _sign(found: re.Match, language: str) -> Groups:
    """Read a sign between words or numbers; elsewhere it is punctuation, which is not read."""
    before, after = found.string[: found.start()].rstrip(), found.string[found.end() :].lstrip(" -+")
    sign, left, right = found[0], before[-1:], after[:1]
    if set(sign) == {"+"} and left.isascii() and left.isalpha():  # such as C++ and A+
        return [("加" * len(sign), " plus" * len(sign)) if language == "zh" else (" plus" * len(sign),)]
    if len(sign) > 1 and sign not in ("<=", ">=", "=="):
        return [("",)]
    sign = {"<=": "≤", ">=": "≥", "==": "=", "—": "-"}.get(sign, sign)
    digits = bool(_ENDS_IN_NUMBER.search(before) or (sign in "×*÷" and left.isalnum())) and right.isdigit()
    table = measures.ZH_SIGNS if language == "zh" else measures.EN_SIGNS
    if sign in "-~":
        names = _connector(left, right, digits, language)
        close = re.search(r"(?<![0-9.])[0-9]$", before) and re.match(r"[0-9](?![0-9.])", after)
        years = re.search(r"(?<![0-9])(?:19|20)[0-9]{2}$", before) and re.match(r"(?:19|20)[0-9]{2}(?![0-9])", after)
        # 2-3天 may also be read 两三天, and 2020-2021 may be read 二零二零二零二一.
        return [(*names, "")] if years or (close and int(right) - int(left) == 1) else [names]
    if digits or (sign in "&=<>≤≥≈≠+" and left and right) or (sign in "@±" and right):
        return [table.get(sign, ("",))]
    if sign in "<>≤≥≈" and right.isdigit():
        return [table[sign]]
    if sign == "/" and is_han(right or " ") and language == "zh":
        return [("每", "一", "") if re.search(r"[0-9][^0-9]{0,3}$", before) else ("", "或", "和")]
    if sign == "+" and left.isdigit():
        return [("加", "多", "以上", "") if language == "zh" else ("plus", "")]
    return [("", *(word for word in table.get(sign, ()) if word))] if left and right and sign in "/_·#" else [("",)]


def _connector(left: str, right: str, digits: bool, language: str) -> tuple[str, ...]:
    """Read a dash or tilde between two words as a range, a score or a minus, or leave it unread."""
    if left in _DATED and right.isdigit() and language == "zh":
        return ("到", "至", "")
    if not left or not right or not (left.isalnum() or left in "%°") or not right.isalnum():
        return ("",)
    if digits:
        return ("到", "至", "比", "减", "杠") if language == "zh" else ("to", "minus", "through", "dash")
    return ("", "到", "至", "杠", "减", "dash") if language == "zh" else ("", "to", "dash", "minus")


def _unit_words(unit: str, number: tuple[str, ...], language: str) -> Groups:
    """Return the groups of a number and its unit, in the word order of the language."""
    if language == "zh" and (names := measures.ZH_UNITS.get(unit)):
        letters = (f" {unit}",) if unit.isalpha() else ()
        return [number, letters + tuple(names.split()) if unit in _SPELLED else tuple(names.split()) + letters]
    template = measures.library_template(unit, language)
    if template is None:
        return [number, (unit,)]
    head, tail = template.split("{}")
    names = (tail.strip(), tail.strip().removesuffix("s"), unit) if language == "en" and not head else (tail.strip(),)
    return ([(head,)] if head.strip() else []) + [number] + ([names] if tail.strip() else [])


def _measure(found: re.Match, language: str) -> Groups:
    unit, per = found["unit"], found["per"]
    values = [found["size"].replace(",", ""), *([found["mupto"].replace(",", "")] if found["mupto"] else [])]
    words = [zh_decimals(v) if language == "zh" else en_decimals(v) for v in values]
    letters = unit.isascii() and unit.isalpha() and unit not in ("kg", "km", "cm", "mm", "ml", "mL", "min")
    if letters and not per and len(values) == 1:  # 5G and 3M may be names
        words = [tuple(dict.fromkeys(words[0] + _number_words(values[0], language, True)))]
    groups = _signed(found["msign"], language, unit.startswith("°"))
    if len(words) == 2:
        names = measures.ZH_UNITS.get(unit, "").split() if language == "zh" else ()
        groups += [words[0], ("", *names), _connector("1", "1", True, language)]
    if not per:
        return groups + _unit_words(unit, words[-1], language)
    if language == "en":
        return groups + _unit_words(f"{unit}/{per}", words[-1], "en")
    names, pers = (measures.ZH_UNITS.get(u, u).split() for u in (unit, per))
    numbers = words[-1][:2]
    plain = _options(numbers, names, "每", pers)
    return [*groups, plain + _options("每", pers, numbers, names) + _options(numbers, f" {unit} 每 {per}")]


def _unknown(found: re.Match, language: str) -> Groups:
    """Read a number with letters that are in no table: as a unit if wetext has it, otherwise as a word."""
    number, odd, sign = found["count"], found["odd"], _signed(found["usign"], language)
    if measures.library_template(odd, language):
        number = number.replace(",", "")
        return sign + _unit_words(odd, zh_decimals(number) if language == "zh" else en_decimals(number), language)
    words = (" ".join(odd),) if _SHORT.match(odd) else (odd,)
    return [*sign, _number_words(number, language, True), words]


def _percent(found: re.Match, language: str) -> Groups:
    values = [found["share"].replace(",", ""), *([found["upto"].replace(",", "")] if found["upto"] else [])]
    sign = _signed(found["psign"], language)
    if language == "en":
        name = ("percent", "per cent") if found["percent"] == "%" else ("per mille",)
        groups = [en_decimals(values[0]), name]
        return sign + ([en_decimals(values[0]), ("to",), en_decimals(values[1]), name] if values[1:] else groups)
    name = "百分之" if found["percent"] == "%" else "千分之"
    shares = [zh_decimals(v) + (("百",) if v == "100" and name[0] == "百" else ()) for v in values]
    if found["psign"] == "-":
        return [_options(name, "负", shares[0]) + _options("负", name, shares[0])]
    if len(shares) == 1:
        return [*sign, (name,), shares[0]]
    return [*sign, (name,), shares[0], ("到", "至"), (name, ""), shares[1]]


def _money(found: re.Match, language: str) -> Groups:
    amount, currency, scale = found["amount"].replace(",", ""), found["currency"], (found["scale"] or "").strip()
    whole, _, cents = amount.partition(".")
    if language == "en":
        return [_english_money(whole, cents, currency, scale)]
    scales = {
        "k": ("k", "千"),
        "K": ("k", "千"),
        "m": ("百万", "m"),
        "M": ("百万", "m"),
        "b": ("十亿", "b"),
        "B": ("十亿", "b"),
    }
    large = ("",) if not scale else scales.get(scale[0], (scale,))
    names = measures.ZH_CURRENCIES[currency].split()
    readings = _options(zh_decimals(amount), large, tuple(names))
    if not scale and "元" in names[0] and 0 < len(cents) < 3:
        readings += _coins(whole, cents, "元块")
    return [readings]


def _coins(whole: str, cents: str, names: str) -> tuple[str, ...]:
    """Read an amount in yuan, jiao and fen: 99.9 is 九十九块九, 九十九块九毛 or 九十九元九角."""
    jiao, fen = (zh_digits(digit) for digit in cents.ljust(2, "0"))
    found = ()
    for name in names:
        tenth = "角" if name == "元" else "毛"
        if whole == "0" and fen == "零":
            found += (jiao + tenth,)
        if cents.ljust(2, "0") == "00":
            found += _options(zh_cardinals(whole), name)
        elif fen == "零":
            found += _options(zh_cardinals(whole), name, jiao, (tenth, ""))
        elif jiao == "零":
            found += _options(zh_cardinals(whole), name, ("零", ""), fen, "分")
        else:
            found += _options(zh_cardinals(whole), name, jiao, (tenth,), fen, ("分", ""))
    return found


def _price(found: re.Match, language: str) -> Groups:
    whole, cents, yuan = found["whole"].replace(",", ""), found["cents"], found["yuan"]
    return [_options(zh_decimals(f"{whole}.{cents}"), yuan) + _coins(whole, cents, "元块" if yuan == "元" else yuan)]


def _english_money(whole: str, cents: str, currency: str, scale: str) -> tuple[str, ...]:
    major, minor = measures.EN_CURRENCIES.get(currency, "unit cent").split()
    majors = (
        (major,) if whole == "1" and not scale and major != "yuan" else (f"{major}s" if major != "yuan" else major,)
    )
    large = {"k": "thousand", "K": "thousand", "M": "million", "m": "million", "B": "billion", "b": "billion"}
    scales = ("",) if not scale else (large.get(scale[0], scale),)
    amount = f"{whole}.{cents}" if cents else whole
    readings = _spaced(en_decimals(amount), scales, majors)
    if len(cents) == 2 and not scale:
        readings = (
            _spaced(en_cardinals(whole), majors, ("and", ""), en_cardinals(cents), (f"{minor}s", minor, "")) + readings
        )
    return readings


def _date(found: re.Match, language: str) -> Groups:
    if found["year3"]:
        return _slashed_date(found["part1"], found["part2"], found["year3"], language)
    year, month, day = found["year"] or found["year2"], found["month"] or found["month2"], found["day"]
    return _date_groups(year, month, day, language)


def _slashed_date(first: str, second: str, year: str, language: str) -> Groups:
    """Read 12/25/2024 or 25/12/2024; if both orders are possible, either is accepted."""
    orders = [pair for pair in ((first, second), (second, first)) if int(pair[0]) <= 12]
    *alternatives, rest = zip(*(_date_groups(year, month, day, language) for month, day in orders), strict=True)
    return [tuple(dict.fromkeys(sum(options, ()))) for options in (*alternatives, rest)]


def _date_groups(year: str, month: str, day: str | None, language: str) -> Groups:
    if language == "en":
        months = measures.EN_MONTHS[int(month) - 1]
        if day is None:
            return [(months,), en_serials(year)]
        days = en_ordinals(day.lstrip("0")) + en_cardinals(day.lstrip("0"))
        return [_spaced(months, ("", "the"), days) + _spaced("the", days, "of", months), en_serials(year)]
    groups = [zh_serials(year, digits_first=True), ("年",), zh_cardinals(str(int(month))), ("月",)]
    return groups + ([zh_cardinals(str(int(day))), ("日", "号")] if day else [])


def _clock(hour: str, minute: str, second: str | None) -> tuple[str, ...]:
    """Read a time of day in Chinese, without a word for morning or afternoon."""
    hours = tuple(one.replace("[二两]", "[两二]") for one in zh_cardinals(str(int(hour))))
    minutes = zh_cardinals(str(int(minute)))
    if second is not None:
        low = int(minute) < 10
        middles = _options(("零", "") if low and minute != "00" else "", "零" if minute == "00" else minutes, "分")
        return _options(hours, "点", middles, zh_cardinals(second.lstrip("0") or "0") + zh_cardinals(second), "秒")
    if minute == "00":
        return _options(hours, "点", ("", "整", "钟"))
    found = _options(hours, "点", ("零", "") if int(minute) < 10 else "", minutes, ("分", ""))
    extra = {"15": ("一刻",), "30": ("半",), "45": ("三刻",)}.get(minute, ())
    return found + (_options(hours, "点", extra) if extra else ())


def _time(found: re.Match, language: str) -> Groups:
    hour, minute, second = found["hour"] or found["hour2"], found["minute"] or "00", found["second"]
    noon = (found["noon"] or found["noon2"] or "").lower()
    if language == "en":
        return [_english_time(hour, minute, second, noon)]
    readings = _clock(hour, minute, second)
    if 12 < int(hour) < 24:
        short = _clock(str(int(hour) - 12), minute, second)
        readings += short + _options(("下午", "晚上", "傍晚") if int(hour) > 16 else "下午", short)
    if noon:
        half = ("上午", "早上", "凌晨") if noon == "a" else ("下午", "晚上", "中午")
        return [_options(half, readings) + _options(readings, f" {noon} m")]
    if second is None:
        readings += _options(zh_cardinals(hour), "比", zh_cardinals(minute))
    return [readings]


def _english_time(hour: str, minute: str, second: str | None, noon: str) -> tuple[str, ...]:
    tail = f"{noon} m" if noon else ""
    hours = en_cardinals(str(int(hour)))
    if minute == "00":
        readings = _spaced(hours, (tail,)) + _spaced(hours, "o'clock", (tail,)) + _spaced(hours, "o clock", (tail,))
        return (
            readings if second is None else _spaced(hours, "o'clock", "and", en_cardinals(second), "seconds", (tail,))
        )
    zero = ("oh", "o", "zero") if int(minute) < 10 else ""
    readings = _spaced(hours, zero, en_cardinals(str(int(minute))))
    if second is not None:
        readings = _spaced(readings, ("and", ""), en_cardinals(str(int(second))), ("seconds", ""))
    return _spaced(readings, (tail,))


def _phone(found: re.Match, language: str) -> Groups:
    read: Callable = en_digits if language == "en" else lambda digits: (zh_digits(digits.ljust(3)[: len(digits)]),)
    groups: Groups = [("plus", "") if language == "en" else ("加", "")] if found[0].startswith("+") else []
    for part in re.findall(r"[0-9]+|-", found[0].lstrip("+")):
        if part == "-":
            groups.append(("", "dash") if language == "en" else ("", "杠", "转"))
        elif language == "en":
            groups.append(read(part))
        else:
            groups.append((zh_digits(part).replace("一", "[一幺]") if len(part) < 3 else zh_digits(part),))
    return groups


def _version(found: re.Match, language: str) -> Groups:
    groups: Groups = []
    for part in re.split(r"(\.)", found[0]):
        if part == ".":
            groups.append(("点",) if language == "zh" else ("point", "dot"))
        else:
            groups.append(_number_words(part, language, _near_latin(found)))
    return groups


def _fraction(found: re.Match, language: str) -> Groups:
    ones, numerator, denominator = found["ones"], found["numerator"], found["denominator"]
    if language == "en":
        return [_english_fraction(ones, numerator, denominator)]
    readings = _options(zh_cardinals(denominator), "分之", zh_cardinals(numerator))
    if ones:
        return [_options(zh_cardinals(ones), ("又", ""), readings)]
    month, day = int(numerator[:3]), int(denominator[:3])
    if 1 <= month <= 12 and 1 <= day <= 31:
        date = _options(zh_cardinals(str(month)), "月", zh_cardinals(str(day)), ("日", "号"))
        readings = date + readings if numerator[0] == "0" else readings + date
    readings += _options(zh_serials(numerator), ("杠", "斜杠", "比", ""), zh_serials(denominator))
    return [readings + (("一半", "half") if (numerator, denominator) == ("1", "2") else ())]


def _english_fraction(ones: str | None, numerator: str, denominator: str) -> tuple[str, ...]:
    names = {"2": ("half", "halves"), "4": ("quarter", "fourth")}.get(denominator, en_ordinals(denominator))
    plural = names if numerator == "1" else tuple(n if n == "halves" else f"{n}s" for n in names)
    readings = _spaced(en_cardinals(numerator) + (("a", "") if numerator == "1" else ()), plural)
    readings += _spaced(en_cardinals(numerator), ("slash", "over", "out of", ""), en_cardinals(denominator))
    month, day = int(numerator[:3]), int(denominator[:3])
    if 1 <= month <= 12 and 1 <= day <= 31:
        readings += _spaced(measures.EN_MONTHS[month - 1], en_ordinals(str(day)) + en_cardinals(str(day)))
    return _spaced(en_cardinals(ones), "and", readings) if ones else readings


def _power(found: re.Match, language: str) -> Groups:
    base, power = found["base"].replace(",", ""), found["power"]
    if language == "en":
        known = {"2": ("squared",), "3": ("cubed",)}.get(power, ())
        name = _spaced("to the", ("power of", ""), en_cardinals(power.lstrip("-")) + en_ordinals(power.lstrip("-")))
        return [en_decimals(base), known + name]
    minus = "负" if power.startswith("-") else ""
    known = {"2": ("的平方", "平方"), "3": ("的立方", "立方")}.get(power, ())
    return [zh_decimals(base), _options(("的", ""), minus, zh_cardinals(power.lstrip("-")), ("次方", "次幂")) + known]


def _exponent(found: re.Match, language: str) -> Groups:
    """Read a power of a letter or a unit, such as x^2."""
    power = found["exponent"]
    if language == "en":
        return [{"2": ("squared",), "3": ("cubed",)}.get(power, ()) + _spaced("to the", en_ordinals(power.lstrip("-")))]
    minus = "负" if power.startswith("-") else ""
    known = {"2": ("的平方", "平方"), "3": ("的立方", "立方")}.get(power, ())
    return [known + _options(("的", ""), minus, zh_cardinals(power.lstrip("-")), ("次方", "次幂", ""))]


def _degree(found: re.Match, language: str) -> Groups:
    names = {"°C": ("摄氏度", "度"), "°F": ("华氏度",), "°": ("度",)}
    english = {"°C": ("degrees celsius",), "°F": ("degrees fahrenheit",), "°": ("degrees",)}
    return [(names if language == "zh" else english)[found[0]]]


def _minutes(found: re.Match, language: str) -> Groups:
    """Read 3'20\" as minutes and seconds, or as feet and inches."""
    first, second = found["minutes"], found["seconds"]
    if language == "en":
        parts = (("minutes", "seconds"), ("feet", "inches"), ("foot", ""))
        return [tuple(w for a, b in parts for w in _spaced(en_cardinals(first), a, en_cardinals(second), b))]
    parts = (("分", "秒"), ("英尺", "英寸"))
    return [tuple(w for a, b in parts for w in _options(zh_cardinals(first), a, zh_cardinals(second), b))]


def _height(found: re.Match, language: str) -> Groups:
    """Read metres with a decimal fraction: 1.85m is 一点八五米 or 一米八五."""
    metres, rest = found["metres"], found["rest"]
    if language == "en":
        return [en_decimals(f"{metres}.{rest}"), ("meters", "meter", "metres", "m")]
    tens = zh_cardinals(rest) if len(rest) == 2 and rest[0] != "0" else ()
    readings = _options(zh_decimals(f"{metres}.{rest}"), ("米", " m")) if "m" in found[0] else ()
    readings = readings or _options(zh_decimals(f"{metres}.{rest}"), "米")
    return [readings + _options(zh_cardinals(metres), "米", (zh_digits(rest), *tens))]


def _ordinal(found: re.Match, language: str) -> Groups:
    english = en_ordinals(found["rank"])
    return [english if language == "en" else english + _options("第", zh_cardinals(found["rank"]))]


def _decade(found: re.Match, language: str) -> Groups:
    digits = found["decade"]
    if language == "zh":
        seconds = ("秒",) if len(digits) == 2 and "'" not in found[0] else ()
        return [_options((*zh_cardinals(digits), zh_digits(digits)), (*seconds, "年代", " s"))]
    tens = en_cardinals(digits[-2:])[0].removesuffix("y") + "ies" if digits[-2:] != "00" else "hundreds"
    return [_spaced(*([en_cardinals(digits[:-2])] if len(digits) == 4 else []), tens)]


def _numero(found: re.Match, language: str) -> Groups:
    return [("number", "n o", "no") if language == "en" else ("number", "第", "编号", "n o", "号码")]


def _address(found: re.Match, language: str) -> Groups:
    """Read a web or mail address: its words, its numbers, and the names of its signs."""
    signs = {
        "zh": {".": ("点", "dot"), "/": ("斜杠", "杠", "slash"), ":": ("冒号", ""), "@": ("艾特", "at", "圈a"),
               "-": ("杠", "横杠", "减", "中划线", "dash"), "_": ("下划线", "杠")},
        "en": {".": ("dot",), "/": ("slash",), ":": ("colon", ""), "@": ("at",), "-": ("dash", "hyphen"),
               "_": ("underscore",)},
    }[language]  # fmt: skip
    groups: Groups = []
    for part in re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9]", found[0].rstrip("/.?")):
        if part.isdigit():
            groups.append(_number_words(part, language, True))
        elif part.isalpha():
            groups.append((part.lower(), "三w") if part == "www" else (part.lower(),))
        else:
            groups.append(signs.get(part, ("",)))
    return groups


def _han(found: re.Match, language: str) -> Groups:
    """Return a character unchanged, except that 二 and 两 are both accepted before 百, 千, 万 and 亿."""
    character, after = found[0], found.string[found.end() :][:1]
    if character in "二两" and after and after in "百千万亿":
        return [(f"[{character}{'两' if character == '二' else '二'}]",)]
    return [(character,)]


def _unchanged(found: re.Match, language: str) -> Groups:
    return [(found[0],)]


def _unread(found: re.Match, language: str) -> Groups:
    return [("",)]


_READERS: dict[str, Callable[[re.Match, str], Groups]] = {
    "address": _address, "date": _date, "time": _time, "phone": _phone, "version": _version, "money": _money,
    "minutes": _minutes, "percent": _percent, "decade": _decade, "anniversary": _anniversary, "fraction": _fraction,
    "power": _power, "measure": _measure, "height": _height, "price": _price, "ordinal": _ordinal, "numero": _numero,
    "cross": _cross, "unknown": _unknown, "number": _number, "word": _word, "han": _han, "other": _unchanged,
    "exponent": _exponent, "degree": _degree, "sign": _sign, "mark": _unread,
}  # fmt: skip
