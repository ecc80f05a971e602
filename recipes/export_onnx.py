# /// script
# dependencies = ["hf-mmst[recipes,onnx]"]
# ///
"""
A model that was trained in stages -> ONNX: its first stages, or all of it.

    python recipes/export_onnx.py trained --num_stages 2 --output_dir small
    python recipes/export_onnx.py trained --output_dir whole

Writes `model.onnx`, for batches of any size and texts of any length, and `onnx.json`: how far ONNX Runtime's logits
are from PyTorch's on random inputs, which must be less than 1e-4, and the time of one sample with each.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_mmst import load_stages, truncate
from hf_mmst.cut.example_inputs import dummy_inputs, num_positions
from hf_mmst.records.results import package_versions, provenance
from hf_mmst.tasks.report import write_json

LARGEST = 1e-4  # difference of two logits
SIZES = ((1, 16), (2, 8), (3, 40))  # samples, tokens
TIMED = 128  # tokens, or as many as the model has positions for
RUNS = 20


class Logits(torch.nn.Module):
    """A classifier that returns its logits `[B, num_labels]` alone."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values=None, input_ids=None, attention_mask=None) -> torch.Tensor:
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**{name: value for name, value in given.items() if value is not None}).logits


def load(folder: str, num_stages: int | None) -> torch.nn.Module:
    """The model of a folder, or its first stages, in float32 and ready to answer."""
    kind = (AutoConfig.from_pretrained(folder).architectures or [""])[0]
    auto = AutoModelForImageClassification if "Image" in kind else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model if num_stages is None else truncate(model, load_stages(folder), num_stages)


def random_inputs(model: torch.nn.Module, size: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of some samples; the second half of the first text is padding."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, value in dummy_inputs(model, size, seq_len=length).items():
        if value.is_floating_point():
            inputs[name] = torch.randn(value.shape, generator=generator)
        else:
            inputs[name] = torch.randint(model.config.vocab_size, value.shape, generator=generator)
            inputs["attention_mask"] = torch.ones_like(value)
            inputs["attention_mask"][0, length // 2 :] = 0
    return inputs


def export(model: torch.nn.Module, path: Path) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Write the model to `path`, and return what ONNX Runtime makes of inputs with it."""
    import onnxruntime

    inputs = random_inputs(model, 2, 16)
    axes = {name: {0: "batch", **({1: "tokens"} if value.dim() == 2 else {})} for name, value in inputs.items()}
    wrapped = Logits(model).eval()
    program = torch.onnx.export(
        wrapped, (), kwargs=inputs, dynamic_shapes=axes, output_names=["logits"], dynamo=True, verbose=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(session.run(None, {name: one.numpy() for name, one in given.items()})[0])


def seconds(run: Callable[[], object]) -> float:
    """The median time of some calls after a first one."""
    run()
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    """Export, compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that was written by training in stages")
    parser.add_argument("--num_stages", type=int, help="keep the first stages only, see hf_mmst.truncate")
    parser.add_argument("--output_dir", type=Path, required=True, help="where model.onnx and onnx.json go")
    args = parser.parse_args()
    model = load(args.model, args.num_stages)
    run = export(model, args.output_dir / "model.onnx")
    apart = []
    for size, length in SIZES:
        inputs = random_inputs(model, size, length)
        apart.append((run(inputs) - model(**inputs).logits).abs().max().item())
    if max(apart) > LARGEST:
        raise SystemExit(f"The logits of ONNX Runtime are {max(apart):.2g} from PyTorch's, more than {LARGEST:g}.")
    one = random_inputs(model, 1, min(num_positions(model) or TIMED, TIMED))
    found = {
        "num_stages": args.num_stages,
        "largest_difference": max(apart),
        "seconds_pytorch": seconds(lambda: model(**one)),
        "seconds_onnx": seconds(lambda: run(one)),
        "num_threads": torch.get_num_threads(),
        "seed": 0,
        **provenance("cpu"),
    }
    found["versions"] |= package_versions(("onnx", "onnxruntime", "onnxscript"))
    write_json(args.output_dir / "onnx.json", found)
    print(
        f"logits within {max(apart):.1g} of PyTorch's; one sample takes {1000 * found['seconds_onnx']:.1f} ms, "
        f"with PyTorch {1000 * found['seconds_pytorch']:.1f} ms; written to {args.output_dir / 'model.onnx'}"
    )


if __name__ == "__main__":
    main()
