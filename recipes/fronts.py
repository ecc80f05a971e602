"""Ways of training for one task beside each other: accuracy, memory and time, and by which others each is beaten."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import ways

WHOLE = "end to end (plain `Trainer`)"
HALF = "offloaded+half resident"


@dataclass(frozen=True)
class Standing:
    """
    How one way of training stands in a task.

    Attributes:
        name (`str`): in words.
        accuracy (`float`), error (`float`): mean over the seeds, and its standard error.
        peak (`float`), time (`float`): of memory and of an epoch, as ratios to end-to-end training.
    """

    name: str
    accuracy: float
    error: float
    peak: float
    time: float

    def beats(self, other: "Standing") -> bool:
        """Whether it takes less memory and less time, and is at least as accurate."""
        return self.peak < other.peak and self.time < other.time and self.accuracy >= other.accuracy


@dataclass(frozen=True)
class Task:
    """
    A task of the accuracy benchmark, and the model of the memory benchmark that is its own.

    Attributes:
        data (`tuple[str, int]`): dataset and number of training samples.
        model (`str`): the folder that the memory benchmark was given.
        heads (`str`): what the accuracy benchmark calls the rate of the heads that all rows have.
        stages (`tuple[int, ...]`): numbers of stages, the last one a layer each.
        lora (`str`), freeze (`str`, *optional*): what it calls these two; the latter as it calls the others by default.
        from_scratch (`bool`): whether the model is a ViT from scratch, in the place of a pretrained one.
    """

    data: tuple[str, int]
    model: str
    heads: str
    stages: tuple[int, ...]
    lora: str = "lora, head rate"
    freeze: str | None = None
    from_scratch: bool = False

    def standings(self) -> list[Standing]:
        """All ways that were measured in both benchmarks."""
        rows = {
            (row["method"], row["num_stages"]): row
            for data, model, row in ways.accuracy_rows()
            if data == self.data and (model == "ViT from scratch") == self.from_scratch
        }
        return [
            Standing(name, row["accuracy"], row["standard_error"], *self._ratios(number, method))
            for name, trained, number, method in (self._scratch() if self.from_scratch else self._pretrained())
            if (row := rows.get((trained, number))) is not None
        ]

    def _scratch(self) -> Iterator[tuple[str, str, int, str]]:
        """Name, method of the accuracy benchmark, number of stages, method of the memory benchmark."""
        yield WHOLE, "end-to-end", 1, "end-to-end"
        yield "the same, checkpointing", "end-to-end", 1, "end-to-end+checkpointing"
        yield "the same, layers offloaded", "end-to-end", 1, "offloaded"
        for number in self.stages:
            ours = "**the defaults**: " if number == 4 else ""
            yield f"{ours}stages, K = {number}", "transport", number, "simultaneous"

    def _pretrained(self) -> Iterator[tuple[str, str, int, str]]:
        """The same."""
        rate, deep = f", {self.heads}", self.stages[-1]
        exact = f"end-to-end{rate}", 1  # of all whose numbers are the same, bit for bit
        yield WHOLE, *exact, "end-to-end"
        yield "the same, checkpointing", *exact, "end-to-end+checkpointing"
        yield "the same, states of 8 bits", f"end-to-end{rate}, 8-bit", 1, "end-to-end+8-bit"
        yield "LoRA, rank 16", self.lora, 1, "lora"
        yield "only the last layer", self.freeze or f"freeze{rate}", deep, "freeze"
        yield "**the defaults**: end to end, layers offloaded", *exact, "offloaded"
        yield "the same, half of the layers resident", *exact, HALF
        tuned = rate if self.heads == "heads at 0.01" else ""
        blocks = f"blocks, w = 0{tuned}", deep
        yield "blocks: a layer at a time, by the model's loss", *blocks, "blocks"
        yield "the same, one on the device, recomputed", *blocks, "blocks+resident+checkpointing"
        for number in self.stages:
            yield f"stages, K = {number}", f"default{tuned}", number, "simultaneous+head_layers"

    def _ratios(self, num_stages: int, method: str) -> tuple[float, float]:
        found: list[tuple[float, float]] = []
        for path in sorted((ways.CARDS / "memory").glob("*.json")):
            run = ways.results(path)
            if run["model"] != self.model or num_stages not in (1, run["num_stages"]):
                continue
            wholes = {key: ways.end_to_end(run, key) for key in ("peak_bytes", "epoch_seconds")}
            rows = [row for row in run["rows"] if row["method"] == method]
            found += [tuple(row[key] / whole for key, whole in wholes.items()) for row in rows]
        peaks, times = zip(*found, strict=True)
        return mean(peaks), mean(times)


TASKS = {
    "20 Newsgroups, 1,200 texts, MiniLM-L6": Task(ways.NEWS, "minilm-l6", "head rate", (2, 3, 6)),
    "movie reviews, 1,200 texts, MiniLM-L6": Task(
        ("movie-reviews", 1200), "minilm-l6", "head rate", (6,), "lora", "freeze"
    ),
    "CIFAR-10, 1,000 images, ViT-S": Task(ways.VIT, "vit-small-56", "heads at 0.01", (2, 4, 12)),
    "CIFAR-10, 5,000 images, ViT-S": Task(ways.SCRATCH, "vit-small-56", "heads at 0.01", (4, 12)),
    "CIFAR-10, 5,000 images, from scratch": Task(ways.SCRATCH, "vit-scratch-12", "", (2, 4, 8, 12), from_scratch=True),
    "Fashion-MNIST, 5,000 images, from scratch": Task(
        ("fashion-mnist", 5000), "vit-scratch-12", "", (2, 4, 8, 12), from_scratch=True
    ),
}


EQUAL_TIME = {  # names of files of the accuracy benchmark
    "newsgroups_checkpointing": "end to end, checkpointing",
    "newsgroups_lora": "LoRA, rank 16",
    "newsgroups_freeze": "only the last layer",
    "newsgroups_offloaded": "**the defaults**: end to end, layers offloaded",
    "newsgroups_blocks": "blocks: a layer at a time, by the model's loss",
    "newsgroups_k2": "stages, K = 2, w = 0",
}


def equal_time_table() -> str:
    """Ways for 20 Newsgroups with as many epochs as take the time of end-to-end training."""
    lines = ["| 20 Newsgroups, in equal time | epochs | accuracy, % |", "|---|---|---|"]
    whole = ways.accuracy_row(ways.NEWS, "end-to-end, head rate")
    found = [(WHOLE, 3.0, whole)]
    for name, way in EQUAL_TIME.items():
        run = ways.results(ways.CARDS / "accuracy" / "equal_time" / f"{name}.json")
        found += [(way, run["epochs"], row) for row in run["rows"]]
    for way, epochs, row in found:
        lines.append(f"| {way} | {epochs:g} | {100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f} |")
    return "\n".join(lines)


def front_tables() -> str:
    """A table a task, in Markdown."""
    tables = []
    for title, task in TASKS.items():
        found = task.standings()
        lines = [f"| {title} | accuracy, % | peak | time of an epoch | beaten by |", "|---|---|---|---|---|"]
        for one in found:
            better = "; ".join(other.name.replace("*", "") for other in found if other.beats(one)) or "-"
            accuracy = f"{100 * one.accuracy:.1f} ± {100 * one.error:.1f}"
            lines.append(f"| {one.name} | {accuracy} | {one.peak:.2f} | {one.time:.2f} | {better} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
