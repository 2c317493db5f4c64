"""Write the hard test set, hard.jsonl: long sentences, tongue-twisters, repetitions, rare syllables and numbers.

    python -m tiny_stack.hard_texts --output assets/tiny/data/hard.jsonl

The kinds are those of seed-tts-eval's test_hard; all texts were written for this project. Most are filled-in patterns,
drawn with a fixed seed. Each line has ``id`` (hard-KIND-NUMBER), ``kind`` and ``text``.

Characters are limited to those that the tiny recognisers know, and lengths to 26 syllables, about 7 s;
the training texts have at most 20.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tts_grpo.text.jsonl import write_text

SEED = 19
NUM_LONG, NUM_REPEATED, NUM_NUMBERS = 60, 50, 45

# Words that differ in one initial or final, which is easily confused: s/sh, z/zh, c/ch, n/l, f/h, -n/-ng
PAIRS = """
私人诗人 桑叶商业 搜集收集 三头山头 司机时机 早到找到 自立智力 综合中和 增光争光 资助支柱 阻力主力 自愿志愿
造就照旧 暂时战时 粗气出气 木材木柴 推辞推迟 从来重来 村庄春装 擦手插手 词序持续 牛年流年 无奈无赖 女客旅客
水牛水流 年代连带 留念留恋 开发开花 公费工会 防空航空 附注互助 废话会话 理发理化 发生花生 西服西湖 人民人名
信服幸福 亲生轻生 金鱼惊鱼 红心红星 临时零食 民生名声 弹琴谈情 反问访问 担心当心 开饭开放 木船木床 烂漫浪漫
鲜花香花 深水生水 人参人生 申明声明 伸张声张 长针长征
"""
TWISTERS = (
    "{a}不是{b}，{b}也不是{a}，别把{a}说成{b}。",
    "先说{a}再说{b}，说完{b}又说{a}，越说越快。",
    "左边写着{a}，右边写着{b}，{a}和{b}读起来不一样。",
    "你要{a}，我要{b}，他既要{a}又要{b}。",
    "会说{a}不会说{b}，会说{b}不会说{a}。",
    "问{a}的听成{b}，问{b}的听成{a}。",
)
DOUBLED = """
高高兴兴 快快乐乐 清清楚楚 明明白白 干干净净 整整齐齐 平平安安 来来往往 认认真真 大大小小 多多少少 安安静静
普普通通 轻轻松松 热热闹闹 老老实实 简简单单 开开心心 辛辛苦苦 急急忙忙 男男女女 日日夜夜 时时刻刻 家家户户
红红绿绿 地地道道 实实在在 客客气气 风风雨雨 走走停停 说说笑笑 上上下下
"""
REPLIES = "好对行来走快看听等慢吃喝是有"
PEOPLE = ("爸爸", "妈妈", "哥哥", "姐姐", "弟弟", "妹妹", "爷爷", "奶奶")
REQUESTS = (
    "别着急",
    "快回家",
    "关上门",
    "打电话",
    "带雨伞",
    "早点睡",
    "多喝水",
    "看着路",
    "拿钥匙",
    "慢慢说",
    "往前走",
    "小点声",
)
REPETITIONS = (
    "{d}，{e}，{f}，{d}的一天。",
    "{p}说{r}{r}{r}，{q}说{s}{s}{s}，我说{t}{t}{t}。",
    "{v}，{v}，{v}，{p}一连说了三遍{v}。",
    "{p}{d}地来，{q}{d}地走，都是{d}的。",
)
WHEN = """
昨天下午下课以后 去年冬天最冷的时候 今天早上天还没亮 吃完晚饭休息一会儿 每到周末没有事情 上个月月底的晚上
等大家都到齐了以后 春节放假的那几天
"""
WHO = """
邻居家的小男孩 住在楼上的老先生 我们班新来的同学 办公室里的年轻人 会唱歌的女售票员 哥哥最好的朋友
那位戴帽子的医生 超市门口的警察
"""
DID = """
在公园里跟人打篮球 给远方的朋友写了信 去火车站接客人回来 把旧报纸都卖掉了 坐地铁到图书馆还书 带着孩子去动物园
在厨房里包了饺子 去银行换了些零钱 骑车到郊区看风景 陪奶奶到医院检查
"""
THEN = """
回来时却忘了关灯 结果累得一句话也不说 一路上都没有休息 所以没接到你的电话 心里觉得特别高兴 顺便买了点儿水果
到现在还没有吃饭 可惜天忽然下起雨来
"""
RARE = """
她吹着口气，把脏水泼到了窄窄的墙角。
小鸟追着软软的柳条飞，差点儿撞上瓦盆。
娘把被子晒在院里，又洒水扫了地。
别乱扔瓜皮，谁踩上谁就会摔下去。
他俩躲在船尾，偷偷拈着零钱数。
嗓子坏了，就含片润嗓的糖，别再喊。
老驴歪着头，怪叫着追我们俩。
球滚进了森林，我钻进去找了半天。
穷人也有自尊，你不能那么横着看他。
他吞下药片，挪开瓢盆，又躺了下去。
佛像前的灯灭了，老人挪过去点上。
你夸他聪明，他反而谦虚得脸都红了。
他肯定是丢了卡，才急得团团转。
我恰好偶然路过，看见他摔出轨道。
把盆里的泥擦干净，再刷一遍墙。
他做了个怪梦，梦见自己被狗追着跑。
这条路绕得太远，不如拆了那堵墙。
旧船沉了，谁也没能捞起那几箱货。
弱小的猫抓着窗帘，怎么也不肯松手。
他捐了款，却略去了自己的姓名。
哈哈，你的帽子被风吹到塔顶上啦。
警察搜了三天，也没抓到那个人。
锅里的油炸得直响，快把火关小。
他跌了一下，手里的碗摔得粉碎。
是否肯来，你在几秒之内给个准话。
吃亏是福，谋财害命才是罪过。
他忘恩负义，大家都骂他不是人。
老牛吞草，小牛喝水，各干各的活。
她喘着粗气，弯腰把歪了的桑树扶正。
他掏出剪刀，捏着绳子剪断了它。
驴横着走，鱼倒着游，鸟飞着叫。
雪夜里窗户透风，冻得我直喊冷。
他嘴硬心软，骂完人又偷偷抹眼泪。
抓着绳子往上爬，摔下来可不得了。
把钻石藏在鞋里，亏你想得出来。
"""


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write")
    return parser.parse_args(argv)


def twisters(rng: random.Random) -> Iterator[str]:
    """One sentence per pair, the patterns in turn."""
    for number, pair in enumerate(PAIRS.split()):
        a, b = rng.sample((pair[:2], pair[2:]), 2)
        yield TWISTERS[number % len(TWISTERS)].format(a=a, b=b)


def repetitions(rng: random.Random) -> Iterator[str]:
    """Sentences with a syllable three times in a row, a phrase three times, or doubled words; the patterns in turn."""
    while True:
        for pattern in REPETITIONS:
            d, e, f = rng.sample(DOUBLED.split(), 3)
            p, q = rng.sample(PEOPLE, 2)
            r, s, t = rng.sample(REPLIES, 3)
            yield pattern.format(d=d, e=e, f=f, p=p, q=q, r=r, s=s, t=t, v=rng.choice(REQUESTS))


def long_sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of 22 to 26 characters, by two patterns in turn."""
    while True:
        when, who, did, then = (rng.choice(parts.split()) for parts in (WHEN, WHO, DID, THEN))
        yield f"{when}，{who}{did}。"
        yield f"{who}{did}，{then}。"


