"""What the table and the file of a finished run hold."""

import json
import re

import datasets
import numpy as np
import pytest
import runs
import zoo
from transformers import TrainerCallback

from hf_mmst.records.results import standard_error
from hf_mmst.records.stage_table import print_stages
from hf_mmst.tasks.images import DEFAULTS
from hf_mmst.tasks.report import train_and_report, write_results

METRICS = {
    "eval_accuracy": 0.75,
    **{f"eval_stage_{k}_{name}": value for k in (1, 2) for name, value in (("loss", 0.5 * k), ("transport", 0.1 * k))},
    "eval_stage_1_accuracy": 0.5,
    "eval_stage_2_accuracy": 0.75,
}


def test_the_table_of_stages(capsys):
    print_stages(METRICS)
    said = capsys.readouterr().out
    assert "│ 2     │ 75.00%   │ 1.0000 │ 0.2000    │" in said
    print_stages({"eval_accuracy": 0.5})  # of a model without stages
    print_stages({})
    assert capsys.readouterr().out == ""


def test_the_standard_error_is_that_of_a_binomial():
    right = np.random.default_rng(0).binomial(1000, 0.9, size=20000) / 1000
    assert standard_error(0.9, 1000) == pytest.approx(right.std(), rel=0.02)
    assert standard_error(1.0, 10) == 0


@pytest.mark.parametrize("bar", [True, False])
def test_a_run_says_a_line_an_epoch_and_the_logs_have_it_all(bar, tmp_path, capsys):
    columns = zoo.batch("vit", 32, 0)
    data = datasets.Dataset.from_dict({name: column.tolist() for name, column in columns.items()}).with_format("torch")
    evaluated = {}

    class Sizes(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            evaluated[len(evaluated)] = round(metrics["eval_runtime"] * metrics["eval_samples_per_second"])

    run = runs.trainer(tmp_path, data=data, eval_strategy="epoch", disable_tqdm=not bar, extra={"callbacks": [Sizes()]})
    run.eval_dataset = data.select(range(16))
    train_and_report(run, model="vit", dataset="noise", begin=0.0)
    said, bars = capsys.readouterr()
    assert "{" not in said  # no dictionary of numbers
    lines = [line.split() for line in said.splitlines() if re.match(r" *[12]/2 ", line)]
    assert [(len(line), line[0], line[-1]) for line in lines] == [(8, "1/2", "MiB"), (8, "2/2", "MiB")]
    assert ("8/8" in bars) == bar
    assert "Evaluations in training are on 4 of the 16 samples" in said
    assert [*evaluated.values()] == [4, 4, 16]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["peak_bytes"] == pytest.approx(found["planned_bytes"], rel=0.03)
    assert found["num_eval_samples"] == 16
    assert f"memory: tensors measured {found['peak_bytes'] / 2**20:,.0f} MiB, planned" in said
    assert "; the whole process " in said
    assert sum("stage_1_transport" in entry for entry in run.state.log_history) == 8


def test_evaluations_that_choose_a_model_are_on_all(tmp_path, capsys):
    run = runs.trainer(tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    train_and_report(run, model="vit", dataset="noise", begin=0.0)
    assert "Evaluations in training" not in capsys.readouterr().out


def test_the_recipes_evaluate_each_epoch():
    assert DEFAULTS["eval_strategy"] == "epoch"


@pytest.mark.parametrize(("stages", "weight", "method"), [(2, 0.0, "mmst"), (1, 0.3, "end-to-end")])
def test_results_replace_the_old_file_as_a_whole(stages, weight, method, tmp_path, monkeypatch):
    run = runs.trainer(tmp_path, num_stages=stages, transport_weight=weight)
    (tmp_path / "results.json").write_text("old")
    monkeypatch.setattr("sys.argv", ["/home/someone/recipes/vit_cifar.py", "--output_dir", str(tmp_path)])
    results = write_results(run, METRICS, peak_bytes=1, seconds=2.0)
    path = tmp_path / "results.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(results))
    found = json.loads(path.read_text())
    assert [one.name for one in tmp_path.glob("*results*")] == ["results.json"]
    assert (found["method"], found["accuracy"], found["peak_bytes"]) == (method, 0.75, 1)
    assert found["command"] == f"recipes/vit_cifar.py --output_dir {tmp_path.name}"
    assert found["stage_accuracy"] == [0.5, 0.75]
