"""A run in a notebook: the host's table has the stages' columns; a run shows its table and its picture."""

import re
import sys
from types import ModuleType

import pytest
from runs import trainer


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show, in HTML."""
    pages = []

    class Output:
        def update(self, page):
            pages.append(page)

    display = ModuleType("IPython.display")
    display.HTML, display.display = str, lambda page, **_: pages.append(page) or Output()
    package = ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    return pages


def test_the_hosts_table_has_a_column_for_each_number_of_each_stage(shown, tmp_path):
    from transformers.utils.notebook import NotebookProgressCallback

    trainer(tmp_path, eval_strategy="epoch", extra={"callbacks": [NotebookProgressCallback()]}).train()
    columns = re.findall(r"<th>(.*?)</th>", shown[-1])
    cells = re.findall(r"<td>(.*?)</td>", shown[-1])
    assert columns[:3] == ["Epoch", "Training Loss", "Validation Loss"]
    for stage in (1, 2, 3):
        assert {f"Stage {stage} {name}" for name in ("Accuracy", "Loss", "Transport")} < {*columns}
    assert len(cells) == 2 * len(columns)
    assert "No Log" not in cells


def test_stages_and_plot(tmp_path, capsys):
    run = trainer(tmp_path, eval_strategy="epoch")
    run.stages()
    assert capsys.readouterr().out == ""
    assert run.plot() is None
    run.train()
    capsys.readouterr()
    run.stages()
    last = [entry for entry in run.state.log_history if "eval_stage_3_loss" in entry][-1]
    said = capsys.readouterr().out
    for stage in (1, 2, 3):
        assert f"{last[f'eval_stage_{stage}_accuracy']:.2%}" in said
        assert f"{last[f'eval_stage_{stage}_transport']:.4f}" in said
    titles = [axes.get_title() for axes in run.plot().axes]
    assert titles[:2] == ["accuracy in evaluation", "task loss in training"]
