"""The figures in the sentences of the pages are those of the committed results: where one moves, its sentence must."""

import re
from pathlib import Path
from statistics import mean

import fronts
import pytest
import ways
from benchmark_scaling import vit_large

ROOT = Path(__file__).parents[1]
NEWS, REVIEWS, VIT, MORE = ways.NEWS, ("movie-reviews", 1200), ways.VIT, ("cifar10", 5000)
FASHION = ("fashion-mnist", 5000)
BEST = {  # the method of end-to-end training that is the best of a task
    NEWS: "end-to-end, head rate",
    REVIEWS: "end-to-end, head rate",
    VIT: "end-to-end, heads at 0.01",
    MORE: "end-to-end, heads at 0.01",
}
HEADS, ORDER, OFFLOADED_LORA = "default, heads at 0.01", "offloaded, head rate", "offloaded, lora, head rate"
ONE_RATE, FAST = "default, constant, one rate", "heads at 0.01"


def accuracy(task, method, stages=1, scratch=False, key="accuracy"):
    return 100 * ways.accuracy_row(task, method, stages, scratch)[key]


def equal_time(name):
    (row,) = read(f"accuracy/equal_time/{name}")["rows"]
    return 100 * row["accuracy"]


def behind(task, method, stages=1, key="accuracy"):
    return accuracy(task, BEST[task]) - accuracy(task, method, stages, key=key)


def gain(task, method, other, stages=1, others=1):
    return accuracy(task, method, stages) - accuracy(task, other, others)


def peak(task, method, stages=1, over=None, others=1):
    row, whole = ways.accuracy_row(task, method, stages), ways.accuracy_row(task, over or BEST[task], others)
    return 100 * row["peak_bytes"] / whole["peak_bytes"]


def mib(task, method, stages=1):
    return ways.accuracy_row(task, method, stages)["peak_bytes"] / 2**20


def memory(method, stages=12):
    return [100 * one for one in ways.memory_ratios(method, stages)]


def times(method, stages=12):
    return ways.memory_ratios(method, stages, "epoch_seconds")


def reserve(method, name="vit_base_cpu"):
    rows = read(f"memory/{name}")["rows"]
    return max(row["reserved_bytes"] / row["peak_bytes"] for row in rows if row["method"] == method)


def steps(method, name):
    return [row["step_seconds"] for row in read(f"memory/{name}")["rows"] if row["method"] == method]


def ratio(method, other, name):
    return mean(steps(method, name)) / mean(steps(other, name))


def over_checkpointing():
    files = (ROOT / "model_cards" / "memory").glob("vit_base*.json")
    rows = {path.stem: read(f"memory/{path.stem}")["rows"] for path in files}
    both = {"offloaded", "end-to-end+checkpointing"}
    names = {name for name, found in rows.items() if both <= {row["method"] for row in found}}
    return sorted(ratio("offloaded", "end-to-end+checkpointing", name) for name in names)


def predictions():
    """Seconds of each step, and their ratio to end to end, as predicted over as measured."""
    seconds, ratios = [], []
    for path in (ROOT / "model_cards" / "memory").glob("*.json"):
        run = ways.predictions(path.stem)
        for row in run["rows"]:
            seconds.append(row["predicted_seconds"] / row["step_seconds"])
            if row["method"] != "end-to-end":
                whole = [ways.end_to_end(run, key) for key in ("predicted_seconds", "step_seconds")]
                ratios.append(seconds[-1] / (whole[0] / whole[1]))
    return seconds, ratios


def close(found):
    return [sum(abs(one - 1) <= 0.15 for one in found), len(found)]


def from_scratch(task):
    whole = accuracy(task, "end-to-end", 1, True)
    return [accuracy(task, "transport", k, True) - whole for k in (2, 4, 8, 12)]


def won_from_scratch(task, stages):
    return accuracy(task, "transport", stages, True) - accuracy(task, "greedy", stages, True)


def together(task, method, stages):
    return behind(task, method, stages, "ensemble_accuracy")


def fall(task, stages, method="default"):
    row = ways.accuracy_row(task, method, stages)
    return 100 * (max(row["stage_accuracy"]) - row["accuracy"])


