"""One self-contained HTML page about a search.

Its figures are inline SVG whose colours are the page's, so they follow it into the dark.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from statistics import median, stdev
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from nasbench.curves import draw_epochs, is_one_shot, known_sites
from nasbench.drawing import draw_front, draw_importances, draw_progress
from nasbench.errors import SettingError
from nasbench.files import atomic_write
from nasbench.graphs import draw
from nasbench.result import SearchResult, Trial
from nasbench.style import COLOURS, look, short_number, word
from search_spaces.base import Arch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(result: SearchResult, path: Path | None = None) -> Path:
    """Write one self-contained HTML page about a search and return its path.

    Args:
        path: default: report.html in the study's folder.

    Raises:
        SettingError: there is neither a path nor a folder.

    Example:
        >>> import tempfile
        >>> from search_spaces import ResNet
        >>> space = ResNet()
        >>> result = SearchResult(space, {"score": "maximize"}, [Trial(0, space.at(0), "complete", {"score": 0.5})])
        >>> write_report(result, Path(tempfile.mkdtemp()) / "report.html").read_text().startswith("<!DOCTYPE html>")
        True
    """
    if path is None:
        if result.folder is None:
            raise SettingError("this result has no folder for a report. Name a file: result.report('report.html').")
        path = result.folder / "report.html"
    page = _page(result)
    with atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # an error message may hold what UTF-8 cannot
    return path


def _page(result: SearchResult) -> str:
    objective = result.conditions.get("objective", {})
    on = f" on {objective['data']['name']}" if objective.get("kind") in ("train", "supernet") else ""
    first, several = next(iter(result.objectives)), len(result.objectives) > 1
    with look():
        sections = {
            "Pareto front" if several else "Best architectures": _architectures(result),
            "Trials on the front" if several else "Best trials": _best_trials(result),
            "Architecture weights over epochs" if known_sites(result) else "Supernet training": _epochs(result),
            "Progress": "" if is_one_shot(result) else _progress(result, first),
            "Trade-offs": "" if is_one_shot(result) else "".join(_trade_offs(result)),
            "What matters": _importances(result),
            "Trials": _counts(result),
            "Conditions": _conditions(result),
        }
    day, night = (";".join(f"--{name}:{pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    return _HTML.format(
        title=escape(f"Search of {type(result.space).__name__}{on}"),
        style=_CSS.replace("DAY", day).replace("NIGHT", night),
        summary=escape(_summary(result)),
        body="".join(f"<section><h2>{name}</h2>{text}</section>\n" for name, text in sections.items() if text),
    )


def _svg(figure: Figure, title: str) -> str:
    """Return a figure as inline SVG: in the page's colours and font, its ids its own."""
    text = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing, dpi=200)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for name, (colour, _) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    mark = f"g{crc32(svg.encode()):08x}-"
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def _summary(result: SearchResult) -> str:
    """Return what was searched, how, and what was found, in plain sentences."""
    size, objective = result.space.size, result.conditions.get("objective", {})
    of = f"{size:,}" if size < 10**9 else f"about 10^{len(str(size)) - 1}"
    strategy = result.conditions.get("strategy", {}).get("name")
    text = f"The strategy {strategy!r}" if strategy else "The search"
    paused = bool(result.epochs) and not result.trials
    if paused:
        text += f" has trained a supernet of {type(result.space).__name__} ({of} architectures)"
        text += f"{_supernet_training(result)}; nothing was evaluated yet"
    else:
        text += f" tried {_count(len(result.trials), 'architecture')} of {type(result.space).__name__} ({of} in all)"
    if objective.get("kind") == "train":
        text += f", each trained on {objective['data']['name']} for {_count(objective['recipe']['epochs'], 'epoch')}"
    elif objective.get("kind") == "supernet" and not paused:
        text += f", with the shared weights of a supernet trained{_supernet_training(result)}"
    elif objective.get("kind") == "table":
        text += ", each looked up in a table"
    elif objective.get("kind") == "function":
        text += f", each scored by {objective['function']}"
    aims = [f"{'highest' if way == 'maximize' else 'lowest'} {word(name)}" for name, way in result.objectives.items()]
    text += f". Sought: {', '.join(aims[:-1])}{' and ' if aims[1:] else ''}{aims[-1]}."
    if not result.complete:
        return text if paused else f"{text} No trial completed."
    if len(aims) > 1:
        count = _count(len(result.pareto()), "architecture")
        return f"{text} Found: {count} that no other beats in all of these at once."
    best = result.best
    return f"{text} Found: {short_number(best.metrics[next(iter(result.objectives))])}, in trial {best.number}."


def _supernet_training(result: SearchResult) -> str:
    """Say on what a supernet was trained, and for how many of its epochs, as far as either is known."""
    objective, trained = result.conditions.get("objective", {}), len(result.epochs)
    on = f" on {objective['data']['name']}" if "data" in objective else ""
    planned = objective.get("recipe", {}).get("epochs", trained)
    return f"{on} for {f'{trained:,} of ' if 0 < trained < planned else ''}{_count(planned, 'epoch')}"


