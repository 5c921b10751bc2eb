"""Tables and figures from the records of `sampler_quality`."""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from sampler_candidates import OURS

SORTED_BY = 50  # network calls
LABELLED_OTHERS = 5  # of Diffusers, the best
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2")  # for our best

Records = list[dict[str, Any]]
Row = dict[int, dict[str, Any]]  # the records of one candidate and spacing, by budget


def rows_of(records: Records) -> list[Row]:
    """One row per candidate and spacing, best first; those that fail at the number of calls sorted by come last."""
    rows: dict[tuple[str, str], Row] = {}
    for record in records:
        rows.setdefault((record["candidate"], record["spacing"]), {})[record["budget"]] = record
    return sorted(rows.values(), key=error)


def error(row: Row, budget: int = SORTED_BY) -> float:
    return row.get(budget, {}).get("error", math.inf)


def best_spacings(rows: list[Row]) -> list[Row]:
    """The first row of each candidate, of rows in order."""
    best: dict[str, Row] = {}
    for row in rows:
        best.setdefault(any_record(row)["candidate"], row)
    return list(best.values())


def any_record(row: Row) -> dict[str, Any]:
    return next(iter(row.values()))


def by_target(results: dict[str, Any]) -> Iterator[tuple[str, Records]]:
    for target in dict.fromkeys(record["target"] for record in results["records"]):
        yield target, [record for record in results["records"] if record["target"] == target]


# ---- tables ---------------------------------------------------------------------------------------------------------


