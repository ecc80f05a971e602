# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
The committed results in `model_cards` -> the tables in the pages, and the picture in the README.

    python recipes/pages.py

Writes what stands between `<!-- name -->` and `<!-- /name -->` of each page anew. Tables of what the tests try (models,
messages, what works together) are made by these tests.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import fronts
import ways
from benchmark_scaling import on_paper, ratios, vit_large

from hf_mmst.records.comparison_picture import WAYS

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
METHODS = {"end_to_end": "end to end", "greedy": "greedy (w = 0)", "mmst": "MMST (w = 0.3)"}


def main() -> None:
    """Write all tables and the picture."""
    for name, (page, make) in BLOCKS.items():
        path = ROOT / page
        path.write_text(filled(path.read_text(), name, make()))
    ways.draw()


def block(page: str, name: str) -> str:
    """What stands between the marks of that name in a page, given by its path in the repository."""
    return _parts((ROOT / page).read_text(), name)[1]


def filled(text: str, name: str, content: str) -> str:
    """The text with `content` between the marks of that name."""
    before, _, after = _parts(text, name)
    return before + content + after


def _parts(text: str, name: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(f"<!-- {name} -->\n")
    inside, end, after = rest.partition(f"\n<!-- /{name} -->")
    if not end:
        raise ValueError(f"There is no block {name}. Put <!-- {name} --> and <!-- /{name} --> into the page.")
    return before + begin, inside, end + after


def table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Names of columns and cells -> a table in Markdown."""
    names = list(names)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [names, *rows]]
    return "\n".join([lines[0], "|---" * len(names) + "|", *lines[1:]])


def read(folder: str) -> Iterable[tuple[str, dict]]:
    """Name and content of each result in a folder of `model_cards`."""
    return ((path.stem, ways.results(path)) for path in sorted((CARDS / folder).glob("*.json")))


def mib(count: float | None, digits: int = 0) -> str:
    return "-" if count is None else f"{count / 2**20:.{digits}f}"


def percent(values: Iterable[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values) or "-"


def recipes_table() -> str:
    rows = []
    for stem, found in read("results"):
        *before, last = found.get("stage_accuracy", [found["accuracy"]])
        method = METHODS[stem.partition("_")[2]]
        rows.append(
            (
                found["dataset"],
                found["model"],
                method,
                found["num_stages"],
                percent([last]),
                percent(before),
                mib(found["planned_bytes"]),
            )
        )
    return table(("dataset", "model", "method", "K", "accuracy", "stages before", "planned MiB of tensors"), rows)


def memory_table() -> str:
    keys = "peak_bytes", "step_seconds", "epoch_seconds"
    rows = []
    for _, found in read("memory"):
        model = f"{found['model']}, batch {found['batch_size']}, K = {found['num_stages']}"
        for row in found["rows"]:
            sizes = [mib(row[key]) for key in ("peak_bytes", "reserved_bytes", "planned_bytes")]
            shares = [f"{row[key] / ways.end_to_end(found, key):.2f}" for key in keys]
            rows.append((model, row["method"], *sizes, *shares))
    return table(("model", "method", "peak MiB", "reserve MiB", "planned MiB", "peak", "step", "epoch"), rows)


def accuracy_table(folder: str = "accuracy") -> str:
    rows = []
    for data, model, row in ways.accuracy_rows(CARDS / folder):
        rows.append((f"{data[0]}, {data[1]:,} samples, {model}", row["num_stages"], row["method"], row))
    best: dict[str, float] = {}
    for task, _, method, row in rows:
        if method.startswith("end-to-end"):
            best[task] = max(best.get(task, 0), row["accuracy"])
    cells = []
    for task, num_stages, method, row in sorted(rows, key=lambda one: one[:3]):
        shown = []
        for name in ("accuracy", "ensemble_accuracy"):
            error = row.get("standard_error" if name == "accuracy" else "ensemble_standard_error") or 0
            more = f" ± {100 * error:.1f}" if len(row["accuracies"]) > 1 else " (one seed)"
            shown.append("-" if row.get(name) is None else f"{100 * row[name]:.1f}{more}")
        behind = f"{100 * (row['accuracy'] - best[task]):+.1f}" if task in best else "-"
        rate, before = f"{row['learning_rate']:g}", percent(row["stage_accuracy"][:-1])
        cells.append((task, num_stages, method, rate, shown[0], behind, shown[1], before, mib(row["peak_bytes"])))
    names = ("task", "K", "method", "learning rate", "accuracy", "to end to end", "heads together", "stages before")
    return table((*names, "peak MiB"), cells)


def scratch_table() -> str:
    """What the transport term wins from scratch."""
    rows = []
    for data in (ways.SCRATCH, ("fashion-mnist", 5000)):
        whole = ways.accuracy_row(data, "end-to-end", 1, scratch=True)["accuracy"]
        for num_stages in (2, 4, 8, 12):
            greedy, moved = (
                ways.accuracy_row(data, method, num_stages, scratch=True) for method in ("greedy", "transport")
            )
            gained = moved["accuracy"] - greedy["accuracy"], moved["accuracy"] - whole
            below = [max(row["stage_accuracy"]) - row["accuracy"] for row in (greedy, moved)]
            rows.append(
                (
                    data[0],
                    num_stages,
                    percent([greedy["accuracy"]]),
                    percent([moved["accuracy"]]),
                    *(f"{100 * one:+.1f}" for one in gained),
                    *(f"{100 * one:.1f}" for one in below),
                )
            )
    gains = "transport - greedy", "transport - end to end"
    return table(("data", "K", "greedy", "transport", *gains, "greedy: best - last", "transport: best - last"), rows)


def compare_table() -> str:
    """The three ways of a recipe's `--compare`."""
    found = json.loads((CARDS / "digits_compare" / "compare.json").read_text())
    rows = []
    for row in found["rows"]:
        values = row["stage_accuracy"]
        fall = "-" if row["num_stages"] == 1 else f"{100 * (max(values) - values[-1]):.1f}"
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}"
        rows.append((WAYS[row["way"]], accuracy, fall, mib(row["peak_bytes"]), f"{row['seconds']:.0f}"))
    return table(("way", "accuracy, %", "best stage - last", "peak of tensors, MiB", "seconds"), rows)


