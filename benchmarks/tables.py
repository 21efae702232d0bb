"""Writes the tables of the pages from stored results: `python -m benchmarks.tables`.

docs/results/<example>.json is the `replay.json` of a workspace; benchmarks/results.json what `python -m benchmarks`
wrote, results-scale.json and results-error-rates.json beside it what `benchmarks.gallery_scale` and
`benchmarks.error_rates` wrote. Each table stands there between two comments with its name. Nothing is typed in by hand.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import summary
from benchmarks.congruent import AMOUNTS, WAYS
from benchmarks.error_rates import RUNS, RUNS_DECISION, RUNS_POWER, exceeds
from graceful.flows.terminal import network_text

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "operation.md",
    "results.md",
    "scale.md",
    "statistics.md",
    "error_rates.md",
    "comparison.md",
    "howto/congruent.md",
    "howto/edge.md",
)
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


def schedule(stored: dict[str, Any]) -> str:
    """What waited on a schedule that is due more often than an update can end."""
    states = ", ".join(f"{count} {state}" for state, count in stored["states"].items())
    cron, slept = stored["cron"], f"{stored['update_s']:g} s"
    return (
        f'{stored["minutes"]:g} minutes of `cron = "{cron}"` with updates that sleep {slept}: in {stored["looks"]} '
        f"looks at the flow server at most {stored['most_waiting']} run waited. "
        f"All runs: {states}. The service ended with {stored['ended_with']} at SIGTERM "
        f"(`python -m benchmarks schedule`, {stored['hardware']}, {stored['date']})."
    )


def search_load(stored: dict[str, Any]) -> str:
    """What image clients and a probe of the health saw, round by round, before and after a change."""
    head = [
        "| | images a second | failed | `/health` median, ms | 99 of 100, ms | longest, ms |",
        "|---|---|---|---|---|---|",
    ]
    rows = [
        f"| {name} | {one['per_second']} | {one['failed']} | {_ms(one['health_p50_s'])} | {_ms(one['health_p99_s'])} | "
        f"{_ms(one['health_max_s'])} |"
        for name, rounds in stored["rounds"].items()
        for one in rounds["images"]
    ]
    told = (
        f"{stored['clients']['images']} image clients for {stored['seconds']:g} s, in turn with commit "
        f"{stored['before']}; load average {stored['load_average']:.0f} at the end, most of it other work "
        f"(`python -m benchmarks.search_load --before {stored['before']}`, {stored['hardware']}, {stored['date']})."
    )
    return "\n".join([told, "", *head, *rows])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


def error_rates(stored: dict[str, Any]) -> str:
    """Every cell that exceeds its level, the worst of the others, and the named ones."""
    cells = sorted(stored["cells"], key=lambda cell: -cell.get("false_again", cell["false"]) / cell["level"])
    above, again = [cell for cell in cells if exceeds(cell)], [cell for cell in cells if "false_again" in cell]
    shown = [*above, *(cell for cell in again if cell not in above)]
    shown += [cell for cell in cells if cell["name"] and cell not in shown]
    head = ["| | false passes, % | again | level | s.e. | at half | at zero |", "|---|---|---|---|---|---|---|"]
    told = (
        f"{len(cells):,} cells; {len(again)} were above their level by more than two standard errors and were "
        f"simulated again with fresh draws, {len(above)} were so again (**bold**). At least {RUNS_DECISION} runs a "
        f"cell, most {RUNS}; `{stored['command']}`, {stored['hardware']}, {stored['date']}, "
        f"{stored['seconds'] / 60:.0f} minutes. Passes at half the limit and at zero: {RUNS_POWER} runs."
    )
    return "\n".join([told, "", *head, *map(_error_rate, shown)])


def _error_rate(cell: dict[str, Any]) -> str:
    again = _percent(cell.get("false_again"))
    power = [_whole(cell.get("power_half")), _whole(cell.get("power_zero"))]
    mark = "**" if exceeds(cell) else ""
    numbers = [_percent(cell["false"]), f"{mark}{again}{mark}" if again else "", _percent(cell["level"])]
    return "| " + " | ".join([_cell(cell), *numbers, _percent(cell["standard_error"]), *power]) + " |"


def _cell(cell: dict[str, Any]) -> str:
    """One situation in words."""
    sizes = ", log-normal sizes" if cell["sizes"] == "lognormal" else ""
    alike = "half of an identity lost" if cell["losses"] == "halves" else f"ICC {cell['icc']:g}"
    states = f", {cell['num_states']} states" if cell["num_states"] > 1 else ""
    name = f" ({cell['name']})" if cell["name"] else ""
    return (
        f"{cell['guard']} {100 * cell['limit']:g} %: {cell['num_queries']:,} of {cell['num_identities']:,}{sizes}, "
        f"{alike}, {cell['losses']}{states}{name}"
    )


def error_rate_groups(stored: dict[str, Any]) -> str:
    """Mean and highest rate of false passes, and mean power, by what the cells have in common."""
    lines = ["| cells | number | mean, % | highest | level | at half | at zero |", "|---|---|---|---|---|---|---|"]
    for guard in ("NFR", "quality"):
        of_guard = [cell for cell in stored["cells"] if cell["guard"] == guard]
        for what in ("icc", "num_identities", "sizes", "losses", "num_states"):
            for value in sorted({cell[what] for cell in of_guard}):
                cells = [cell for cell in of_guard if cell[what] == value]
                final = [cell.get("false_again", cell["false"]) for cell in cells]
                half, zero = ([cell[name] for cell in cells if name in cell] for name in ("power_half", "power_zero"))
                text = {"icc": "ICC", "num_identities": "identities", "num_states": "states"}.get(what, what)
                means = [_whole(sum(powers) / len(powers)) if powers else "" for powers in (half, zero)]
                row = [f"{guard}, {text} {value}", str(len(cells)), _percent(sum(final) / len(final))]
                row += [_percent(max(final)), _percent(cells[0]["level"]), *means]
                lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def null_series(stored: dict[str, Any]) -> str:
    """One of five null candidates passes, before and after the error level was shared."""
    lines = ["| five null candidates | each has alpha, % | they share it, % |", "|---|---|---|"]
    for row in stored["series"]:
        hard = "the same identities are hard" if row["shared"] else "fresh draws"
        lines.append(f"| {_cell({**row, 'name': hard})} | {_percent(row['without'])} | {_percent(row['with'])} |")
    return "\n".join([*lines, "", f"NFR exactly 2 %, level 2.5 %, {stored['series'][0]['runs']} runs."])


def spending_price(stored: dict[str, Any]) -> str:
    """Power at each look."""
    looks = list(stored["prices"][0]["looks"])
    lines = ["| passes, % | no plan | " + " | ".join(f"look {look}" for look in looks) + " |"]
    lines.append("|---|---|" + "---|" * len(looks))
    for row in stored["prices"]:
        truth = "half the limit" if row["guard"] == "NFR" else "no difference"
        cells = [_whole(row["none"]), *(_whole(row["looks"][look]) for look in looks)]
        lines.append(f"| {_cell({**row, 'name': truth})} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _whole(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


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


def comparison(stored: dict[str, Any], data: str, encoders: int) -> str:
    """Chains and ways of serving them with as many encoder runs per query; means over seeds, half 95 % intervals."""
    lines = [
        "| training | search | last self-test | mean over the backfill | NFR at 0, 50, 100 % | AC | smallest margin "
        "| AM | ceiling attained | CPU s | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in stored["rows"][data] if round(row["encoders"]["mean"]) == encoders]
    for row in sorted(rows, key=lambda row: -row["backfill"]["mean"]):
        nfr = " ".join(f"{100 * value:.1f}" for value in row["nfr"]["mean"])
        ac, margin, mean, attained = "", "", "", ""
        if "ac" in row:
            ac = f"{row['ac']['mean']:.2f} ({row['above_error']['mean']:.2f})"
            margin = f"{100 * row['smallest_margin']['mean']:+.1f} (s.e. {100 * row['its_error']['mean']:.1f})"
            mean = _percent(row["am"]["mean"])
            attained = f"{row['attained']['mean']:.2f}" if "attained" in row else ""
        lines.append(
            f"| {row['chain']} | {row['way']} | {_spread(row['last'])} | {_spread(row['backfill'])} | {nfr} | {ac} "
            f"| {margin} | {mean} | {attained} | {row['seconds']['mean']:.0f} | {row['seeds']} |"
        )
    measured = sorted({f"{row['hardware']}, {row['measured']}" for row in rows})
    return "\n".join([*lines, "", f"{'; '.join(measured)}."])


def chosen_by(stored: dict[str, Any], data: str) -> str:
    """The same columns on dev, of plain searches: what the default is chosen by."""
    lines = ["| training | last self-test | mean over the backfill | NFR at 0, 50, 100 % | AC | seeds |"]
    lines.append("|---|---|---|---|---|---|")
    rows = [(row["chain"], row["on_dev"]) for row in stored["rows"][data] if "on_dev" in row]
    for chain, row in sorted(rows, key=lambda named: -named[1]["backfill"]["mean"]):
        nfr = " ".join(f"{100 * value:.1f}" for value in row["nfr"]["mean"])
        ac = f"{row['ac']['mean']:.2f} ({row['above_error']['mean']:.2f})"
        lines.append(
            f"| {chain} | {_spread(row['last'])} | {_spread(row['backfill'])} | {nfr} | {ac} | {row['seeds']} |"
        )
    return "\n".join(lines)


def long_chains(stored: dict[str, Any], data: str) -> str:
    """Chains of many generations: self-tests on the way, and what the last one reads."""
    rows = stored["rows"].get(data, [])
    last = max((len(row["self_tests"]["mean"]) for row in rows), default=0)
    shown = [t for t in range(1, last + 1) if t == 1 or t % max(last // 5, 1) == 0]
    lines = [
        f"| training | {' | '.join(f'self-test g{t:03d}' for t in shown)} | mean over the backfill | NFR at 100 % | AC "
        "| smallest margin | CPU s | seeds |",
        "|---" * (len(shown) + 7) + "|",
    ]
    for row in sorted(rows, key=lambda row: -row["last"]["mean"]):
        tests = " | ".join(_percent(row["self_tests"]["mean"][t - 1]) for t in shown)
        lines.append(
            f"| {row['chain']} | {tests} | {_spread(row['backfill'])} | {100 * row['nfr']['mean'][-1]:.1f} "
            f"| {row['ac']['mean']:.2f} ({row['above_error']['mean']:.2f}) "
            f"| {100 * row['smallest_margin']['mean']:+.1f} (s.e. {100 * row['its_error']['mean']:.1f}) "
            f"| {row['seconds']['mean']:.0f} | {row['seeds']} |"
        )
    measured = sorted({f"{row['hardware']}, {row['measured']}" for row in rows})
    return "\n".join([*lines, "", f"{'; '.join(measured)}."])


def congruent(stored: dict[str, Any], data: str) -> str:
    """Ways of training one update, by how many images of a class it has; means over seeds, half 95 % intervals."""
    lines = [
        "| images of a class | update | self-test | gain | cross-test | NFR | classifier right | its NFR | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = [(amount, way.name) for amount in AMOUNTS for way in WAYS]
    rows = [row for row in stored["rows"] if row["data"] == data]
    rows.sort(key=lambda row: order.index((row["images"], row["way"])))
    for row in rows:
        cells = (row["images"], row["way"], _spread(row["self_test"]), f"{100 * row['gain']['mean']:+.1f}")
        cells += tuple(_spread(row[name]) for name in ("cross_test", "nfr", "classified", "classifier_nfr"))
        lines.append(f"| {' | '.join(cells)} | {row['seconds']['mean']:.0f} |")
    seeds, measured = {row["seeds"] for row in rows}, sorted({f"{row['hardware']}, {row['measured']}" for row in rows})
    return "\n".join([*lines, "", f"{max(seeds, default=0)} seeds; {'; '.join(measured)}."])


def edge_architectures(stored: dict[str, Any], data: str) -> str:
    """Ways of choosing a small network: what they chose, trained alike; means over seeds, half 95 % intervals."""
    found_by = _by_way(stored, data)
    if not found_by:
        return _UNMEASURED
    lines = [
        "| chosen by | tried | CPU s of choosing | self-test | on the large network's vectors | product "
        "| multiply-adds | weights | chosen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, rows in found_by.items():
        if way == "generation":
            continue
        found = summary([{name: row[name] for name in row if name not in _WORDS} for row in rows])
        networks = "; ".join(network_text(row["architecture"]) for row in rows)
        cells = [_spread(found[name]) for name in ("self_test", "cross_test", "reward")]
        counts = [f"{found[name]['mean']:,.0f}" for name in ("multiply_adds", "parameters")]
        lines.append(
            f"| {way} | {found['tried']['mean']:.0f} | {found['choosing_seconds']['mean']:.0f} | {' | '.join(cells)} "
            f"| {' | '.join(counts)} | {networks} |"
        )
    return "\n".join([*lines, "", _told(found_by)])


def edge_cost(stored: dict[str, Any], data: str) -> str:
    """The chosen small networks beside their generation: what they find, and what they take."""
    rows = _by_way(stored, data)
    if not rows:
        return _UNMEASURED
    pairs = list(zip(rows.get("generation", []), rows.get(_SHOWN[data], []), strict=False))
    columns: dict[str, list[dict[str, Any]]] = {
        "self-test": [{"large": large["self_test"], "edge": small["self_test"]} for large, small in pairs],
        "queries on the large network's vectors": [
            {"large": large["self_test"], "edge": small["cross_test"]} for large, small in pairs
        ],
        "queries on the older generation's vectors": [
            {"large": large["on_older"], "edge": small["on_older"]} for large, small in pairs
        ],
    }
    lines = ["| | large network | edge network | difference in points |", "|---|---|---|---|"]
    for name, values in columns.items() if pairs else ():
        found = summary([{**value, "lost": value["edge"] - value["large"]} for value in values])
        lost = f"+{_spread(found['lost'])}" if found["lost"]["mean"] > 0 else _spread(found["lost"])
        lines.append(f"| {name} | {_spread(found['large'])} | {_spread(found['edge'])} | {lost} |")
    lines += ["", "| | large network | edge network | ratio |", "|---|---|---|---|"]
    measures = {"multiply-adds": "multiply_adds", "weights": "parameters", "CPU s of training": "seconds"}
    for name, key in measures.items() if pairs else ():
        ratios = [{"large": one[key], "edge": other[key], "ratio": other[key] / one[key]} for one, other in pairs]
        found = summary(ratios)
        large, small = (f"{found[column]['mean']:,.0f}" for column in ("large", "edge"))
        lines.append(f"| {name} | {large} | {small} | {found['ratio']['mean']:.3f} |")
    return "\n".join([*lines, "", _told(rows)])


_SHOWN = {"omniglot": "evolution", "cifar100": "width sweep"}
_UNMEASURED = "Not measured yet: `python -m benchmarks.edge FOLDER`."
_WORDS = ("data", "way", "architecture", "measured", "hardware", "seed")


def _by_way(stored: dict[str, Any], data: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(stored["rows"], key=lambda row: row["seed"]):
        if row["data"] == data:
            found.setdefault(row["way"], []).append(row)
    return found


def _told(by_way: dict[str, list[dict[str, Any]]]) -> str:
    rows = [row for found in by_way.values() for row in found]
    seeds, measured = {row["seed"] for row in rows}, sorted({f"{row['hardware']}, {row['measured']}" for row in rows})
    number = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{number}, `python -m benchmarks.edge`; {'; '.join(measured)}."


def _spread(value: dict[str, Any]) -> str:
    half = value["half_width"]
    return _percent(value["mean"]) + (f" +- {100 * half:.1f}" if half == half else "")


def kills(stored: dict[str, dict[str, Any]]) -> str:
    """What became of an update when a part of it was killed."""
    lines = [
        "| killed | noticed by | after | works again after | done after | left alone: in all | runs | same end "
        "| processes left | hardware, date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in stored.values():
        seconds = " | ".join(f"{found[name]:g} s" for name in ("noticed_s", "again_s", "end_s", "undisturbed_s"))
        left, same = ", ".join(found["orphans"]) or "none", "yes" if found["same"] else "no"
        lines.append(
            f"| {found['what']} | {found['noticed']} | {seconds} | {found['runs']} | {same} | {left} "
            f"| {found['hardware']}, {found['date']} |"
        )
    return "\n".join(lines)


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
    rates = json.loads((ROOT / "benchmarks" / "results-error-rates.json").read_text())
    tables |= {
        "error rates": error_rates(rates),
        "error rate groups": error_rate_groups(rates),
        "null series": null_series(rates),
        "spending price": spending_price(rates),
    }
    tables["schedule"] = schedule(json.loads((ROOT / "benchmarks" / "results-schedule.json").read_text()))
    tables["search load"] = search_load(json.loads((ROOT / "benchmarks" / "results-search-load.json").read_text()))
    tables["kills"] = kills(json.loads((ROOT / "benchmarks" / "results-kills.json").read_text()))
    tables["scale"] = scale(json.loads((ROOT / "benchmarks" / "results-scale.json").read_text()))
    stored = json.loads((ROOT / "benchmarks" / "results-labels.json").read_text())
    tables |= {"labels": labels(stored), "estimators": estimators(stored)}
    compared = json.loads((ROOT / "benchmarks" / "results-comparison.json").read_text())
    for data in ("omniglot", "cifar100"):
        tables |= {f"comparison {data} {count}": comparison(compared, data, count) for count in (1, 2)}
    tables |= {f"chosen by {data}": chosen_by(compared, data) for data in ("omniglot", "cifar100", "omniglot-10")}
    tables |= {f"long chains {data}": long_chains(compared, data) for data in ("omniglot-10", "omniglot-30")}
    trained = json.loads((ROOT / "benchmarks" / "results-congruent.json").read_text())
    tables |= {f"congruent {data}": congruent(trained, data) for data in ("omniglot", "cifar100")}
    small = json.loads((ROOT / "benchmarks" / "results-edge.json").read_text())
    tables |= {f"edge architectures {data}": edge_architectures(small, data) for data in ("omniglot", "cifar100")}
    tables |= {f"edge cost {data}": edge_cost(small, data) for data in ("omniglot", "cifar100")}
    for name, table in tables.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        block = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
        text = block.sub(lambda _, o=opening, t=table, c=closing: f"{o}{t}\n{c}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for name in PAGES:
        page = ROOT / "docs" / name
        page.write_text(with_tables(page.read_text()))
