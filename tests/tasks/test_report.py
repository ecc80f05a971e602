"""What the table and the file of a finished run hold."""

import json

import pytest

from hf_mmst.tasks.report import StageRow, print_stage_table, stage_rows, write_results

METRICS = {
    "eval_accuracy": 0.75,
    **{f"eval_stage_{k}_{name}": value for k in (1, 2) for name, value in (("loss", 0.5 * k), ("transport", 0.1 * k))},
    "eval_stage_1_accuracy": 0.5,
    "eval_stage_2_accuracy": 0.75,
}


def test_rows_and_table(capsys):
    rows = stage_rows(METRICS)
    assert rows == [StageRow(1, 0.5, 0.5, 0.1), StageRow(2, 0.75, 1.0, 0.2)]
    print_stage_table(rows)
    assert "│ 2     │ 75.00%   │ 1.0000 │ 0.2000    │" in capsys.readouterr().out


@pytest.mark.parametrize(("stages", "weight", "method"), [(2, 0.0, "mmst"), (1, 0.3, "end-to-end")])
def test_results_replace_the_old_file_as_a_whole(stages, weight, method, tmp_path, monkeypatch):
    from runs import trainer

    run = trainer(tmp_path, num_stages=stages, transport_weight=weight)
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
