"""The ONNX recipe, where its packages are installed."""

import json
import sys
from pathlib import Path

import export_onnx
import pytest
import runs
import torch
from zoo import make

from hf_mmst import EarlyExit
from hf_mmst.inference.exit_rules import ExitRule

for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"exports need {package}; the rest of the package does not")


def trained(folder, name, num_stages, **kwargs):
    """Of stages with a layer each."""
    model = None if name == "swin" else make(name, num_hidden_layers=num_stages)
    trainer = runs.trainer(folder, name, model, head_pooling="cls", num_stages=num_stages, **kwargs)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)  # a norm's eps counts where hidden states are tiny
    trainer.save_model()


def export(monkeypatch, folder, *flags):
    out = folder.parent / "onnx"
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", str(folder), "--output_dir", str(out), *flags])
    export_onnx.main()
    return out / "model.onnx", json.loads((out / "onnx.json").read_text())


@pytest.mark.parametrize(("name", "num_stages"), [("bert", 1), ("vit", 2), ("bert", None)])
def test_onnx_says_what_the_stage_says(name, num_stages, tmp_path, monkeypatch):
    trained(tmp_path / "model", name, 4)
    flags = [] if num_stages is None else ["--num_stages", str(num_stages)]
    path, found = export(monkeypatch, tmp_path / "model", *flags)
    assert path.stat().st_size > 0
    assert found["largest_difference"] < 1e-4
    assert (found["num_stages"], found["seconds_onnx"] > 0) == (num_stages, True)


RULES = [
    ("bert", 2, 1, lambda threshold: ExitRule(threshold, temperatures=(2.0, 1.0))),
    ("vit", 3, 0, lambda threshold: ExitRule(threshold)),
    ("vit", 3, 0, lambda _: ExitRule(patience=1, temperatures=(1.0, 0.3, 0.3), ensemble=True)),
]


@pytest.mark.parametrize(("name", "num_stages", "head_layers", "rule"), RULES)
def test_onnx_leaves_where_early_exit_does(name, num_stages, head_layers, rule, tmp_path, monkeypatch):
    import onnxruntime

    folder = tmp_path / "model"
    trained(folder, name, num_stages, head_layers=head_layers)
    early = EarlyExit.from_pretrained(folder)
    inputs = export_onnx.random_inputs(early.model, 24, 12)
    batches = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(24)]
    early.rule = rule(2.0)
    found = early.observe([{**inputs, "labels": torch.zeros(24, dtype=torch.long)}])
    answers = early.rule.answers(found.logits)
    sure = torch.stack([early.rule.confidence(k, answers[k]) for k in range(num_stages - 1)]).flatten()
    early.rule = rule(float(sure.quantile(0.5)))  # half may leave
    early.save_rule(folder)

    path, written = export(monkeypatch, folder, "--early_exit")
    assert written["rule"]["threshold"] == early.rule.threshold
    session = onnxruntime.InferenceSession(path)
    exits = set()
    for given in [inputs, *batches]:
        logits, stages = session.run(None, {key: value.numpy() for key, value in given.items()})
        expected = early(**given)
        torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-5)
        assert stages.tolist() == expected.exit_stages.tolist()
        exits |= {*stages.tolist()}
    assert len(exits) > 1


def test_stages_after_the_last_exit_do_not_run(tmp_path, monkeypatch):
    """Told by the profile of ONNX Runtime: which nodes have run, for the surest of some samples and the least sure."""
    import onnxruntime

    folder = tmp_path / "model"
    trained(folder, "vit", 2)
    early = EarlyExit.from_pretrained(folder)
    inputs = export_onnx.random_inputs(early.model, 8, 1)
    found = early.observe([{**inputs, "labels": torch.zeros(8, dtype=torch.long)}])
    sure, order = early.rule.confidence(0, found.logits[0]).sort(descending=True)
    early.rule = ExitRule(float(sure[3:5].mean()))
    early.save_rule(folder)
    path, _ = export(monkeypatch, folder, "--early_exit")
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    ran = []
    for sample in (order[0], order[-1]):
        session = onnxruntime.InferenceSession(path, options)
        session.run(None, {name: value[sample].unsqueeze(0).numpy() for name, value in inputs.items()})
        events = json.loads(Path(session.end_profiling()).read_text())
        ran.append(sum(event.get("args", {}).get("op_name") == "LayerNormalization" for event in events))
    assert 0 < ran[0] < ran[1]


def test_stages_of_several_shapes_are_refused(tmp_path, monkeypatch):
    trained(tmp_path / "model", "swin", 2)
    with pytest.raises(ValueError, match="cannot be skipped in a graph"):
        export(monkeypatch, tmp_path / "model", "--early_exit")


@pytest.mark.parametrize(
    ("flags", "said"), [(["--early_exit", "--num_stages", "1"], "all stages"), (["--samples", "texts"], "early exit")]
)
def test_flags_that_exclude_each_other(flags, said, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        export(monkeypatch, tmp_path / "model", *flags)
    assert said in capsys.readouterr().err