def scaling_table() -> str:
    rows = []
    for _, found in read("scaling"):
        model = f"{found['model']}, batch {found['batch_size']}, K = {found['num_stages']}"
        for row, ratio in zip(found["rows"], ratios(found["rows"]), strict=True):
            numbers = [f"{ratio[name]:.2f}" for name in ("step", "peak", "scaling")]
            rows.append((model, row["num_processes"], row["method"], *numbers))
    return table(("model", "processes", "method", "step", "peak", "times as fast"), rows)


def planner_table() -> str:
    rows = []
    for row in json.loads((CARDS / "planner.json").read_text())["rows"]:
        settings = ", ".join(f"`{name}={value!r}`" for name, value in row["settings"].items()) or "end to end"
        planned, measured = row["planned_bytes"], row["measured_bytes"]
        numbers = mib(planned, 1), mib(measured, 1), f"{planned / measured:.3f}"
        rows.append((row["model"], row["precision"], settings, *numbers))
    return table(("model", "precision", "settings", "planned MiB", "measured MiB", "ratio"), rows)


def times_table() -> str:
    """Predicted and measured times of a step, and both as ratios to end to end, of the runs with a prediction."""
    keys = "predicted_seconds", "step_seconds"
    rows = []
    for stem, _ in read("memory"):
        found = ways.predictions(stem)
        for row in found["rows"]:
            seconds = [f"{row[key]:.2f}" for key in keys]
            ratios = [f"{row[key] / ways.end_to_end(found, key):.2f}" for key in keys]
            rows.append((stem, row["method"], *seconds, *ratios))
    return table(("run", "method", "predicted s", "measured s", "predicted ratio", "measured ratio"), rows)


