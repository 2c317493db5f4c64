"""Tables of the names of units, currencies and signs, for tts_grpo/text/readings.py.

Units that are not in these tables are read by the grammars of WeTextProcessing (PyPI ``wetext``, without pynini).
"""

from functools import lru_cache

# Chinese names of units, the usual name first. Reading the letters themselves (五kg) is also accepted.
ZH_UNITS = {
    "kg": "千克 公斤", "g": "克", "mg": "毫克", "ug": "微克", "μg": "微克", "t": "吨", "lb": "磅", "oz": "盎司",
    "km": "公里 千米", "m": "米", "dm": "分米", "cm": "厘米 公分", "mm": "毫米", "um": "微米", "μm": "微米",
    "nm": "纳米", "ft": "英尺", "in": "英寸", "inch": "英寸", "mi": "英里", "yd": "码", "nmi": "海里",
    "m^2": "平方米 平米 平方", "m2": "平方米 平米 平方", "cm^2": "平方厘米", "cm2": "平方厘米", "mm^2": "平方毫米",
    "km^2": "平方公里 平方千米", "km2": "平方公里 平方千米", "m^3": "立方米 立方 方", "m3": "立方米 立方 方",
    "cm^3": "立方厘米", "cm3": "立方厘米", "ha": "公顷", "L": "升", "l": "升", "mL": "毫升", "ml": "毫升",
    "ML": "毫升", "dL": "分升", "cc": "毫升 西西", "h": "小时 个小时", "hr": "小时 个小时", "hrs": "小时 个小时",
    "min": "分钟 分", "mins": "分钟 分", "s": "秒", "sec": "秒", "ms": "毫秒", "us": "微秒", "μs": "微秒",
    "ns": "纳秒", "°C": "摄氏度 度", "°F": "华氏度 度", "°": "度", "K": "开尔文 千", "Hz": "赫兹 赫",
    "kHz": "千赫兹 千赫", "KHz": "千赫兹 千赫", "MHz": "兆赫兹 兆赫", "GHz": "吉赫兹 吉赫 千兆赫兹", "W": "瓦 瓦特 万",
    "w": "万 瓦 瓦特", "kW": "千瓦", "KW": "千瓦", "kw": "千瓦", "MW": "兆瓦", "GW": "吉瓦",
    "kWh": "千瓦时 度 千瓦小时", "kwh": "千瓦时 度 千瓦小时", "Wh": "瓦时", "V": "伏 伏特", "v": "伏 伏特",
    "kV": "千伏", "mV": "毫伏", "A": "安 安培", "mA": "毫安", "mAh": "毫安时 毫安", "MAH": "毫安时 毫安",
    "mah": "毫安时 毫安", "Ω": "欧 欧姆", "kΩ": "千欧", "Pa": "帕 帕斯卡", "kPa": "千帕", "MPa": "兆帕", "hPa": "百帕",
    "mmHg": "毫米汞柱", "bar": "巴", "N": "牛 牛顿", "J": "焦 焦耳", "kJ": "千焦", "KJ": "千焦", "cal": "卡 卡路里",
    "kcal": "千卡 大卡", "dB": "分贝", "db": "分贝", "B": "字节", "KB": "千字节", "kb": "千字节", "MB": "兆 兆字节",
    "M": "兆 百万", "GB": "吉 吉字节 个吉", "TB": "太字节", "Mbps": "兆比特每秒 兆", "kbps": "千比特每秒",
    "Gbps": "吉比特每秒", "bps": "比特每秒", "rpm": "转每分 转每分钟", "r/min": "转每分 转每分钟", "kW·h": "千瓦时 度",
    "px": "像素", "fps": "帧", "mol": "摩尔 摩", "mmol": "毫摩尔 毫摩", "ppm": "百万分之", "kgf": "公斤力",
    "hp": "马力", "cd": "坎德拉", "lm": "流明", "lx": "勒克斯",
}  # fmt: skip
ZH_CURRENCIES = {
    "$": "美元 美金 刀", "US$": "美元 美金", "USD": "美元 美金", "HK$": "港元 港币", "HKD": "港元 港币",
    "¥": "元 块 块钱 元人民币", "RMB": "元 元人民币 块 块钱", "CNY": "元 元人民币", "€": "欧元", "EUR": "欧元",
    "£": "英镑", "GBP": "英镑", "NT$": "新台币 台币", "JPY": "日元", "₩": "韩元", "₽": "卢布", "฿": "泰铢",
}  # fmt: skip
EN_CURRENCIES = {
    "$": "dollar cent", "US$": "dollar cent", "USD": "dollar cent", "HK$": "dollar cent", "£": "pound penny",
    "GBP": "pound penny", "€": "euro cent", "EUR": "euro cent", "¥": "yuan fen", "RMB": "yuan fen", "CNY": "yuan fen",
}  # fmt: skip
# Readings of a sign between two numbers or next to letters. "" means that the sign is not read.
ZH_SIGNS = {
    "+": ("加", "正"), "*": ("乘", "乘以", ""), "×": ("乘", "乘以", ""), "x": ("乘", "乘以", "x"), "±": ("正负",),
    "÷": ("除以",), "=": ("等于", "是", "得"), "<": ("小于",), ">": ("大于",), "≤": ("小于等于", "小于或等于"),
    "≥": ("大于等于", "大于或等于"), "≈": ("约等于",), "≠": ("不等于",), ":": ("比",),
    "/": ("", "斜杠", "斜线", "或", "每", "杠"), "&": ("和", "and", "与", ""), "@": ("艾特", "at", "圈a", ""),
    "^": ("的",), "_": ("下划线", ""), "·": ("", "点"), "#": ("", "井号", "井"), "%": ("百分号",), "~": ("到", "至"),
    ".": ("点", ""),
}  # fmt: skip
EN_SIGNS = {
    "+": ("plus",), "*": ("times",), "×": ("times", "by"), "x": ("times", "by", "x"), "±": ("plus or minus",),
    "÷": ("divided by",), "=": ("equals", "is", "is equal to"), "<": ("less than", "is less than"),
    ">": ("greater than", "is greater than"), "≤": ("less than or equal to",), "≥": ("greater than or equal to",),
    "≈": ("approximately",), "≠": ("is not equal to",), ":": ("to",), "/": ("slash", "or", "per", ""), "&": ("and",),
    "@": ("at",), "^": ("to the power of",), "_": ("underscore", ""), "·": ("", "dot"),
    "#": ("number", "hash", "hashtag", ""), "%": ("percent",), "~": ("to",), ".": ("dot", "point", ""),
}  # fmt: skip
EN_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
EN_ABBREVIATIONS = {
    "mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint street", "prof": "professor", "vs": "versus",
    "etc": "et cetera", "jr": "junior", "sr": "senior", "ave": "avenue", "rd": "road", "dept": "department",
    "sept": "september",
} | {month[:3]: month for month in EN_MONTHS if month != "may"}  # fmt: skip


@lru_cache(maxsize=4096)
def library_template(unit: str, language: str) -> str | None:
    """Return wetext's reading of a quantity in a unit, with ``{}`` for the number, or None if it lacks the unit."""
    from wetext import normalize

    number, reading = {"zh": "五", "en": "five"}[language], normalize(f"5{unit}", lang=language, operator="tn")
    letters = any(c.isascii() and c.isalpha() for c in reading)
    if language == "en" and reading == f"five {unit}" and unit.endswith("s"):  # mins, hrs
        reading = normalize(f"5{unit[:-1]}", lang=language, operator="tn")
    if reading.count(number) != 1 or (letters if language == "zh" else not reading.replace(" ", "").isalpha()):
        return None
    return reading.replace(number, "{}")
