"""Writes the tables of docs/results.md, scale.md and statistics.md from stored results: `python -m benchmarks.tables`.

docs/results/<example>.json is the `replay.json` of a workspace; benchmarks/results.json what `python -m benchmarks`
wrote, benchmarks/results-scale.json what `python -m benchmarks.gallery_scale` wrote. Each table stands there between
two comments with its name. Nothing is typed in by hand.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("results.md", "scale.md", "statistics.md")
EXAMPLES = ("digits", "omniglot", "cifar100")


def history(name: str, result: dict[str, Any]) -> str:
    """One example: what was decided per generation, the matrix, and the controls beside it."""
    generations = [generation.split("-")[0] for generation in result["generations"]]
    lines = [
        f"**{name}**: AC {_number(result['ac'])} over constrained pairs, AM {_percent(result['am'])} %; "
        f"{result['seconds'] / 60:.1f} minutes.",
        "",
        "| | images | decision | self-test | served before | served after | NFR | tax | "
        + " | ".join(f"on {generation}" for generation in generations)
        + " |",
        "|---|---|---|" + "---|" * (5 + len(generations)),
    ]
    for place, line in enumerate(result["lines"]):
        decided = line["outcome"] + (f" {line['fraction']:.0%}" if line["outcome"] == "COMPATIBLE_ROLLOUT" else "")
        decided += " (backfill ordered)" if line["overridden"] else ""
        cells = [
            generations[place],
            f"{line['num_training_images']:,}",
            decided,
            _percent(line["self_test"]),
            _percent(line["served_before"]),
            _percent(line["served_after"]),
            _percent(line["nfr"]),
            "" if line["tax_points"] is None else f"{line['tax_points']:+.1f}",
            *map(_percent, result["matrix"][place]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if result["controls"]:
        lines += ["", *_controls(result, generations)]
    return "\n".join(lines)


def benchmarks(results: dict[str, dict[str, Any]]) -> str:
    """The ratios with their spread, target, hardware and date."""
    lines = ["| benchmark | ratio (spread) | target | hardware, date | what |", "|---|---|---|---|---|"]
    for name, found in sorted(results.items()):
        spread = f" ({found['lowest']} to {found['highest']})" if found["num_pairs"] > 1 else ""
        met = found["target"] + ("" if found["meets_target"] else ": missed")
        lines.append(
            f"| {name} | {found['ratio']}{spread} | {met} | {found['hardware']}, {found['date']} | {found['note']} |"
        )
    return "\n".join(lines)


def scale(stored: dict[str, Any]) -> str:
    """Seconds of every step at every size, and per million rows at the largest."""
    sizes = sorted(stored["sizes"], key=int)
    lines = ["| step | " + " | ".join(f"{int(size):,}" for size in sizes) + " |", "|---|" + "---|" * len(sizes)]
    for name in stored["sizes"][sizes[0]]:
        values = [stored["sizes"][size][name] for size in sizes]
        whole = name in ("files", "bytes on disk", "peak MiB")
        lines.append(f"| {name} | " + " | ".join(f"{v:,.0f}" if whole else f"{v:.3g} s" for v in values) + " |")
    told = (
        f"{stored['width']}-d, {stored['hardware']}, {stored['date']}; one run, `python -m benchmarks.gallery_scale`."
    )
    return "\n".join([*lines, "", told])


def labels(stored: dict[str, Any]) -> str:
    """Labels of everything and of what changed, per update and way."""
    lines = [
        "| update | re-embedded | other item | other answer | NFR, PFR | verdicts: flips, quality "
        "| labels of everything | of what changed | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in stored["updates"]:
        names = [row[name].split("-")[0] for name in ("champion", "candidate")]
        needed = [
            "not reached" if row[name] is None else f"{row[name]:,}"
            for name in ("labels_of_everything", "labels_of_changed")
        ]
        lines.append(
            f"| {row['data']} {' to '.join(names)} | {row['way']} | {_percent(row['changed_items'])} % | "
            f"{_percent(row['changed'])} % | {_percent(row['nfr'])} %, {_percent(row['pfr'])} % | "
            f"{', '.join(row['verdicts'].values())} | {needed[0]} | {needed[1]} | "
            f"{'' if row['ratio'] is None else row['ratio']} |"
        )
    return "\n".join([*lines, "", f"{stored['note']} {stored['hardware']}, {stored['date']}."])


def estimators(stored: dict[str, Any]) -> str:
    """Shares of runs that pass a flip limit, by two bounds."""
    lines = ["| queries of an identity | true NFR | passes: beginning | passes: product |", "|---|---|---|---|"]
    for row in stored["estimators"]:
        shares = " | ".join(f"{_percent(row[name])} %" for name in ("rate", "beginning", "product"))
        lines.append(f"| {row['shape']} | {shares} |")
    told = f"`python -m benchmarks.labels --estimators`, 400 runs, {stored['hardware']}, {stored['date']}."
    return "\n".join([*lines, "", told])


def _controls(result: dict[str, Any], generations: Sequence[str]) -> list[str]:
    lines = ["| control without constraints | AC | NFR between neighbours | self-tests | last on earlier galleries |"]
    lines.append("|---|---|---|---|---|")
    nfr = [result["nfr"][place][place + 1] for place in range(len(generations) - 1)]
    rows = [("*constrained, for comparison*", result["ac"], nfr, result["matrix"])]
    rows += [
        (c["name"].replace("_", " "), c["ac"], c["nfr_between_neighbours"], c["matrix"]) for c in result["controls"]
    ]
    for name, ac, flips, matrix in rows:
        own = " ".join(_percent(matrix[place][place]) for place in range(len(matrix)))
        last = " ".join(_percent(value) for value in matrix[-1][:-1])
        lines.append(f"| {name} | {_number(ac)} | {' '.join(map(_percent, flips))} | {own} | {last} |")
    return lines


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def with_tables(text: str) -> str:
    """The page's text with every table made anew from what is stored."""
    tables = {
        name: history(name, json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())) for name in EXAMPLES
    }
    tables["benchmarks"] = benchmarks(json.loads((ROOT / "benchmarks" / "results.json").read_text()))
    tables["scale"] = scale(json.loads((ROOT / "benchmarks" / "results-scale.json").read_text()))
    stored = json.loads((ROOT / "benchmarks" / "results-labels.json").read_text())
    tables |= {"labels": labels(stored), "estimators": estimators(stored)}
    for name, table in tables.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        block = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
        text = block.sub(lambda _, o=opening, t=table, c=closing: f"{o}{t}\n{c}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for name in PAGES:
        page = ROOT / "docs" / name
        page.write_text(with_tables(page.read_text()))
