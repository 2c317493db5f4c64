"""Plots as inline SVG with the colours and font of the page, and their values as tables."""

import dataclasses
import functools
import io
import itertools
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tts_grpo.evaluation.bootstrap import interval, ratio
from tts_grpo.evaluation.report.experiment import MODEL_TITLES, MODELS, Experiment, Utterance

matplotlib.use("svg")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.unicode_minus": True, "path.simplify": True,
}  # fmt: skip
# Placeholder colours that to_svg() replaces by the page's CSS variables.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
COLOURS = {"sft": "#010206", "grpo": "#010207"}
RUN_COLOURS = [f"#0102{number:02x}" for number in range(16, 22)]  # of several experiments, with DASHES from the 7th on
DASHES = ("", "6 2", "2 2", "8 2 2 2")
CSS = {INK: "--ink", MUTED: "--muted", GRID: "--rule", COLOURS["sft"]: "--sft", COLOURS["grpo"]: "--grpo"}
CSS |= {colour: f"--run{number}" for number, colour in enumerate(RUN_COLOURS)}
SIZE = (4.4, 2.75)  # inches of 72 CSS pixels: the width of a column, so that text is not scaled
MAX_BINS = 6  # maximum number of bins of utterance length
MAX_SMOOTHING_STEPS = 20  # maximum number of steps in a running mean

_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plot and its values.

    Attributes:
        title: what the plot shows, with unit.
        note: explanation; may be empty.
        head, rows: table of the values, formatted.
    """

    title: str
    note: str
    svg: str
    head: list[str]
    rows: list[list[str]]


def percent(value: float) -> str:
    return f"{value:.2%}"


def plain(value: float) -> str:
    return f"{value:.4g}"


def to_svg(figure: Figure, label: str) -> str:
    """Convert a figure to a labelled SVG element with the page's colours and font, and ids unique in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"plot{next(_numbers)}-"
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"font(?:-family)?: ?([\d.]+px )?'[^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", svg)
    for colour, variable in CSS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"|<svg ', lambda m: f"<svg {m[1] or ''}", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def new_axes(x_label: str, form: Callable[[float], str] | None = None, size=SIZE):
    """A figure with one pair of axes in the style of the report."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=MUTED)
    axes.tick_params(colors=MUTED, length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.margins(y=0.1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if form:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    return figure, axes


def styled(function):
    """Decorator that applies the report's matplotlib settings to the function only."""

    @functools.wraps(function)
    def wrapper(*arguments, **keywords):
        with matplotlib.rc_context(STYLE):
            return function(*arguments, **keywords)

    return wrapper