def numbers(rng: random.Random) -> Iterator[str]:
    """Sentences with dates, times, quantities, percentages and prices in digits."""
    n = rng.randint
    while True:
        yield f"会议从{n(1990, 2029)}年{n(1, 12)}月{n(1, 28)}日{n(8, 20)}:{n(10, 59)}开始。"
        yield f"价格从{n(101, 999)}元降到{n(11, 99)}元，便宜了{n(2, 89)}%。"
        yield f"水深{n(2, 19)}.{n(1, 9)}米，比前天涨了{n(21, 99)}厘米。"
        yield f"第{n(11, 99)}页到第{n(101, 199)}页共有{n(21, 89)}张图。"
        yield f"全长{n(1001, 9999)}公里，已经走了{n(11, 99)}.{n(1, 9)}%。"
        yield f"他今年{n(11, 99)}岁，身高1.{n(51, 99)}米，住{n(2, 29)}楼{n(101, 909)}号。"


def distinct(texts: Iterator[str], count: int) -> list[str]:
    """The first ``count`` different texts."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[next(texts)] = None
    return list(found)


def build() -> list[dict[str, str]]:
    """The rows of hard.jsonl."""
    kinds = {
        "long": distinct(long_sentences(random.Random(SEED)), NUM_LONG),
        "twister": list(twisters(random.Random(SEED))),
        "repeated": distinct(repetitions(random.Random(SEED)), NUM_REPEATED),
        "rare": RARE.split(),
        "number": distinct(numbers(random.Random(SEED)), NUM_NUMBERS),
    }
    return [
        {"id": f"hard-{kind}-{number:03d}", "kind": kind, "text": text}
        for kind, texts in kinds.items() for number, text in enumerate(texts)
    ]  # fmt: skip


def write_hard_set(output: Path) -> None:
    """Write hard.jsonl."""
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in build())
    write_text(output, "".join(lines))


def main(argv=None):
    args = get_args(argv)
    write_hard_set(args.output)


if __name__ == "__main__":
    main()