def _ranked(result: SearchResult) -> list[Trial]:
    """Return the trials that were really evaluated, best first; of several objectives only the Pareto front."""
    name, direction = next(iter(result.objectives.items()))
    sign = 1 if direction == "maximize" else -1
    trials = result.pareto() if len(result.objectives) > 1 else result.complete
    return sorted((t for t in trials if t.copied_from is None), key=lambda t: (-sign * t.metrics[name], t.number))


def _architectures(result: SearchResult) -> str:
    """Draw the three best architectures that differ in canonical form, or six along the Pareto front."""
    distinct: dict[Arch, Trial] = {}
    for trial in _ranked(result):
        distinct.setdefault(result.space.canonical(trial.arch), trial)
        if len(result.objectives) == 1 and len(distinct) == 3:
            break
    trials = list(distinct.values())
    shown = [trials[i] for i in sorted({round(i) for i in np.linspace(0, len(trials) - 1, min(6, len(trials)))})]
    some = f"<p>{len(shown)} of the {len(trials)} that differ in canonical form, evenly along the front.</p>"
    figures = []
    for trial in shown:
        metrics = " · ".join(f"{_word(name, result)} {_metric(trial, name)}" for name in _names([trial], result))
        grown = "" if trial.parent is None else f", grown from trial {trial.parent}"
        caption = f"<b>Trial {trial.number}</b>{grown} · {escape(metrics)}"
        caption += f"<br><code>{escape(trial.arch.to_json())}</code>"
        figure = draw(result.space, trial.arch)
        width = max(figure.get_figwidth(), 2.1)
        picture = _svg(figure, f"Architecture of trial {trial.number}")
        figures.append(f'<figure style="width:{width:.2f}in">{picture}<figcaption>{caption}</figcaption></figure>')
    row = f'<div class="row">{"".join(figures)}</div>' if figures else ""
    return some + row if len(shown) < len(trials) else row


def _best_trials(result: SearchResult) -> str:
    ranked = _ranked(result)
    trials = ranked[:10]
    names = _names(trials, result)
    rows = [[str(t.number), *(_metric(t, name) for name in names), _duration(t.seconds)] for t in trials]
    head = ["trial", *(_word(name, result) for name in names), "time"]
    if any(t.parent is not None for t in trials):
        head.append("grown from")
        rows = [[*row, "" if t.parent is None else str(t.parent)] for row, t in zip(rows, trials, strict=True)]
    text = _table(rows, head, "numbers") if trials else ""
    if len(ranked) > 10 and len(result.objectives) > 1:
        text += f"<p>10 of {len(ranked)}, best {escape(word(names[0]))} first.</p>"
    if any(len(t.runs) > 1 for t in trials):
        text += "<p>Means of several training runs, ± their standard deviation.</p>"
    return text


def _epochs(result: SearchResult) -> str:
    if not result.epochs:
        return ""
    if not known_sites(result):
        return f'<div class="wide">{_svg(draw_epochs(result), "Training of the supernet over epochs")}</div>'
    note = "Thicker: the option that leads in the end. Probabilities are shares, which need not decide alone."
    if known_sites(result, result.space.edge_sites):
        note += " The weight of an edge scales all that it carries."
    picture = _svg(draw_epochs(result), "Probability of every option over epochs")
    return f'<div class="wide">{picture}</div><p>{note}</p>'


def _progress(result: SearchResult, name: str) -> str:
    return _svg(draw_progress(result, name), f"Best {word(name)} so far over finished trials")


def _trade_offs(result: SearchResult) -> Iterator[str]:
    """Draw the Pareto front of the objectives, and accuracy against what it costs."""
    pairs = [list(result.objectives)] if len(result.objectives) > 1 else []
    pairs += [["val_accuracy", cost] for cost in ("macs", "params")]
    measured = set[str]().union(*(t.metrics for t in result.complete))
    for i, names in enumerate(pairs):
        if measured.issuperset(names) and set(names) not in map(set, pairs[:i]):
            yield _svg(draw_front(result, names), f"Pareto front of {' and '.join(map(word, names))}")


def _importances(result: SearchResult) -> str:
    figure = draw_importances(result)
    if figure is None:
        return ""
    note = "An estimate from the trials of this search: the fewer and the more alike they are, the rougher."
    return f"{_svg(figure, 'Importance of every decision')}<p>{note}</p>"


