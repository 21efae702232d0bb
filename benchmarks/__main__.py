"""Run benchmarks by name (all by default), print one ratio each, and store them in benchmarks/results.json.

`python -m benchmarks soak` and `schedule` are another matter: they start and end processes, and have options and files
of results of their own.
"""

import json
import sys
from functools import partial
from pathlib import Path

from benchmarks import kills, schedule, soak
from benchmarks.class_cost import step_cost_classes
from benchmarks.gallery_cost import evaluate_matrix, reindex_proportional
from benchmarks.gallery_scale import commit_unit, ingest_one, peak_memory, reindex_scale, view_scale
from benchmarks.lqf_cost import lqf_step
from benchmarks.orchestration import orchestration
from benchmarks.search_cost import change_visible, open_gallery, search_approximate, search_changed, search_mixed
from benchmarks.search_load import search_load
from benchmarks.search_service import search_service
from benchmarks.streaming import stream_memory, train_224
from benchmarks.training_cost import loop_overhead, step_cost_predecessors, train_overhead
from benchmarks.update_cost import update_predecessors

RESULTS = Path(__file__).parent / "results.json"
BENCHMARKS = {
    "reindex_proportional": reindex_proportional,
    "evaluate_matrix": evaluate_matrix,
    "ingest_one": ingest_one,
    "view_scale": view_scale,
    "reindex_scale": reindex_scale,
    "commit_unit": commit_unit,
    "peak_memory": peak_memory,
    "step_cost_predecessors": step_cost_predecessors,
    "step_cost_classes": step_cost_classes,
    "lqf_step": lqf_step,
    "train_overhead": train_overhead,
    "loop_overhead": loop_overhead,
    "train_224": train_224,
    "stream_memory": stream_memory,
    "update_predecessors_2160": partial(update_predecessors, 5),
    "update_predecessors_4320": partial(update_predecessors, 10),
    "update_predecessors_6480": partial(update_predecessors, 15),
    "open_gallery": open_gallery,
    "change_visible": change_visible,
    "search_mixed": search_mixed,
    "search_changed": search_changed,
    "search_approximate": search_approximate,
    "search_service": search_service,
    "search_load": search_load,
    "orchestration": orchestration,
}


def main(names: list[str]) -> int:
    """Run the named benchmarks; exit code 2 for an unknown name."""
    if names[:1] == ["soak"]:
        return soak.main(names[1:])
    if names[:1] == ["kills"]:
        return kills.main(names[1:])
    if names[:1] == ["schedule"]:
        return schedule.main(names[1:])
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or BENCHMARKS:
        measured = BENCHMARKS[name]()
        for found in measured if isinstance(measured, list) else [measured]:
            stored[found.name] = found.as_dict()
            verdict = "meets" if found.meets_target else "misses"
            spread = f"({found.lowest} to {found.highest})"
            print(f"{found.name}: {found.ratio} {spread}, {verdict} {found.target}; {found.note}", flush=True)
        RESULTS.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
