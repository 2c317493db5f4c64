"""Generates texts as users have them from templates, each with its correct readings.

The readings are made by separate rules, not by the front end that they test: numbers come from ``say``, a simple table
of decimal places. Kinds: dates, times, shares, temperatures, quantities, money, phone numbers, scores,
letters, English words, traditional characters, full width, punctuation, erhua, and plain sentences of the tiny stack.
"""

import random
from collections.abc import Iterator

import zhconv

DIGITS = "零一二三四五六七八九"
SENTENCES = (
    "今天天气怎么样", "我们一起去公园吧", "请把门关上", "他每天坐地铁上班", "这本书很有意思",
    "妈妈在厨房做饭", "孩子们在操场上跑步", "明天可能会下雨", "我想喝一杯热水", "老师让我们安静",
    "图书馆里有很多书", "飞机马上就要起飞了", "她的声音非常好听", "这条路通向火车站", "医生建议他多休息",
    "我们公司正在开会", "电脑坏了需要修理", "这里的风景真漂亮",
)  # fmt: skip
CAPITALS = ("GDP", "CPU", "USB", "DNA", "NBA", "VIP", "CEO", "HR", "IT", "BBC")
ENGLISH = ("meeting", "deadline", "project", "email", "offer", "coffee", "party", "demo", "feedback", "team")
UNITS = {
    "kg": ("公斤", "千克"), "km": ("公里", "千米"), "cm": ("厘米", "公分"), "ml": ("毫升",), "℃": ("摄氏度", "度"),
    **{unit: (unit,) for unit in ("公里", "米", "平方米", "小时", "分钟", "岁", "人")},
}  # fmt: skip