def write_tables(results: dict[str, Any], file: Path) -> None:
    text = [
        "# Samplers on laws whose best network is known",
        "",
        "Made by `python benchmarks/sampler_quality.py --out benchmarks/results`, which says what is measured.",
        f"Sorted by the error at {SORTED_BY} network calls, lower is better; the samplers of annealers are",
        "in italics, the best spacing of each candidate in bold, and ★ marks the best candidate that draws noise.",
        f"torch {results['settings']['torch']}, diffusers {results['settings']['diffusers']}.",
    ]
    for name, value in results["checks"].items():
        text += ["", f"{name[0].upper()}{name[1:]}: {_said(value)}."]
    for target, records in by_target(results):
        text += ["", f"## {target[0].upper()}{target[1:]}", "", *_table(records)]
    file.write_text("\n".join(line.rstrip() for line in text) + "\n")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_said(number)}" for name, number in value.items())
    if isinstance(value, list):
        return "; ".join(" ".join(map(_said, entry)) if isinstance(entry, list) else _said(entry) for entry in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(records: Records) -> list[str]:
    rows = rows_of(records)
    best = best_spacings(rows)
    stochastic = next((row for row in best if any_record(row)["stochastic"]), None)
    budgets = sorted({record["budget"] for record in records})
    more = _more_columns(records)
    header = ["sampler", "of", "noise", "spacing", *(f"{budget} calls" for budget in budgets)]
    header += [f"{column}, {SORTED_BY} calls" for column in more]
    lines = [
        f"{records[0]['unit']}, {records[0]['samples']} samples.",
        "",
        _line(header),
        _line(["---"] * len(header)),
    ]
    for row in rows:
        record = any_record(row)
        emphasis = "*" if record["family"] == OURS else ""
        cells = [
            ("★ " if row is stochastic else "") + emphasis + record["candidate"] + emphasis,
            record["family"],
            "yes" if record["stochastic"] else "no",
            f"**{record['spacing']}**" if any(row is other for other in best) else record["spacing"],
            *(_number(row.get(budget)) for budget in budgets),
            *(_number(row.get(SORTED_BY), column) for column in more),
        ]
        lines.append(_line(cells))
    failures = {f"{r['candidate']}, {r['spacing']}: {r['failed']}" for r in records if "failed" in r}
    return lines + [line for failure in sorted(failures) for line in ("", f"Failed: {failure}")]


def _more_columns(records: Records) -> list[str]:
    """Names of the measures besides the error, which are the ones with a standard error."""
    measured = next((record for record in records if "error" in record), {})
    return [name for name in measured if f"{name}, standard error" in measured and name != "error"]


def _number(record: dict[str, Any] | None, column: str = "error") -> str:
    if record is None or column not in record:
        return "failed" if record and "failed" in record else ""
    text = f"{record[column]:.3g}"
    if f"{column}, standard error" in record:
        text += f" ± {record[f'{column}, standard error']:.1g}"
    if column == "error" and record["calls"] != record["budget"]:
        text += f" ({record['calls']} calls)"
    return text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_network_table(results: dict[str, Any], name: str, folder: Path) -> None:
    """The table and figure of `sampler_digits`."""
    settings = results["settings"]
    floor = settings["floor: distance of as many training images"]
    text = [
        f"# Samplers on a network trained on {name}",
        "",
        "Made by `python benchmarks/sampler_digits.py`, which says what is measured. As many training images are at",
        f"{floor:.3f}. Sorted by the distance at {SORTED_BY} calls; annealers in italics, best spacing in bold, and ★",
        f"marks the best that draws noise. torch {settings['torch']}, diffusers {settings['diffusers']}.",
        "",
        *_table(results["records"]),
    ]
    (folder / f"samplers_{name}.md").write_text("\n".join(line.rstrip() for line in text) + "\n")
    figure = quality_figure(name, results["records"])
    figure.savefig(folder / f"samplers_{name}.png", dpi=130)
    plt.close(figure)


# ---- figures --------------------------------------------------------------------------------------------------------


def write_figures(results: dict[str, Any], folder: Path) -> None:
    for target, records in by_target(results):
        figure = quality_figure(target, records)
        figure.savefig(folder / f"samplers_{target.replace(' ', '_')}.png", dpi=130)
        plt.close(figure)


def quality_figure(title: str, records: Records) -> plt.Figure:
    """Error against network calls, each candidate on its best spacing: our best in colour, all others grey."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    best = best_spacings(rows_of(records))
    colours, labels, others = iter(COLOURS), [], 0
    for row in best:
        points = sorted((r["calls"], r["error"]) for r in row.values() if "error" in r)
        if not points:
            continue
        record = any_record(row)
        calls, errors = zip(*points, strict=True)
        text = f"{record['candidate']}, {record['spacing']}"
        dashes = "-" if record["stochastic"] else (0, (4, 2))
        if record["family"] == OURS:
            colour = next(colours, None)
            if colour is None:
                continue
            axes.loglog(calls, errors, color=colour, linestyle=dashes, marker="o", markersize=4, zorder=3)
            labels.append((errors[-1], text, colour, "bold"))
        else:
            axes.loglog(calls, errors, color="0.78", linestyle=dashes, marker=".", linewidth=1, zorder=2)
            others += 1
            if others <= LABELLED_OTHERS:
                labels.append((errors[-1], text, "0.45", "normal"))
    budgets = sorted({record["budget"] for record in records})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_ylim(top=2 * median(error(row, min(budgets)) for row in best))  # what is worse than all is off the figure
    axes.set_xlabel("network calls")
    axes.set_ylabel(records[0]["unit"])
    axes.set_title(f"{title}: annealers in colour (its best), diffusers grey; dashed: draws no noise", fontsize=10)
    axes.grid(True, which="major", color="0.93")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    label_line_ends(axes, max(r.get("calls", 0) for r in records), labels)
    return figure


def label_line_ends(axes: Axes, x: float, labels: list[tuple[float, str, str, str]]) -> None:
    """Writes (y, text, colour, weight) right of the axes, moved apart until no two overlap."""
    spacing, scale = 0.045, axes.transData + axes.transAxes.inverted()
    heights = [(scale.transform((x, y))[1], y, *style) for y, *style in labels]
    heights.sort()
    places = [height for height, *_ in heights]
    for _ in range(200):
        places[0] = max(places[0], 0)
        for i in range(1, len(places)):
            overlap = spacing - (places[i] - places[i - 1])
            if overlap > 0:
                places[i - 1] -= overlap / 2
                places[i] += overlap / 2
    for place, (_, y, text, colour, weight) in zip(places, heights, strict=True):
        axes.annotate(
            text,
            xy=(x, y),
            xycoords="data",
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            weight=weight,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )
