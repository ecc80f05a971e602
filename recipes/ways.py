# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Ways of training beside each other: accuracy, peak memory and time, in a table and in the picture model_cards/ways.png.

    python recipes/ways.py

Reads the committed results of `benchmark_accuracy.py` and `benchmark_memory.py`; measures nothing.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from hf_mmst.records.colours import WAYS

CARDS = Path(__file__).parents[1] / "model_cards"
PICTURE = CARDS / "ways.png"
NEWS, VIT = ("20newsgroups", 1200), ("cifar10", 1000)
SCRATCH = ("cifar10", 5000)
RIVALS = ("end to end", "end to end, checkpointing", "LoRA", "last layers only")  # squares in the picture


DISTURBED = ("vit_base_cpu", 0)  # the run and the row whose time was predicted while other work ran


@dataclass(frozen=True)
class Point:
    """One way in one panel: its share of end-to-end training's peak, a value, and its error."""

    way: str
    label: str
    peak: float
    value: float
    error: float
    left: bool = False  # where the label goes
    lift: int = 0  # by how many points it is higher


def results(path: Path) -> dict:
    """What a benchmark has written; its earlier versions called offloaded layers coupled."""
    return json.loads(path.read_text().replace('"method": "coupled', '"method": "offloaded'))


def accuracy_rows(folder: Path = CARDS / "accuracy") -> Iterator[tuple[tuple[str, int], str, dict]]:
    """The data and number of training samples, the model, and a row, of every row of the accuracy benchmark."""
    for path in sorted(folder.glob("*.json")):
        found = results(path)
        for row in found["rows"]:
            yield (found["dataset"], found["num_train_samples"]), found["model"], row


def accuracy_row(task: tuple[str, int], method: str, num_stages: int = 1, scratch: bool = False) -> dict:
    """The one row of a task, a method and a number of stages."""
    (row,) = [
        row
        for found, model, row in accuracy_rows()
        if found == task
        and (row["method"], row["num_stages"]) == (method, num_stages)
        and (model == "ViT from scratch") == scratch
    ]
    return row


def end_to_end(run: dict, key: str) -> float:
    """The mean over the end-to-end rows of a run of the memory benchmark."""
    return mean(row[key] for row in run["rows"] if row["method"] == "end-to-end")


def predictions(stem: str) -> dict:
    """A run of the memory benchmark with its rows that have a predicted time, without [`DISTURBED`]."""
    found = results(CARDS / "memory" / f"{stem}.json")
    rows = [row for i, row in enumerate(found["rows"]) if "predicted_seconds" in row and (stem, i) != DISTURBED]
    return {**found, "rows": rows}


def memory_ratios(method: str, num_stages: int = 12, key: str = "peak_bytes") -> list[float]:
    """A method's ratios to end-to-end training in the same run, of ViT-B, in ascending order, one for each row."""
    ratios = []
    for path in sorted((CARDS / "memory").glob("*.json")):
        found = results(path)
        if found["model"] != "vit-base":
            continue
        if found["num_stages"] == num_stages or method.startswith(("offloaded", "end-to-end", "lora")):
            ratios += [row[key] / end_to_end(found, key) for row in found["rows"] if row["method"] == method]
    return sorted(ratios)


def spread(values: list[float]) -> str:
    """The least and the most of some ratios, or the one that both are."""
    least, most = f"{values[0]:.2f}", f"{values[-1]:.2f}"
    return least if least == most else f"{least} to {most}"


def ways_table() -> str:
    """Accuracy of the two pretrained models that were measured most, and peak and time of a third, in Markdown."""
    layer = {NEWS: 6, VIT: 12}
    few = {NEWS: 3, VIT: 4}
    one = {NEWS: 1, VIT: 1}
    heads = {NEWS: ", head rate", VIT: ", heads at 0.01"}
    rows = [  # name, method of the accuracy benchmark by task, K by task, method and K of the memory benchmark
        ("end to end (plain `Trainer`)", {t: f"end-to-end{heads[t]}" for t in heads}, one, "end-to-end", 12),
        ("the same, `gradient_checkpointing=True`", {}, one, "end-to-end+checkpointing", 12),
        ("LoRA, rank 16, all linear layers", dict.fromkeys(heads, "lora, head rate"), one, "lora", 12),
        ("only the last layer, of 6 or 12", {t: f"freeze{heads[t]}" for t in heads}, layer, "freeze", 12),
        ('**`stage_order="end_to_end"`**', {t: f"offloaded{heads[t]}" for t in heads}, one, "offloaded", 12),
        (
            "**stages**, 3 for the texts, else 4",
            {NEWS: "default", VIT: "default, heads at 0.01"},
            few,
            "simultaneous+head_layers",
            4,
        ),
        (
            "**stages**, one layer each",
            {NEWS: "default", VIT: "default, heads at 0.01"},
            layer,
            "simultaneous+head_layers",
            12,
        ),
        (
            '**blocks**, `stage_objective="model"`, one on the device',
            {NEWS: "blocks, w = 0", VIT: "blocks, w = 0, heads at 0.01"},
            layer,
            "blocks+resident+checkpointing",
            12,
        ),
        (
            "**stages in turn**, one on the device, cached features",
            {NEWS: "default, resident"},
            layer,
            "resident+cache",
            12,
        ),
    ]
    lines = [
        "| way | 20 Newsgroups, MiniLM-L6: % | CIFAR-10, ViT-S: % | ViT-B: peak | ViT-B: time of an epoch |",
        "|---|---|---|---|---|",
    ]
    for name, methods, stages, method, number in rows:
        cells = []
        for task in (NEWS, VIT):
            if task in methods:
                row = accuracy_row(task, methods[task], stages[task])
                cells.append(f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}")
            else:
                cells.append("as above" if "checkpointing" in method else "-")
        cells += [spread(memory_ratios(method, number, key)) for key in ("peak_bytes", "epoch_seconds")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def panels() -> dict[str, list[Point]]:
    """What the picture shows, by the title of the panel."""
    return {
        "Fine-tuning a ViT-S\nCIFAR-10, 1,000 images": list(_accuracies(VIT, False)),
        "A ViT from scratch\nCIFAR-10, 5,000 images": list(_accuracies(SCRATCH, True)),
        "Time\nViT-B, batch 8, on a CPU": list(_times()),
    }


def _accuracies(task: tuple[str, int], scratch: bool) -> Iterator[Point]:
    fine_tuned = [
        ("end to end", "", "end-to-end, heads at 0.01", 1),
        ("LoRA", "", "lora, head rate", 1),
        ("last layers only", "", "freeze, heads at 0.01", 12),
        ("end to end, one layer on the device", "", "offloaded, heads at 0.01", 1),
        ("the same, with LoRA", "", "offloaded, lora, head rate", 1),
        ("blocks", "", "blocks, w = 0, heads at 0.01", 12),
        ("stages", "K = 4", "default, heads at 0.01", 4),
        ("stages", "K = 12", "default, heads at 0.01", 12),
    ]
    from_scratch = [
        ("end to end", "", "end-to-end", 1),
        *(("stages, greedy", f"K = {k}", "greedy", k) for k in (2, 4, 8, 12)),
        *(("stages", f"K = {k}", "transport", k) for k in (2, 4, 8, 12)),
    ]
    chosen = from_scratch if scratch else fine_tuned
    whole = accuracy_row(task, chosen[0][2], 1, scratch)["peak_bytes"]
    for way, label, method, stages in chosen:
        row = accuracy_row(task, method, stages, scratch)
        left = scratch and stages != 2 and (way, stages) != ("stages, greedy", 4)
        share, error = row["peak_bytes"] / whole, 100 * row["standard_error"]
        yield Point(way, label, share, 100 * row["accuracy"], error, left)


def _times() -> Iterator[Point]:
    for way, label, method, stages in (
        ("end to end", "", "end-to-end", 12),
        ("end to end, checkpointing", "", "end-to-end+checkpointing", 12),
        ("LoRA", "", "lora", 12),
        ("last layers only", "", "freeze", 12),
        ("end to end, one layer on the device", "", "offloaded", 12),
        ("stages", "K = 4", "simultaneous+head_layers", 4),
        ("stages", "K = 12", "simultaneous+head_layers", 12),
        ("blocks", "", "blocks+resident+checkpointing", 12),
        ("one stage on the device", "", "resident", 12),
        ("one stage on the device", "cached", "resident+cache", 12),
    ):
        peaks, times = (memory_ratios(method, stages, key) for key in ("peak_bytes", "epoch_seconds"))
        middle = sum(times) / len(times)
        lift = {"K = 12": 14, "K = 4": 3}.get(label, 0)  # they lie beside each other
        yield Point(way, label, sum(peaks) / len(peaks), middle, (times[-1] - times[0]) / 2, lift=lift)


def digest() -> str:
    """What the picture was drawn from, in short."""
    return hashlib.sha256(repr(panels()).encode()).hexdigest()


def draw(path: Path = PICTURE) -> None:
    """Draw the picture; the digest of what it shows goes into the file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 4.3), layout="constrained", facecolor="white")
    named = {}
    for axes, (title, points) in zip(figure.subplots(1, 3), panels().items(), strict=True):
        for point in points:
            colour, at = WAYS[point.way], (point.peak, point.value)
            axes.errorbar(*at, point.error, color=colour, capsize=2)
            marker = "s" if point.way in RIVALS else "o"
            (named[point.way],) = axes.plot(*at, color=colour, marker=marker, ls="none", markersize=6)
            side, x = ("right", -6) if point.left else ("left", 6)
            axes.annotate(
                point.label, at, (x, point.lift - 3), textcoords="offset points", ha=side, fontsize=8, color=colour
            )
        timed = title.startswith("Time")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("peak memory, end to end = 100%", fontsize=9)
        axes.set_ylabel("time of an epoch, end to end = 1" if timed else "test accuracy in %", fontsize=9)
        axes.set_xlim(0, 1.36)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.margins(y=0.12)
        if timed:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    names = [name for name in WAYS if name in named]
    figure.legend(
        [named[name] for name in names], names, loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=160, metadata={"Source": digest()})


if __name__ == "__main__":
    draw()
    print(f"written to {PICTURE}")
