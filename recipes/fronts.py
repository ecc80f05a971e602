"""Ways of training for one task beside each other: accuracy, memory and time, and by which others each is beaten."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import ways

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
        has_blocks (`bool`): whether blocks by the model's loss were trained, too.
    """

    data: tuple[str, int]
    model: str
    heads: str
    stages: tuple[int, ...]
    has_blocks: bool = False

    def standings(self) -> list[Standing]:
        """All ways that were measured in both benchmarks."""
        return [Standing(name, *self._accuracy(*how[:2]), *self._ratios(*how[1:])) for name, *how in self._ways()]

    def _ways(self) -> Iterator[tuple[str, str, int, str]]:
        """Name, method of the accuracy benchmark, number of stages, method of the memory benchmark."""
        rate, deep = f", {self.heads}", self.stages[-1]
        yield "end to end (plain `Trainer`)", f"end-to-end{rate}", 1, "end-to-end"
        yield "the same, checkpointing", f"end-to-end{rate}", 1, "end-to-end+checkpointing"
        yield "LoRA, rank 16", "lora, head rate", 1, "lora"
        yield "only the last layer", f"freeze{rate}", deep, "freeze"
        yield "**the defaults**: end to end, layers offloaded", f"offloaded{rate}", 1, "offloaded"
        yield "the same, half of the layers resident", f"offloaded{rate}", 1, HALF
        tuned = rate if self.heads == "heads at 0.01" else ""
        if self.has_blocks:
            yield "blocks: a layer at a time, by the model's loss", f"blocks, w = 0{tuned}", deep, "blocks"
        for number in self.stages:
            yield f"stages, K = {number}", f"default{tuned}", number, "simultaneous+head_layers"

    def _accuracy(self, method: str, num_stages: int) -> tuple[float, float]:
        row = ways.accuracy_row(self.data, method, num_stages)
        return row["accuracy"], row["standard_error"]

    def _ratios(self, num_stages: int, method: str) -> tuple[float, float]:
        found: list[tuple[float, float]] = []
        for path in sorted((ways.CARDS / "memory").glob("*.json")):
            run = ways.results(path)
            if run["model"] != self.model or num_stages not in (1, run["num_stages"]):
                continue
            whole = run["rows"][0]
            keys = "peak_bytes", "epoch_seconds"
            found += [tuple(row[key] / whole[key] for key in keys) for row in run["rows"] if row["method"] == method]
        peaks, times = zip(*found, strict=True)
        return mean(peaks), mean(times)


TASKS = {
    "20 Newsgroups, 1,200 texts, MiniLM-L6": Task(ways.NEWS, "minilm-l6", "head rate", (2, 3, 6), has_blocks=True),
    "CIFAR-10, 1,000 images, ViT-S": Task(ways.VIT, "vit-small-56", "heads at 0.01", (2, 4, 12)),
}


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
