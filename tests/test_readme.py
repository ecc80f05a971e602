"""The README's code runs, and its numbers are those that the recipes wrote."""

import json
import re
from pathlib import Path

from datasets import Dataset
from zoo import Samples, make

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "model_cards" / "results"
METHODS = {"end_to_end": "end to end", "greedy": "greedy (w = 0)", "mmst": "MMST (w = 0.3)"}


def row(path):
    found = json.loads(path.read_text())
    accuracies = [f"{100 * value:.1f}" for value in found["stage_accuracy"]]
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


def test_every_result_names_its_command_versions_and_device():
    paths = list(RESULTS.glob("*.json"))
    assert len(paths) == 6
    for path in paths:
        found = json.loads(path.read_text())
        assert found["command"].startswith("recipes/")
        assert {"torch", "transformers", "accelerate"} <= found["versions"].keys()
        assert found["device"]["type"]
        assert isinstance(found["seed"], int)


def test_the_quickstart_trains(tmp_path, monkeypatch):
    """With a small model in the place of the pretrained one; nothing else is changed."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
