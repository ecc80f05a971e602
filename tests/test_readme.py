"""The pages: short enough, their links lead somewhere, and their tables, picture and figures are what was measured."""

import json
import re
from pathlib import Path

import pages
import pytest
import ways
from benchmark_scaling import Job, on_paper
from datasets import Dataset
from PIL import Image
from transformers import ViTForImageClassification
from zoo import Samples, make

from hf_mmst import MMSTConfig
from hf_mmst.config import OWN_FIELDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CARDS = ROOT / "model_cards"
PAGES = sorted(
    path
    for pattern in ("*.md", ".github/*.md", "hf_mmst/*.md", "recipes/*.md", "model_cards/**/*.md")
    for path in ROOT.glob(pattern)
)
COMMANDS = (
    "python -m venv v && . v/bin/activate && pip install -e '.[recipes]' && accelerate launch recipes/vit_cifar.py\n",
    "python -m venv v && . v/bin/activate && pip install -e '.[dev]' && pytest -n 2 --dist loadfile\n",
)


def test_the_readme_is_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert all(len(line) <= 120 or line.startswith("|") for line in lines)
    assert all(f"```bash\n{command}```" in README for command in COMMANDS)
    assert len((ROOT / ".github" / "CONTRIBUTING.md").read_text().splitlines()) <= 45


def test_every_field_has_its_place():
    """The README's table names some of the fields with their defaults; the docstring has all of them."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE)
    defaults = {name: MMSTConfig.__dataclass_fields__[name].default for name in OWN_FIELDS}
    assert 5 <= len(rows) <= 10
    for name, default in rows:
        assert default.strip('"') == str(defaults[name])
    assert all(f"\n        {name} (`" in MMSTConfig.__doc__ for name in OWN_FIELDS)


def test_every_room_is_on_the_plan():
    """In the table of rooms each has a row; what the reading order names is there."""
    rooms = {path.parent.name for path in ROOT.glob("hf_mmst/*/__init__.py")}
    rooms |= {path.name for path in ROOT.glob("hf_mmst/[!_]*.py")}
    rows = re.findall(r"^\| (.*?) \|", pages.block("hf_mmst/README.md", "rooms"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row)} == rooms
    order = (ROOT / "hf_mmst" / "README.md").read_text().partition("## Reading order")[2]
    named = {*re.findall(r"`([a-z_]+)`", order)}
    assert len(named) > 20
    assert named <= {path.stem for path in ROOT.glob("hf_mmst/**/*.py")} | {
        path.name for path in ROOT.glob("hf_mmst/*/")
    }


def anchors(path):
    """What GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http", "$")):
            name, _, anchor = target.partition("#")
            to = (path.parent / name).resolve() if name else path
            assert to.exists(), target
            assert not anchor or anchor in anchors(to), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(path):
    for name in re.findall(r"`(?:python )?((?:recipes|tests|hf_mmst|model_cards)/[\w/.]+)", path.read_text()):
        assert (ROOT / name).exists(), name


def test_every_page_is_within_reach():
    """From the README by links."""
    seen, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        if path not in seen and path.suffix == ".md":
            seen.add(path)
            found = re.findall(r"\]\(([^)\s#]+)", path.read_text())
            left += [(path.parent / name).resolve() for name in found if not name.startswith("http")]
    assert {*PAGES} <= seen


@pytest.mark.parametrize("name", pages.BLOCKS)
def test_the_table_is_what_was_measured(name):
    page, make_table = pages.BLOCKS[name]
    assert pages.block(page, name) == make_table()


def test_the_picture_is_what_was_measured():
    with Image.open(ways.PICTURE) as picture:
        assert picture.info["Source"] == ways.digest()
        assert picture.width >= 1200


def test_the_picture_is_drawn(tmp_path):
    ways.draw(tmp_path / "ways.png")
    with Image.open(tmp_path / "ways.png") as drawn, Image.open(ways.PICTURE) as picture:
        assert drawn.size == picture.size
    used = {point.way for points in ways.panels().values() for point in points}
    assert used == {*ways.WAYS}
    assert len({*ways.WAYS.values()}) == len(ways.WAYS)


def test_pages_are_written_anew(tmp_path):
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb"
    assert pages.filled(text, "one", "new") == "a\n<!-- one -->\nnew\n<!-- /one -->\nb"
    with pytest.raises(ValueError, match="no block two"):
        pages.filled(text, "two", "new")


def test_the_table_on_paper_is_what_the_formulas_give():
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


def test_plans_are_within_three_per_cent():
    rows = json.loads((CARDS / "planner.json").read_text())["rows"]
    assert len(rows) >= 12
    assert {row["model"] for row in rows} == {"vit", "bert", "bert-masked-lm", "swin"}
    assert all(abs(row["planned_bytes"] / row["measured_bytes"] - 1) <= 0.03 for row in rows)


def test_all_stages_at_once_take_hardly_more_time_than_end_to_end():
    rows = json.loads((CARDS / "memory" / "vit_base_cpu_k4_alternating.json").read_text())["rows"]
    assert [row["method"] for row in rows] == 2 * ["end-to-end", "simultaneous"]
    for whole, stages in (rows[:2], rows[2:]):
        assert stages["step_seconds"] <= 1.10 * whole["step_seconds"]


def test_one_resident_stage_takes_what_is_promised():
    rows = {row["method"]: row for row in json.loads((CARDS / "memory" / "vit_base_cpu.json").read_text())["rows"]}
    peak = {method: row["peak_bytes"] for method, row in rows.items()}
    assert peak["resident"] <= 0.25 * peak["end-to-end"]
    assert peak["resident"] <= 0.6 * peak["end-to-end+checkpointing"]
    assert max(ways.memory_ratios("offloaded")) <= 0.2


def test_every_result_names_its_command_versions_and_device():
    assert len([*(CARDS / "results").glob("*.json")]) == 6
    folders = "results", "memory", "billions", "accuracy", "scaling", "convolutional"
    paths = [path for folder in folders for path in (CARDS / folder).glob("*.json")]
    for path in [*paths, CARDS / "planner.json"]:
        found = json.loads(path.read_text())
        assert found["command"].startswith("recipes/")
        assert {"torch", "transformers", "accelerate"} <= found["versions"].keys()
        assert found["device"]["type"]
        assert isinstance(found["seed"], int)


def test_the_quickstart_trains(tmp_path, monkeypatch):
    """With a small model in the place of the pretrained one; nothing else is changed."""
    exact, stages = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    assert exact.count("\n") < 15
    monkeypatch.chdir(tmp_path)
    make("vit").save_pretrained("small")
    monkeypatch.setattr(
        "transformers.AutoModelForImageClassification.from_pretrained",
        lambda name, num_labels: ViTForImageClassification.from_pretrained("small"),
    )
    data = Dataset.from_list([Samples("vit", 16)[i] for i in range(16)]).with_format("torch")
    scope = {"train": data, "test": data, "accuracy": lambda found: {"accuracy": 0.5}}
    exec(exact, scope)
    assert scope["trainer"].state.global_step == 6
    assert (scope["args"].stage_order, scope["args"].offload) == ("end_to_end", "layers")
    exec(stages, scope)
    assert scope["trainer"].partition.num_stages == 4
    assert (tmp_path / "vit-stages" / "stages.safetensors").is_file()