@styled
def drops(experiment: Experiment) -> Plot | None:
    """Relative drop of each error rate with its interval; None if there are no intervals."""
    summary = experiment.summary
    names = [name for name in experiment.metrics if summary["relative_drop_ci"].get(name)]
    if not names:
        return None
    figure, axes = new_axes("relative drop of the error rate", size=(SIZE[0], 1.1 + 0.42 * len(names)))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.axvline(0, color=INK, linewidth=1)
    rows = []
    for y, name in enumerate(names):
        drop, (low, high) = summary["relative_drop"][name], summary["relative_drop_ci"][name]
        axes.plot([low, high], [y, y], color=COLOURS["grpo"], linewidth=2.5, solid_capstyle="butt")
        axes.plot([drop], [y], "o", color=COLOURS["grpo"], markersize=7)
        rows.append([experiment.metrics[name], f"{drop:.1%}", f"{low:.1%} to {high:.1%}"])
    axes.set_yticks(range(len(names)), [experiment.metrics[name] for name in names], color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    title = "Relative drop of the error rates"
    note = "Dots with 95% intervals. Right of 0, GRPO is better. An interval that includes 0 is inconclusive."
    return Plot(title, note, to_svg(figure, title), ["metric", "relative drop", "95% interval"], rows)


@styled
def by_seed(experiment: Experiment) -> Plot | None:
    """The main metric for each seed and model; None if there is only one seed."""
    rates = {m: [experiment.scores[m]["seeds"][seed][experiment.main_metric]["rate"] for seed in experiment.seeds]
             for m in MODELS}  # fmt: skip
    if len(experiment.seeds) < 2:
        return None
    figure, axes = new_axes("sampling seed", lambda v: f"{v:.0%}" if v * 100 % 1 < 1e-6 else f"{v:.1%}")
    for model in MODELS:
        axes.plot(experiment.seeds, rates[model], "o", color=COLOURS[model], markersize=8)
        axes.axhline(np.mean(rates[model]), color=COLOURS[model], linewidth=1, dashes=(4, 3))
        axes.annotate(MODEL_TITLES[model], (1.0, np.mean(rates[model])), xycoords=("axes fraction", "data"),
                      xytext=(5, 0), textcoords="offset points", color=COLOURS[model], va="center")  # fmt: skip
    axes.set_ylim(0, 1.15 * max(rates["sft"] + rates["grpo"]) or 1)
    axes.margins(x=0.12)
    title = f"By seed: {experiment.metrics[experiment.main_metric]}"
    rows = [[seed, percent(a), percent(b)] for seed, a, b in zip(experiment.seeds, *rates.values(), strict=True)]
    note = "Dashed: mean over the seeds. The spread of one colour shows how much the result of a single seed can vary."
    return Plot(title, note, to_svg(figure, title), ["seed", *MODEL_TITLES.values()], rows)


def length_bins(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First and last length of at most ``MAX_BINS`` bins with similar numbers of utterances; no bin is empty."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, MAX_BINS + 1), method="inverted_cdf").astype(int))
    starts = [int(edges[0]), *(int(edge) + 1 for edge in edges[1:-1])]
    return list(zip(starts, [*(start - 1 for start in starts[1:]), int(edges[-1])], strict=True))


def rate_and_interval(utterances: list[Utterance], model: str, num_seeds: int) -> tuple[float, float, float]:
    """Error rate of a model, and its 95% interval by bootstrap over utterances."""
    fractions = np.array([(u.errors(model), u.length * num_seeds) for u in utterances], float)
    return ratio(fractions), *interval(fractions)


@styled
def by_length(experiment: Experiment) -> Plot:
    """Error rate by length of the text."""
    utterances = [u for u in experiment.utterances if u.length]
    bins = length_bins([u.length for u in utterances])
    figure, axes = new_axes("syllables or words per text, and number of utterances", lambda v: f"{v:.0%}")
    rows, ticks = [], []
    for x, (first, last) in enumerate(bins):
        members = [u for u in utterances if first <= u.length <= last]
        name = f"{first}–{last}" if last > first else f"{first}"
        ticks.append(f"{name}\n{len(members)}")
        row = [name, str(len(members))]
        for model, shift in zip(MODELS, (-0.12, 0.12), strict=True):
            rate, low, high = rate_and_interval(members, model, len(experiment.seeds))
            axes.plot([x + shift] * 2, [low, high], color=COLOURS[model], linewidth=2, solid_capstyle="butt")
            axes.plot([x + shift], [rate], "o", color=COLOURS[model], markersize=6.5)
            row.append(f"{percent(rate)} ({percent(low)} to {percent(high)})")
        rows.append(row)
    axes.set_xticks(range(len(bins)), ticks)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    title = f"By length of the text: {experiment.metrics[experiment.main_metric]}"
    note = (
        "Dots with 95% intervals; SFT is on the left, GRPO on the right. Below each length: the number of utterances."
    )
    return Plot(title, note, to_svg(figure, title), ["length", "utterances", *MODEL_TITLES.values()], rows)


@styled
def by_kind(experiment: Experiment) -> Plot:
    """Substitutions, deletions and insertions of the main metric, over all seeds."""
    kinds = ("substitutions", "deletions", "insertions")
    counts = {m: experiment.scores[m]["pooled"][experiment.main_metric] for m in MODELS}
    figure, axes = new_axes("", plain)
    for model, shift in zip(MODELS, (-0.2, 0.2), strict=True):
        bars = axes.bar(np.arange(3) + shift, [counts[model][kind] for kind in kinds], 0.36, color=COLOURS[model])
        axes.bar_label(bars, color=COLOURS[model], padding=2, fontsize=10)
    axes.set_xticks(range(3), kinds)
    axes.margins(y=0.12)
    title = f"By error type, count over all seeds: {experiment.metrics[experiment.main_metric]}"
    rows = [[kind, *(str(counts[m][kind]) for m in MODELS)] for kind in kinds]
    note = "SFT left, GRPO right. Deletions are missing in the transcript; insertions are not in the text."
    return Plot(title, note, to_svg(figure, title), ["error type", *MODEL_TITLES.values()], rows)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A plot of a training curve.

    Attributes:
        tags: patterns of TensorBoard tags; the first one that exists is drawn as a line.
        points: pattern of the validation's tag, drawn as circles, or "".
        form: formats a value.
        from_zero: whether the axis starts at 0.
    """

    title: str
    tags: tuple[str, ...] = ()
    points: str = ""
    form: Callable[[float], str] = plain
    from_zero: bool = True
    note: str = ""


def share(value: float) -> str:
    return f"{value:.1%}"


CURVES = (
    Curve("Reward", ("critic/score/mean",), r"val-core/.*/reward/mean@\d+", from_zero=False),
    Curve("Error rate in validation", (), r"val-aux/.*/pinyin_error_rate/mean@\d+", share,
          note="Of syllables (pinyin) and English words, with the reward's recogniser and its setting for tones."),
    Curve("Response length, tokens", ("response_length/mean",), r"val-aux/.*/num_speech_tokens/mean@\d+",
          from_zero=False),
    Curve("Truncated responses", ("response_length/clip_ratio",), form=share),
    Curve("Entropy, nats per token", ("actor/entropy", "actor/entropy_loss"), from_zero=False),
    Curve("KL between rollout and training policy", ("rollout_corr/kl", "training/rollout_kl"),
          note="Difference between the probabilities of the rollout engine and of the trained network."),
    Curve("KL of the update", ("actor/ppo_kl",),
          note="From the policy of the rollouts to the updated one. With one update per batch: rounding errors only."),
    Curve("KL to the SFT model", ("actor/kl_loss",)),
    Curve("Gradient norm", ("actor/grad_norm",)),
    Curve("Bad rollouts", ("rollouts/bad_rollout",), form=share,
          note="Rollouts without speech tokens, and those that no server could score. Their reward is 0."),
    Curve("Rollouts with an empty transcript", ("rollouts/empty_transcript",), form=share),
    Curve("Rollouts whose reward was requested again", ("rollouts/retried_rollout",), form=share),
    Curve("Rollouts decoded again in fp32", ("rollouts/rescored_rollout",), form=share,
          note="Rollouts whose speech overflowed in half precision."),
    Curve("Generated tokens that are no speech tokens", ("rollouts/other_tokens",), form=share),
    Curve("Seconds per step", ("timing_s/step",)),
)  # fmt: skip


def find_tag(scalars: dict, patterns: Sequence[str]) -> str | None:
    """The first tag with values that fully matches one of the patterns, in the order of the patterns."""
    return next((tag for pattern in patterns for tag in scalars if re.fullmatch(pattern, tag) and scalars[tag]), None)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a tenth of the values; the window is shorter at the ends."""
    half = min(MAX_SMOOTHING_STEPS, max(1, len(values) // 10)) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


@styled
def curve(spec: Curve, scalars: dict[str, list[tuple[int, float]]]) -> Plot | None:
    """Draw one training curve; None if the log has no values for it."""
    line, points = find_tag(scalars, spec.tags), find_tag(scalars, [spec.points] if spec.points else [])
    if line is None and points is None:
        return None
    figure, axes = new_axes("step", spec.form)
    by_step: dict[int, list[str]] = {}
    if line is not None:
        steps, values = map(np.array, zip(*scalars[line], strict=True))
        axes.plot(steps, values, color=COLOURS["grpo"], linewidth=0.9, alpha=0.45)
        axes.plot(steps, running_mean(values), color=COLOURS["grpo"], linewidth=2.2)
    if points is not None:
        steps, values = zip(*scalars[points], strict=True)
        axes.plot(steps, values, "o", color=INK, markersize=6, markerfacecolor="none", markeredgewidth=1.6, zorder=3)
    drawn = [tag for tag in (line, points) if tag is not None]
    for column, tag in enumerate(drawn):
        for step, value in scalars[tag]:
            by_step.setdefault(step, [""] * len(drawn))[column] = spec.form(value)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if spec.from_zero:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0)
    names = {line: "training", points: "validation"}
    rows = [[str(step), *cells] for step, cells in sorted(by_step.items())]
    return Plot(spec.title, spec.note, to_svg(figure, spec.title), ["step", *(names[tag] for tag in drawn)], rows)


def run_style(number: int) -> tuple[str, str]:
    """Colour and dashes (SVG's stroke-dasharray, "" for a solid line) of the curves of an experiment."""
    return RUN_COLOURS[number % len(RUN_COLOURS)], DASHES[number // len(RUN_COLOURS) % len(DASHES)]


@styled
def overlay(spec: Curve, runs: dict[str, dict[str, list[tuple[int, float]]]]) -> Plot | None:
    """Draw one training curve of several experiments; None if no log has values for it.

    The line is the running mean of the training, or the validation with circles if the training does not have it.

    Args:
        spec: the curve.
        runs: scalars of each experiment, by its name.
    """
    figure, axes = new_axes("step", spec.form)
    by_step: dict[int, list[str]] = {}
    for number, scalars in enumerate(runs.values()):
        tag = find_tag(scalars, spec.tags) or (find_tag(scalars, [spec.points]) if spec.points else None)
        if tag is None:
            continue
        steps, values = map(np.array, zip(*scalars[tag], strict=True))
        of_training = bool(find_tag({tag: scalars[tag]}, spec.tags))
        colour, dashes = run_style(number)
        (line,) = axes.plot(steps, running_mean(values) if of_training else values, color=colour, linewidth=1.8)
        if dashes:
            line.set_dashes([float(length) / 1.8 for length in dashes.split()])
        if not of_training:
            line.set(marker="o", markersize=5, markerfacecolor="none")
        for step, value in scalars[tag]:
            by_step.setdefault(step, [""] * len(runs))[number] = spec.form(value)
    if not by_step:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if spec.from_zero:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0)
    rows = [[str(step), *cells] for step, cells in sorted(by_step.items())]
    return Plot(spec.title, spec.note, to_svg(figure, spec.title), ["step", *runs], rows)


def overlays(runs: dict[str, dict[str, list[tuple[int, float]]]]) -> list[Plot]:
    """All training curves for which the log of an experiment has values, each of all experiments."""
    parts = {spec.title: spec for scalars in runs.values() for spec in part_curves(scalars)}
    specs = [CURVES[0], *parts.values(), *CURVES[1:]]
    return [plot for spec in specs for plot in [overlay(spec, runs)] if plot]


def part_curves(scalars: dict[str, list[tuple[int, float]]]) -> list[Curve]:
    """Curves of the parts of the reward, which the log names."""
    names = sorted({match[1] for tag in scalars if (match := re.fullmatch(r"reward_parts/(.*)/mean", tag))})
    specs = []
    for name in names:
        validation = rf"val-aux/.*/reward_parts/{re.escape(name)}/mean@\d+"
        specs.append(Curve(f"Reward: {name}", (f"reward_parts/{name}/mean",), validation, from_zero=False))
        specs.append(
            Curve(f"Groups that {name} does not tell apart", (f"reward_parts/{name}/equal_groups",), form=share,
                  note="Share of groups in which all rollouts have the same score, so that this part teaches nothing.")
        )  # fmt: skip
    return specs


def curves(scalars: dict[str, list[tuple[int, float]]]) -> list[Plot]:
    """All training curves that the log has values for."""
    specs = [CURVES[0], *part_curves(scalars), *CURVES[1:]]
    return [plot for spec in specs for plot in [curve(spec, scalars)] if plot]
