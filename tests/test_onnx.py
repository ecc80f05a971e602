"""The ONNX recipe, where its packages are installed."""

import json
import sys

import export_onnx
import pytest
import runs
import torch

for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.mark.parametrize(("name", "num_stages"), [("bert", 1), ("vit", 2), ("bert", None)])
def test_onnx_says_what_the_stage_says(name, num_stages, tmp_path, monkeypatch):
    trained = runs.trainer(tmp_path / "model", name, head_pooling="cls", num_stages=4)
    for module in trained.model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)  # a norm's eps counts where hidden states are tiny
    trained.save_model()
    out = tmp_path / "onnx"
    flags = [] if num_stages is None else ["--num_stages", str(num_stages)]
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", str(tmp_path / "model"), "--output_dir", str(out), *flags])
    export_onnx.main()
    found = json.loads((out / "onnx.json").read_text())
    assert (out / "model.onnx").stat().st_size > 0
    assert found["largest_difference"] < 1e-4
    assert (found["num_stages"], found["seconds_onnx"] > 0) == (num_stages, True)