def _counts(result: SearchResult) -> str:
    """Say how many trials ended how, why, and how long they took."""
    states = Counter(t.state for t in result.trials)
    copies = sum(t.copied_from is not None for t in result.trials)
    complete = f"{states['complete']:,} complete"
    if copies:
        complete += f" ({copies:,} of them copied from an equal architecture)"
    parts = [complete, *(f"{states[state]:,} {state}" for state in ("pruned", "failed"))]
    text = f"<p>{', '.join(parts)}.</p>" if result.trials or not result.epochs else "<p>None yet.</p>"
    # Reasons that differ in numbers only are one kind; the first stands for all.
    kinds: dict[tuple[str, str], list[str]] = {}
    for trial in result.trials:
        if trial.reason:
            kind = re.sub(r"(?<![\w<>=.])-?\d[\w.+]*", "#", trial.reason)
            kinds.setdefault((trial.state, kind), []).append(trial.reason)
    rows = []
    for (state, _), reasons in sorted(kinds.items(), key=lambda item: -len(item[1]))[:8]:
        rows.append([state, f"{len(reasons):,}", reasons[0][:300] + (" (and similar)" if len({*reasons}) > 1 else "")])
    text += _table(rows, ["state", "trials", "reason"]) if rows else ""
    if trained := result.epochs and result.epochs[-1].get("seconds"):
        scored = result.epochs[-1].get("scoring_seconds")
        of_it = f", {_duration(scored)} of it for scoring its choice after every epoch" if scored else ""
        text += f"<p>Training the supernet took {_duration(trained)}{of_it}.</p>"
    seconds = [t.seconds for t in result.trials if t.seconds is not None and t.copied_from is None]
    if seconds:
        text += f"<p>Evaluating took {_duration(sum(seconds))}"
        if len(seconds) > 1:
            text += f" in all, {_duration(median(seconds))} for the median trial, {_duration(max(seconds))} for the"
            text += " longest"
        text += ".</p>"
    return text


def _conditions(result: SearchResult) -> str:
    found = {"space": json.loads(result.space.to_json()), "objectives": result.objectives} | result.conditions
    objective = found.pop("objective", {})
    rows = [*found.items(), *(("evaluation" if key == "kind" else key, value) for key, value in objective.items())]
    return _table([[key.replace("_", " "), _inline(value)] for key, value in rows])


# Words -------------------------------------------------------------------------------------------------------------


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), kind: str = "words") -> str:
    """Return an HTML table of plain texts; numbers stand right."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if head else []
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def _names(trials: Iterable[Trial], result: SearchResult) -> list[str]:
    """Return the metrics that these trials have, objectives first."""
    return list(dict.fromkeys([*result.objectives, *(name for trial in trials for name in trial.metrics)]))


def _word(name: str, result: SearchResult) -> str:
    """Return a metric's name in plain words; those that a table adds to a one-shot search say where they are from."""
    looked_up = {"table_value": "value in the table", "rank": "rank in the table"} if result.epochs else {}
    return looked_up.get(name) or word(name)


def _metric(trial: Trial, name: str) -> str:
    """Return a metric as text, with its spread over seeds if there were several."""
    if name not in trial.metrics:
        return ""
    runs = [run[name] for run in trial.runs if name in run]
    spread = stdev(runs) if len(runs) > 1 else None
    plus_minus = "" if spread is None else f" ± {spread:.2g}" if spread < 100 else f" ± {spread:,.0f}"
    return short_number(trial.metrics[name]) + plus_minus


def _inline(value: Any) -> str:
    """Return settings as a line of text."""
    if isinstance(value, Mapping):
        parts = []
        for key, entry in value.items():
            text = f"({_inline(entry)})" if isinstance(entry, Mapping) else _inline(entry)
            parts.append(text if key in ("space", "name") else f"{key} {text}")
        return ", ".join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(map(_inline, value)) or "none"
    return "none" if value is None else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return "under 0.1 s" if seconds < 0.1 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


_CSS = """
:root{color-scheme:light dark;DAY}
@media(prefers-color-scheme:dark){:root{NIGHT}}
body{margin:0 auto;max-width:46rem;padding:1.5rem 1rem 4rem;background:var(--paper);color:var(--ink);
 font:1rem/1.55 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:1rem 0 .5rem}
h2{font-size:1.05rem;margin:2.75rem 0 .75rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
p{margin:.5rem 0}
section p,figcaption{color:var(--muted);font-size:.9rem}
svg{max-width:100%;height:auto;display:block}
svg text{font-family:system-ui,sans-serif!important}
@media(max-width:34rem){section>svg text{font-size:9.6px!important}}
.row{display:flex;flex-wrap:wrap;gap:1.5rem}
figure{margin:0;max-width:100%;overflow-x:auto}
figure svg{max-width:none}
figcaption b{color:var(--ink)}
code{font-size:.8rem;overflow-wrap:anywhere}
.wide{overflow-x:auto}
.wide>svg{min-width:33rem;max-width:none;width:100%}
section>svg{width:100%;margin-bottom:1.5rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.35rem 1.25rem .35rem 0;border-bottom:1px solid var(--line)}
th,td:first-child{color:var(--muted);font-weight:400}
.numbers{width:100%}
.numbers th,.numbers td{text-align:right;white-space:nowrap;padding:.35rem 0 .35rem 1.25rem}
.numbers td:first-child,.numbers th:first-child{padding-left:0}
"""

_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{body}</body>
</html>
"""