def say(number: int) -> str:
    """Read a whole number below 100,000 in Chinese, digit by digit with its decimal places."""
    if number >= 10_000:
        rest = number % 10_000
        head = {1: "一万", 2: "两万"}.get(number // 10_000, f"{DIGITS[number // 10_000 % 10]}万")
        return head + ("" if not rest else ("零" if rest < 1_000 else "") + say_full(rest))
    return say_full(number).removeprefix("一") if 10 <= number < 20 else say_full(number)


def say_full(number: int) -> str:
    """Read a whole number below 10,000, with 一 before 十."""
    if number == 0:
        return "零"
    places = [(number // 10**power % 10, name) for power, name in ((3, "千"), (2, "百"), (1, "十"), (0, ""))]
    said = "".join(f"{DIGITS[digit]}{name}" if digit else "零" for digit, name in places).strip("零")
    return "零".join(part for part in said.split("零") if part)


def spell(digits: str, one: str = "一") -> str:
    """Read a number digit by digit, without decimal places."""
    return "".join(DIGITS[int(digit)] for digit in digits).replace("一", one)


def decimal(text: str) -> str:
    whole, _, rest = text.partition(".")
    return say(int(whole)) + (f"点{spell(rest)}" if rest else "")


def number(rng: random.Random) -> int:
    return rng.choice((rng.randint(3, 20), rng.randint(3, 99), rng.randint(100, 999), rng.randint(1000, 99_999)))


def date(rng):
    year, month, day = rng.randint(1950, 2035), rng.randint(1, 12), rng.randint(1, 28)
    words = f"{spell(str(year))}年{say(month)}月{say(day)}日"
    raw = rng.choice((f"{year}年{month}月{day}日", f"{year}-{month:02}-{day:02}", f"{year}/{month}/{day}"))
    return f"活动时间是{raw}。", [f"活动时间是{words}"]


def year(rng):
    value = rng.randint(1950, 2035)
    return f"他在{value}年毕业。", [f"他在{spell(str(value))}年毕业", f"他在{say(value)}年毕业"]


def clock(rng):
    hour, minute = rng.randint(3, 23), rng.randint(0, 59)
    said = {0: ("",), 30: ("三十", "三十分", "半")}.get(minute) or (
        f"{'零' if minute < 10 else ''}{say(minute)}", f"{'零' if minute < 10 else ''}{say(minute)}分",
    )  # fmt: skip
    return f"会议{hour}:{minute:02}开始", [f"会议{say(hour)}点{one}开始" for one in said]


def share(rng):
    value = rng.choice((str(rng.randint(1, 99)), f"{rng.randint(0, 99)}.{rng.randint(1, 9)}"))
    return f"销量增长了{value}%。", [f"销量增长了百分之{decimal(value)}"]


def shares(rng):
    low = rng.randint(3, 40)
    high = low + rng.randint(2, 40)
    words = f"百分之{say(low)}到百分之{say(high)}"
    return f"占{low}%-{high}%", [f"占{words}", f"占{words.replace('到', '至')}"]


def cold(rng):
    value = rng.randint(1, 40)
    raw = f"气温下降到-{value}{rng.choice('℃度')}"
    words = "度" if raw.endswith("度") else "摄氏度"
    return raw, [f"气温下降到零下{say(value)}{words}", f"气温下降到负{say(value)}{words}"]


def quantity(rng):
    unit = rng.choice(list(UNITS))
    value = str(number(rng)) if rng.random() < 0.6 else f"{rng.randint(3, 99)}.{rng.randint(1, 9)}"
    return f"一共有{value}{unit}。", [f"一共有{decimal(value)}{name}" for name in UNITS[unit]]


def span(rng):
    low = rng.randint(3, 40)
    high = low + rng.randint(2, 40)
    unit = rng.choice(("天", "个月", "公里", "岁", "人"))
    sign = rng.choice("-~～")
    return f"大约需要{low}{sign}{high}{unit}", [f"大约需要{say(low)}{to}{say(high)}{unit}" for to in "到至"]


def money(rng):
    value = number(rng)
    raw, names = rng.choice(((f"¥{value}", ("元", "块")), (f"${value}", ("美元", "美金")), (f"{value}元", ("元",))))
    return f"这件衣服卖{raw}。", [f"这件衣服卖{say(value)}{name}" for name in names]


def phone(rng):
    digits = f"1{rng.choice('35789')}" + "".join(rng.choices("0123456789", k=9))
    return f"我的手机号是{digits}", [f"我的手机号是{spell(digits, one)}" for one in "幺一"]


def serial(rng):
    value = f"{rng.randint(1, 9)}{rng.randint(0, 99):02}"
    raw, words = rng.choice((("{}房间", "{}房间"), ("坐{}路公交车", "坐{}路公交车"), ("拨打{}", "拨打{}")))
    return raw.format(value), [words.format(one) for one in (spell(value), spell(value, "幺"), say(int(value)))]


def score(rng):
    left, right = rng.randint(0, 5), rng.randint(0, 5)
    return f"比分是{left}:{right}", [f"比分是{DIGITS[left]}比{DIGITS[right]}"]


def fraction(rng):
    under = rng.randint(3, 9)
    over = rng.randint(1, under - 1)
    return f"完成了{over}/{under}", [f"完成了{DIGITS[under]}分之{DIGITS[over]}"]


def letters(rng):
    word, value = rng.choice(CAPITALS), rng.randint(3, 19)
    raw = rng.choice((f"{word}{value}", f"{word}-{value}", f"{word} {value}"))
    low = word.lower()
    return f"这是{raw}的资料", [f"这是{one}{say(value)}的资料" for one in (low, " ".join(low), word)]


def mixed(rng):
    word = rng.choice(ENGLISH)
    written = rng.choice((word, word.capitalize(), f" {word} "))
    return f"这个{written}很重要", [f"这个{word}很重要", f"这个 {word} 很重要", f"这个{word[:2]} {word[2:]}很重要"]


def traditional(rng):
    text = rng.choice(SENTENCES)
    return zhconv.convert(text, "zh-hant") + "。", [text]


def wide(rng):
    value = number(rng)
    raw = f"第{value}号".translate({ord("0") + i: chr(0xFF10 + i) for i in range(10)})
    return raw, [f"第{say(value)}号"]


def punctuated(rng):
    text = rng.choice(SENTENCES)
    at = rng.randint(1, len(text) - 1)
    raw = rng.choice(("“{}”，{}……", "{}——{}！", "《{}》{}？😀", "（{}）{}～", "{}　{}", "[laughter]{}{}"))
    return raw.format(text[:at], text[at:]), [text]


def erhua(rng):
    word = rng.choice(("一会儿", "一点儿", "这儿", "那儿", "一块儿"))
    return f"我们{word}走", [f"我们{word}走", f"我们{word[:-1]}走"]


def plain(rng):
    text = rng.choice(SENTENCES)
    return f"{text}。", [text]


TEMPLATES = (
    date, year, clock, share, shares, cold, quantity, span, money, phone, serial, score, fraction, letters, mixed,
    traditional, wide, punctuated, erhua, plain,
)  # fmt: skip


def lines(count: int, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Yield ``(text, correct readings)`` from the templates in turn, sometimes with two templates in one text."""
    rng = random.Random(seed)
    for i in range(count):
        raw, right = TEMPLATES[i % len(TEMPLATES)](rng)
        if rng.random() < 0.3:
            more, others = TEMPLATES[rng.randrange(len(TEMPLATES))](rng)
            raw, right = f"{raw}，{more}", [f"{one}{other}" for one in right for other in others]
        yield raw, right
