"""The README's code runs, and its numbers are those that the recipes wrote."""

import json
import re
from pathlib import Path

from benchmark_scaling import Job, on_paper, ratios, vit_large
from datasets import Dataset
from zoo import Samples, make

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "model_cards" / "results"
MEMORY = ROOT / "model_cards" / "memory"
ACCURACY = ROOT / "model_cards" / "accuracy"
SCALING = ROOT / "model_cards" / "scaling"
CONVOLUTIONAL = ROOT / "model_cards" / "convolutional"
PLANNER = ROOT / "model_cards" / "planner.json"
NEW_USER = ROOT / "model_cards" / "new_user.json"
METHODS = {"end_to_end": "end to end", "greedy": "greedy (w = 0)", "mmst": "MMST (w = 0.3)"}


def row(path):
    found = json.loads(path.read_text())
    accuracies = [f"{100 * value:.1f}" for value in found.get("stage_accuracy", [found["accuracy"]])]
    cells = (found["dataset"], found["model"], METHODS[path.stem.partition("_")[2]], found["num_stages"])
    peak = found["peak_bytes"] / 2**20
    return (
        "| " + " | ".join(map(str, [*cells, accuracies[-1], ", ".join(accuracies[:-1]) or "-", f"{peak:.0f}"])) + " |"
    )


def table():
    head = "| dataset | model | method | K | accuracy | stages before | peak MiB (CPU) |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *(row(path) for path in sorted(RESULTS.glob("*.json")))])


def test_the_table_is_what_the_recipes_wrote():
    assert README.partition("<!-- results -->\n")[2].partition("\n<!-- /results -->")[0] == table()


def memory_table():
    head = "| model | method | peak MiB | planned MiB of tensors | peak | step | epoch |\n|---|---|---|---|---|---|---|"
    lines = [head]
    for path in sorted(MEMORY.glob("*.json")):
        found = json.loads(path.read_text())
        first = found["rows"][0]
        model = f"{found['model']}, batch {found['batch_size']}, K = {found['num_stages']}"
        for row in found["rows"]:
            ratios = [f"{row[key] / first[key]:.2f}" for key in ("peak_bytes", "step_seconds", "epoch_seconds")]
            mib = [f"{row[key] / 2**20:.0f}" if row[key] else "-" for key in ("peak_bytes", "planned_bytes")]
            lines.append("| " + " | ".join([model, row["method"], *mib, *ratios]) + " |")
    return "\n".join(lines)


def test_the_memory_table_is_what_the_benchmark_wrote():
    assert README.partition("<!-- memory -->\n")[2].partition("\n<!-- /memory -->")[0] == memory_table()


def accuracy_table(folder=ACCURACY):
    names = ("task", "K", "method", "learning rate", "accuracy", "heads together", "stages before", "peak MiB")
    lines = [f"| {' | '.join(names)} |\n{'|---' * len(names)}|"]
    rows = []
    for found in map(json.loads, (path.read_text() for path in sorted(folder.glob("*.json")))):
        task = f"{found['dataset']}, {found['num_train_samples']:,} samples, {found['model']}"
        rows += [(task, row["num_stages"], row["method"], row) for row in found["rows"]]
    for task, num_stages, method, row in sorted(rows, key=lambda one: one[:3]):
        cells = [task, num_stages, method, f"{row['learning_rate']:g}"]
        for name in ("accuracy", "ensemble_accuracy"):
            error = row.get("standard_error" if name == "accuracy" else "ensemble_standard_error") or 0
            shown = f" ± {100 * error:.1f}" if len(row["accuracies"]) > 1 else " (one seed)"
            cells.append("-" if row.get(name) is None else f"{100 * row[name]:.1f}{shown}")
        cells.append(", ".join(f"{100 * value:.1f}" for value in row["stage_accuracy"][:-1]) or "-")
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['peak_bytes'] / 2**20:.0f}"])) + " |")
    return "\n".join(lines)


def test_the_accuracy_table_is_what_the_benchmark_wrote():
    assert README.partition("<!-- accuracy -->\n")[2].partition("\n<!-- /accuracy -->")[0] == accuracy_table()


def scaling_table():
    head = "| model | processes | method | step | peak | times as fast |\n|---|---|---|---|---|---|"
    lines = [head]
    for path in sorted(SCALING.glob("*.json")):
        found = json.loads(path.read_text())
        model = f"{found['model']}, batch {found['batch_size']}, K = {found['num_stages']}"
        for row, ratio in zip(found["rows"], ratios(found["rows"]), strict=True):
            numbers = [f"{ratio[name]:.2f}" for name in ("step", "peak", "scaling")]
            lines.append("| " + " | ".join([model, str(row["num_processes"]), row["method"], *numbers]) + " |")
    return "\n".join(lines)


def test_the_scaling_table_is_what_the_benchmark_wrote():
    assert README.partition("<!-- scaling -->\n")[2].partition("\n<!-- /scaling -->")[0] == scaling_table()