def exits_table() -> str:
    """Each way to leave early, with rules chosen for a drop of at most 0.5 points."""
    rows = []
    for stem, found in read("exits"):
        number = found["num_layers"]
        rows.append((stem, "none", percent([found["whole"]["accuracy"]]), number, "-"))
        together = [{"kind": "none, heads together", **found["together"]}] if "together" in found else []
        for row in [*together, *(row for row in found["rows"] if row["max_drop"] == 0.005)]:
            layers = row["mean_layers"]
            share = f"{1 - layers / number + 0.0:z.0%}"
            rows.append((stem, row["kind"], percent([row["accuracy"]]), f"{layers:.2f}", share))
    return table(("model", "way to leave", "accuracy", "layers", "fewer layers"), rows)


def onnx_table() -> str:
    """Early exit in ONNX Runtime, one sample a call, beside the whole model."""
    names = {"whole": "whole, ONNX", "early_exit": "early exit, ONNX", "early_exit_pytorch": "early exit, PyTorch"}
    rows = []
    for stem, found in read("onnx"):
        number = found["num_stages"]
        for way, name in names.items():
            row = found["samples"][way]
            stages = f"{row.get('stages', number):.2f} of {number}"
            rows.append((stem, name, percent([row["accuracy"]]), stages, f"{1000 * row['seconds']:.1f}"))
    return table(("model", "way", "accuracy", "stages", "ms a sample"), rows)


def billions_table() -> str:
    rows = []
    for _, found in read("billions"):
        above = found["peak_resident_bytes"] - found["imported_bytes"]
        model = f"{found['model']}, {found['parameters'] / 1e9:.2f} B parameters, batch {found['batch_size']}"
        peaks = "limit_bytes", "peak_private_bytes", "peak_resident_bytes"
        numbers = [*(mib(found[name]) for name in peaks), mib(above), mib(found["planned_bytes"])]
        moved = (found["moved_in_bytes"] + found["moved_out_bytes"]) / 1e9
        rows.append((model, *numbers, f"{moved:.1f}", f"{found['step_seconds']:.0f}"))
    peaks = "limit MiB", "private MiB", "resident MiB", "above import MiB", "planned MiB of tensors"
    return table(("model", *peaks, "GB moved in a step", "seconds a step"), rows)


def new_user_table() -> str:
    rows = []
    for step in json.loads((CARDS / "new_user.json").read_text())["steps"]:
        command = step["command"] if len(step["command"]) < 100 else f"{step['command'][:90]} ..."
        shown = ", ".join(f"`{' '.join(line.split())}`" for line in step["shown"])
        rows.append((step["name"], f"`{command}`", f"{step['seconds']:.0f}", shown))
    return table(("step", "command", "seconds", "says"), rows)


# The page and the maker of each block.
BLOCKS: dict[str, tuple[str, Callable[[], str]]] = {
    "ways": ("README.md", ways.ways_table),
    "compare": ("model_cards/README.md", compare_table),
    "recipes": ("model_cards/accuracy.md", recipes_table),
    "accuracy": ("model_cards/accuracy.md", accuracy_table),
    "fronts": ("model_cards/accuracy.md", fronts.front_tables),
    "equal-time": ("model_cards/accuracy.md", fronts.equal_time_table),
    "scratch": ("model_cards/accuracy.md", scratch_table),
    "memory": ("model_cards/memory.md", memory_table),
    "billions": ("model_cards/memory.md", billions_table),
    "planner": ("model_cards/planner.md", planner_table),
    "times": ("model_cards/planner.md", times_table),
    "scaling": ("model_cards/scaling.md", scaling_table),
    "on_paper": ("model_cards/scaling.md", lambda: on_paper(vit_large())),
    "exits": ("model_cards/exits.md", exits_table),
    "onnx": ("model_cards/exits.md", onnx_table),
    "convolutional": ("model_cards/convolutional.md", lambda: accuracy_table("convolutional")),
    "new_user": ("recipes/README.md", new_user_table),
}


if __name__ == "__main__":
    main()