def read(name):
    return ways.results(ROOT / "model_cards" / f"{name}.json")


def billions(name):
    found = read(f"billions/{name}")
    assert found["peak_private_bytes"] <= found["limit_bytes"]
    return found["parameters"] / 1e9, found["limit_bytes"] / 2**30


def of_recipe(task):
    return {way: 100 * read(f"results/{task}_{way}")["accuracy"] for way in ("end_to_end", "greedy", "mmst")}


def convolutional(name):
    return {row["method"]: row for row in read(f"convolutional/{name}")["rows"]}


def won(name):
    rows = convolutional(name)
    return 100 * (rows["transport"]["accuracy"] - rows["greedy"]["accuracy"])


def below(name):
    row = convolutional(name)["transport"]
    return 100 * (max(row["stage_accuracy"]) - row["accuracy"])


def halves(name):
    return read(f"exits/{name}")["num_test_samples"]


def apart_in_onnx(name):
    return read(f"onnx/{name}")["samples"]["largest_difference"]


FINE_TUNED = [
    behind(task, row["method"], row["num_stages"])
    for task, model, row in ways.accuracy_rows()
    if model != "ViT from scratch" and row["method"] in ("default", HEADS, "default, resident")
]
TEXT, DIGITS = of_recipe("text"), of_recipe("digits")
README, ACCURACY, MEMORY = "README.md", "model_cards/accuracy.md", "model_cards/memory.md"
PLANNER = "model_cards/planner.md"
WITH_LAYERS, MASKED = "simultaneous+head_layers", "bert_base_masked_lm_cpu"
ON_DEVICE = "blocks+resident+checkpointing"
BLOCKS = (NEWS, "blocks, w = 0", 6), (VIT, f"blocks, w = 0, {FAST}", 12)
OFFLOADED, CHECKPOINTING, LORA = (memory(name) for name in ("offloaded", "end-to-end+checkpointing", "lora"))
STAGES = sorted(memory(WITH_LAYERS, 4) + memory(WITH_LAYERS))
STAGES_TIME = sorted(times(WITH_LAYERS, 4) + times(WITH_LAYERS))
STAGES_OVER_CHECKPOINTING = sorted(
    ratio(WITH_LAYERS, "end-to-end+checkpointing", name) for name in ("vit_base_cpu", "vit_base_cpu_heads_k4")
)
OFFLOADED_TIME, CHECKPOINTING_TIME = times("offloaded"), times("end-to-end+checkpointing")
FEW_TOKENS = max(
    one.time for task in fronts.TASKS.values() for one in task.standings() if "layers offloaded" in one.name
)
SECONDS, RATIOS = predictions()
SAID = [  # page, sentence, figures
    (README, "with {:.2f} billion parameters in {:.0f} GiB", billions("vit_g")),
    (README, "one with {:.2f} billion in {:.0f} GiB", billions("decoder_3b")),
    (README, "and a ViT-Base in {:.0f} % of the memory", [OFFLOADED[-1]]),
    (README, "one layer on the device at a time: {:.0f} % of the peak", [OFFLOADED[-1]]),
    (README, "checkpointing takes {:.0f} % and LoRA {:.0f} %", [CHECKPOINTING[-1], LORA[-1]]),
    (README, "takes {:.1f} to {:.1f} times as long", [OFFLOADED_TIME[0], OFFLOADED_TIME[-1]]),
    (README, "and up to {:.1f} times with few tokens", [FEW_TOKENS]),
    (README, "(checkpointing: {:.1f} to {:.1f})", [CHECKPOINTING_TIME[0], CHECKPOINTING_TIME[-1]]),
    (README, "were {:.1f} to {:.1f} points worse", [min(FINE_TUNED), max(FINE_TUNED)]),
    (README, "{:.1f} to {:.1f} points better on CIFAR-10", [min(from_scratch(MORE)), max(from_scratch(MORE))]),
    (README, "between {:.1f} better and {:.1f} worse", [max(from_scratch(FASHION)), -min(from_scratch(FASHION))]),
    (README, "take {:.0f} % of the memory and {:.2f} times", [memory(ON_DEVICE)[0], times(ON_DEVICE)[0]]),
    (README, "{:.1f} points on 20 Newsgroups in as many epochs, {:.1f} on", [behind(*one) for one in BLOCKS]),
    (README, "in memory ({:.0f} to > {:.0f} %", [STAGES[0], STAGES[-1]]),
    (README, "in {:.1f} to {:.1f} times its time; they", STAGES_OVER_CHECKPOINTING),
    (MEMORY, "checkpointing, in {:.1f} to {:.1f} times its time", STAGES_OVER_CHECKPOINTING),
    (README, "trains it in {:.0f} % of its memory", [peak(VIT, OFFLOADED_LORA, over="lora, head rate")]),
    (README, "loses {:.1f} points with 4 stages and {:.1f} with 12", [behind(MORE, HEADS, k) for k in (4, 12)]),
    (ACCURACY, "in {:.0f} to {:.0f} % of its memory on the texts", [peak(NEWS, ORDER), peak(REVIEWS, ORDER)]),
    (ACCURACY, "{:.0f} % on ViT-S", [peak(VIT, "offloaded, heads at 0.01")]),
    (ACCURACY, "in {:.0f} MiB against {:.0f}", [mib(VIT, OFFLOADED_LORA), mib(VIT, "lora, head rate")]),
    (ACCURACY, "{:.1f} points on 20 Newsgroups, {:.1f} on", [behind(task, "default", 6) for task in (NEWS, REVIEWS)]),
    (
        ACCURACY,
        "{:.1f} on ViT-S with heads at 0.01 and twelve stages, {:.1f}",
        [behind(VIT, HEADS, k) for k in (12, 4)],
    ),
    (ACCURACY, "on the texts**: {:.1f} points behind it on 20", [behind(NEWS, "default", 2)]),
    (ACCURACY, "by the defaults, {:.1f} without the", [behind(NEWS, "default, w = 0", 2)]),
    (
        ACCURACY,
        "no better than four: {:.1f} behind, {:.1f} without",
        [behind(VIT, HEADS, 2), behind(VIT, f"default, w = 0, {FAST}", 2)],
    ),
    (
        ACCURACY,
        "by {:.1f}, {:.1f} and {:.1f} points with 2, 3 and 6",
        [gain(NEWS, "default, w = 0", "default", k, k) for k in (2, 3, 6)],
    ),
    (
        ACCURACY,
        "by {:.1f} and {:.1f} with 2 and 4 on ViT-S",
        [gain(VIT, f"default, w = 0, {FAST}", HEADS, k, k) for k in (2, 4)],
    ),
    (ACCURACY, "With twelve it loses {:.1f} there", [gain(VIT, HEADS, f"default, w = 0, {FAST}", 12, 12)]),
    (
        ACCURACY,
        "nothing here: {:.1f} on 20 Newsgroups and {:.1f} on ViT-S",
        [accuracy(task, f"{BEST[task]}, 8-bit") for task in (NEWS, VIT)],
    ),
    (ACCURACY, "loss, are {:.1f} points behind on 20 Newsgroups, {:.1f} on ViT-S", [behind(*one) for one in BLOCKS]),
    (ACCURACY, "blocks are {:.1f} points behind it", [accuracy(NEWS, BEST[NEWS]) - equal_time("newsgroups_blocks")]),
    (ACCURACY, "One resident stage is {:.1f} behind", [behind(NEWS, "default, resident", 6)]),
    (ACCURACY, "on 20 Newsgroups in {:.0f} % of the memory", [peak(NEWS, "default, resident", 6)]),
    (
        ACCURACY,
        "four stages are {:.1f} points behind on ViT-S, twelve {:.1f}",
        [behind(MORE, HEADS, k) for k in (4, 12)],
    ),
    (ACCURACY, "at 1e-5 gets {:.1f} with", [accuracy(VIT, ORDER)]),
    (ACCURACY, "and {:.1f} with heads at 0.01", [accuracy(VIT, BEST[VIT])]),
    (ACCURACY, "{:.1f} points below the default on 20", [gain(NEWS, "default", "lora, head rate", 6)]),
    (ACCURACY, "{:.1f} above it on the movie reviews", [gain(REVIEWS, "lora", "default", 1, 6)]),
    (ACCURACY, "{:.1f} above it on ViT-S", [gain(VIT, "lora, head rate", HEADS, 1, 12)]),
    (ACCURACY, "with twelve stages and {:.1f} with four", [gain(VIT, "lora, head rate", HEADS, 1, 4)]),
    (ACCURACY, "last layer alone is {:.1f} below", [gain(NEWS, "default", "freeze", 6, 6)]),
    (ACCURACY, "on 20 Newsgroups and {:.1f} on ViT-S, in less", [gain(VIT, HEADS, "freeze, heads at 0.01", 12, 12)]),
    (ACCURACY, "wins {:.1f} points over greedy", [gain(NEWS, "transport", "greedy", 6, 6)]),
    (ACCURACY, "get worse, it loses {:.1f}", [gain(REVIEWS, "greedy", "transport", 6, 6)]),
    (ACCURACY, "adaptive one is {:.1f} below none", [gain(VIT, "default, w = 0", "default", 12, 12)]),
    (ACCURACY, "a constant one {:.1f}", [gain(VIT, "default, w = 0", "default, constant", 12, 12)]),
    (ACCURACY, "one rate it wins {:.1f}", [gain(NEWS, ONE_RATE, "default, w = 0, one rate", 6, 6)]),
    (ACCURACY, "20 Newsgroups loses {:.1f} points", [gain(NEWS, ONE_RATE, "default, constant", 6, 6)]),
    (
        ACCURACY,
        "{:.1f} and {:.1f} points behind on the texts",
        [together(task, "default", 6) for task in (NEWS, REVIEWS)],
    ),
    (ACCURACY, "texts, {:.1f} and {:.1f} on ViT-S. - **Late", [together(VIT, HEADS, k) for k in (12, 4)]),
    (ACCURACY, "at most {:.1f} points on the texts", [max(fall(NEWS, 3), fall(NEWS, 6), fall(REVIEWS, 6))]),
    (ACCURACY, "texts and {:.1f} on ViT-S, with", [fall(VIT, 12)]),
    (ACCURACY, "with heads at 0.01 by {:.1f}.", [fall(VIT, 12, HEADS)]),
    (ACCURACY, "embeddings are {:.1f} behind", [behind(NEWS, "freeze, head rate")]),
    (ACCURACY, "in {:.0f} MiB against {:.0f}.", [mib(NEWS, "freeze, head rate"), mib(NEWS, BEST[NEWS])]),
    (ACCURACY, "all three are within {:.1f} points", [TEXT["mmst"] - TEXT["end_to_end"]]),
    (ACCURACY, "transport term loses {:.1f} points", [DIGITS["greedy"] - DIGITS["mmst"]]),
    ("model_cards/convolutional.md", "chance here: {:.1f} points less", [-won("resnet18")]),
    ("model_cards/convolutional.md", "for ResNet, {:.2f} more for VGG", [won("vgg11_bn")]),
    ("model_cards/convolutional.md", "the model's own by {:.0f} points", [below("vgg11_bn")]),
    ("model_cards/exits.md", "({} digits, {} texts;", [halves("digits"), halves("text")]),
    ("model_cards/exits.md", "One text is {:.2f} points", [100 / halves("text")]),
    ("model_cards/exits.md", "with logits {:.0e} apart at most", [max(map(apart_in_onnx, ("digits", "text")))]),
    ("model_cards/scaling.md", "P = {:.0f} million parameters", [vit_large().parameters / 1e6]),
    (MEMORY, "by far: {:.0f} to {:.0f} %", [OFFLOADED[0], memory("resident+cache")[0]]),
    (MEMORY, "in {:.1f} to {:.1f} times the time of a step", [OFFLOADED_TIME[0], OFFLOADED_TIME[-1]]),
    (MEMORY, "That was {:.1f} to {:.1f} times what", [over_checkpointing()[0], over_checkpointing()[-1]]),
    (MEMORY, "resident it is {:.1f} times that of", times("offloaded+half resident")),
    (MEMORY, "training in {:.0f} % of its memory", memory("offloaded+half resident")),
    (MEMORY, "four stages take {:.1f} times", [ratio("simultaneous", "end-to-end", MASKED)]),
    (MEMORY, "they would take {:.1f} times", [ratio("simultaneous+logits of all", "end-to-end", MASKED)]),
    (MEMORY, "checkpointing takes {:.1f} times the time", times("end-to-end+checkpointing+8-bit")),
    (MEMORY, "and {:.0f} % of the memory", memory("end-to-end+checkpointing+8-bit")),
    (MEMORY, "the former alone {:.0f} %", memory("end-to-end+8-bit")),
    (MEMORY, "model's loss, take {:.0f} % of the memory", memory(ON_DEVICE)),
    (MEMORY, "and {:.2f} times the time, one on", times(ON_DEVICE)),
    (MEMORY, "up to {:.1f} times as much (LoRA)", [reserve("lora")]),
    (MEMORY, "take {:.0f} to {:.0f} % of the memory", [STAGES[0], STAGES[-1]]),
    (MEMORY, "{:.1f} to {:.1f} times the time: more memory", [STAGES_TIME[0], STAGES_TIME[-1]]),
    (PLANNER, "between {:.1f} and {:.1f} times", [min(SECONDS), max(SECONDS)]),
    (PLANNER, "{} of {} within 15 %:", close(SECONDS)),
    (PLANNER, "training {} of {} are within 15 %", close(RATIOS)),
    (PLANNER, "took up to {:.1f} times as long", [1 / min(RATIOS)]),
    (
        "recipes/vit_cifar.py",
        "wins {:.1f} points on CIFAR-10 and {:.1f} on",
        [won_from_scratch(task, 12) for task in (MORE, FASHION)],
    ),
    ("recipes/bert_text.py", "Newsgroups, it wins {:.1f} points", [gain(NEWS, "transport", "greedy", 6, 6)]),
    ("recipes/adapters.md", "in {:.0f} % of its memory", [peak(VIT, OFFLOADED_LORA, over="lora, head rate")]),
    ("recipes/adapters.md", "{:.1f} points below it", [gain(VIT, "lora, head rate", "default, lora", 1, 12)]),
]