def test_the_table_on_paper_is_what_the_formulas_give():
    assert README.partition("<!-- on_paper -->\n")[2].partition("\n<!-- /on_paper -->")[0] == on_paper(vit_large())
    job = Job(100 * 2**20, 10 * 2**20, 2, 5 * 2**20, samples=3, micro_batches=4)
    cells = [[cell.strip() for cell in line.split("|")[3:-1]] for line in on_paper(job, (2, 4)).splitlines()[2:]]
    assert cells == [
        ["400", "600", "0%", "1,600"],
        ["400", "600", "0%", "800, 400"],
        ["120", "320", "20%", "800"],
        ["440", "660", "0%", "1,760"],
        ["220", "330", "0%", "880"],
        ["60", "280", "0%", "880"],
    ]


def convolutional_table():
    return accuracy_table(CONVOLUTIONAL)


def test_the_table_of_convolutional_networks_is_what_the_benchmark_wrote():
    found = README.partition("<!-- convolutional -->\n")[2].partition("\n<!-- /convolutional -->")[0]
    assert found == convolutional_table()


def planner_table():
    lines = ["| model | precision | settings | planned MiB | measured MiB | ratio |\n|---|---|---|---|---|---|"]
    for row in json.loads(PLANNER.read_text())["rows"]:
        settings = ", ".join(f"`{name}={value!r}`" for name, value in row["settings"].items()) or "end to end"
        planned, measured = row["planned_bytes"], row["measured_bytes"]
        numbers = [f"{planned / 2**20:.1f}", f"{measured / 2**20:.1f}", f"{planned / measured:.3f}"]
        lines.append("| " + " | ".join([row["model"], row["precision"], settings, *numbers]) + " |")
    return "\n".join(lines)


def test_the_planner_table_is_what_the_benchmark_wrote():
    assert README.partition("<!-- planner -->\n")[2].partition("\n<!-- /planner -->")[0] == planner_table()
    rows = json.loads(PLANNER.read_text())["rows"]
    assert len(rows) >= 12
    assert {row["model"] for row in rows} == {"vit", "bert", "swin"}
    assert all(abs(row["planned_bytes"] / row["measured_bytes"] - 1) <= 0.03 for row in rows)


def test_all_stages_at_once_take_hardly_more_time_than_end_to_end():
    rows = json.loads((MEMORY / "vit_base_cpu_k4_alternating.json").read_text())["rows"]
    assert [row["method"] for row in rows] == 2 * ["end-to-end", "simultaneous"]
    for whole, stages in (rows[:2], rows[2:]):
        assert stages["step_seconds"] <= 1.10 * whole["step_seconds"]


def test_one_resident_stage_takes_what_is_promised():
    rows = {row["method"]: row for row in json.loads((MEMORY / "vit_base_cpu.json").read_text())["rows"]}
    peak = {method: row["peak_bytes"] for method, row in rows.items()}
    assert peak["resident"] <= 0.25 * peak["end-to-end"]
    assert peak["resident"] <= 0.6 * peak["end-to-end+checkpointing"]
    coupled = {r["method"]: r for r in json.loads((MEMORY / "vit_base_cpu_coupled.json").read_text())["rows"]}
    assert coupled["coupled"]["peak_bytes"] <= 0.2 * coupled["end-to-end"]["peak_bytes"]


def new_user_table():
    lines = ["| step | command | seconds | says |\n|---|---|---|---|"]
    for step in json.loads(NEW_USER.read_text())["steps"]:
        command = step["command"] if len(step["command"]) < 100 else f"{step['command'][:90]} ..."
        shown = ", ".join(f"`{' '.join(line.split())}`" for line in step["shown"])
        lines.append(f"| {step['name']} | `{command}` | {step['seconds']:.0f} | {shown} |")
    return "\n".join(lines)


def test_the_table_of_a_new_user_is_what_was_timed():
    assert README.partition("<!-- new_user -->\n")[2].partition("\n<!-- /new_user -->")[0] == new_user_table()


def test_every_result_names_its_command_versions_and_device():
    paths = list(RESULTS.glob("*.json"))
    assert len(paths) == 6
    folders = (MEMORY, ACCURACY, SCALING, CONVOLUTIONAL)
    for path in [*paths, *(path for folder in folders for path in folder.glob("*.json")), PLANNER]:
        found = json.loads(path.read_text())
        assert found["command"].startswith("recipes/")
        assert {"torch", "transformers", "accelerate"} <= found["versions"].keys()
        assert found["device"]["type"]
        assert isinstance(found["seed"], int)


def test_the_quickstart_trains(tmp_path, monkeypatch):
    """With a small model in the place of the pretrained one; nothing else is changed."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert code.count("\n") < 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.AutoModelForImageClassification.from_pretrained", lambda name, num_labels: make("vit")
    )
    data = Dataset.from_list([Samples("vit", 16)[i] for i in range(16)]).with_format("torch")
    scope = {"train": data, "test": data, "accuracy": lambda found: {"accuracy": 0.5}}
    exec(code, scope)
    assert scope["trainer"].state.global_step == 6
    assert (tmp_path / "vit-stages" / "stages.safetensors").is_file()