@pytest.mark.parametrize(("page", "sentence", "figures"), SAID)
def test_the_figures_are_those_of_the_results(page, sentence, figures):
    text = " ".join((ROOT / page).read_text().split())
    assert re.sub(r"\s+", " ", sentence.format(*figures)) in text


def test_what_is_said_without_figures():
    """Which way is the better one, where the pages rank them."""
    for stages in (4, 12):
        assert memory(WITH_LAYERS, stages)[0] > CHECKPOINTING[-1]
    for path in (ROOT / "model_cards" / "memory").glob("*.json"):
        rows = [row for row in read(f"memory/{path.stem}")["rows"] if row["reserved_bytes"] is not None]
        assert all(row["peak_bytes"] <= row["reserved_bytes"] for row in rows)
    assert times("simultaneous+stage_clipping")[0] < CHECKPOINTING_TIME[0]
    assert memory("simultaneous+stage_clipping")[0] < CHECKPOINTING[0]
    for task, method, same in (
        (NEWS, "offloaded, head rate", BEST[NEWS]),
        (REVIEWS, "offloaded, head rate", BEST[REVIEWS]),
        (VIT, "offloaded, heads at 0.01", BEST[VIT]),
        (VIT, OFFLOADED_LORA, "lora, head rate"),
    ):
        rows = [ways.accuracy_row(task, name)["accuracies"] for name in (method, same)]
        assert rows[0] == rows[1]
    weights = [accuracy(NEWS, name, 6) for name in ("default", "default, constant", "default, w = 0")]
    assert max(weights) - min(weights) < 0.5


def test_the_readmes_rows_have_three_seeds():
    assert {len(row["accuracies"]) for task, _, row in ways.accuracy_rows() if task in (NEWS, VIT)} == {3}


@pytest.mark.parametrize("task", fronts.TASKS.values(), ids=fronts.TASKS)
def test_nothing_beats_the_defaults_of_a_pretrained_model(task):
    standings = task.standings()
    (ours,) = [one for one in standings if "the defaults" in one.name]
    assert [one.name for one in standings if one.beats(ours)] == []
