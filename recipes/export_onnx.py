# /// script
# dependencies = ["hf-mmst[recipes,onnx]"]
# ///
"""
A model that was trained in stages -> ONNX: its first stages, all of it, or all with early exit.

    python recipes/export_onnx.py trained --num_stages 2 --output_dir small
    python recipes/export_onnx.py trained --output_dir whole
    python recipes/export_onnx.py trained --early_exit --output_dir early
    python recipes/export_onnx.py digits --early_exit --samples images --output_dir early  # see early_exit.py

Writes `model.onnx`, for batches of any size and texts of any length, and `onnx.json`: how far ONNX Runtime's logits
are from PyTorch's on random inputs, which must be less than 1e-4, and the time of one sample with each. With
`--early_exit` the rule of `exits.json` is in the graph, which says beside the logits at which stage each sample has
left, from 1; the layers after it are skipped once all samples of a batch have left. With `--samples`, `onnx.json` has
accuracy and time of that and of the whole model, too, on the half of the test split that `early_exit.py` measures on.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from early_exit import batches
from exit_graph import ExitGraph
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from hf_mmst import EarlyExit, load_stages, truncate
from hf_mmst.cut.example_inputs import dummy_inputs, num_positions
from hf_mmst.records.results import package_versions, provenance
from hf_mmst.tasks.report import write_json

LARGEST = 1e-4  # difference of two logits
SIZES = ((1, 16), (2, 8), (3, 40))  # samples, tokens
TIMED = 128  # tokens, or as many as the model has positions for
RUNS = 20
Run = Callable[[dict[str, torch.Tensor]], list[torch.Tensor]]


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


def export(module: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> Run:
    """Write a module to `path`, and return what ONNX Runtime makes of inputs with it."""
    import onnxruntime
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    axes = {name: {0: "batch", **({1: "tokens"} if value.dim() == 2 else {})} for name, value in inputs.items()}
    names = ["logits", "exit_stages"] if isinstance(module, ExitGraph) else ["logits"]
    program = torch.onnx.export(
        module, (), kwargs=inputs, dynamic_shapes=axes, output_names=names, dynamo=True, verbose=False
    )
    ClearMetadataAndDocStringPass()(program.model)  # traces of the export, which would be longer than small models
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        found = session.run(None, {name: one.numpy() for name, one in given.items()})
        return [torch.from_numpy(one) for one in found]

    return run


def difference(run: Run, other: Run, inputs: dict[str, torch.Tensor]) -> float:
    """The largest difference of logits, or of the stages at which samples leave."""
    return max((one - two).abs().max().item() for one, two in zip(run(inputs), other(inputs), strict=True))


def without_labels(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in sample.items() if name != "labels"}


def measure(ways: dict[str, Run], samples: Iterable[dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Of each way: accuracy, seconds of one sample, and, where samples leave, the mean of stages."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for sample in samples:
        inputs = without_labels(sample)
        for name, run in ways.items():
            logits, *stages = run(inputs)
            one = {
                "seconds": seconds(functools.partial(run, inputs), 3),
                "accuracy": float(logits.argmax(-1) == sample["labels"]),
                **({"stages": float(stages[0])} if stages else {}),
            }
            for key, value in one.items():
                found[name].setdefault(key, []).append(value)
    return {name: {key: statistics.fmean(values) for key, values in kept.items()} for name, kept in found.items()}


def seconds(run: Callable[[], object], runs: int = RUNS) -> float:
    """The median time of some calls after a first one."""
    run()
    times = []
    for _ in range(runs):
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
    parser.add_argument("--early_exit", action="store_true", help="with heads and exits.json, see hf_mmst.EarlyExit")
    parser.add_argument("--samples", choices=("images", "texts"), help="measure early exit on that recipe's test split")
    parser.add_argument("--output_dir", type=Path, required=True, help="where model.onnx and onnx.json go")
    args = parser.parse_args()
    if args.early_exit and args.num_stages is not None:
        parser.error("--early_exit takes all stages. Leave out --num_stages.")
    if args.samples and not args.early_exit:
        parser.error("--samples measures early exit. Set --early_exit, too.")
    early = None
    if args.early_exit:
        early = EarlyExit.from_pretrained(args.model)
        early.heads.float()
    model = early.model.float() if early else load(args.model, args.num_stages)
    example = random_inputs(model, 2, 16)
    run = export(ExitGraph(early, example) if early else Logits(model).eval(), example, args.output_dir / "model.onnx")

    def in_pytorch(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        found = (early or model)(**inputs)
        return [found.logits, *([found.exit_stages] if early else [])]

    apart = max(difference(run, in_pytorch, random_inputs(model, size, length)) for size, length in SIZES)
    if apart > LARGEST:
        raise SystemExit(f"What ONNX Runtime says is {apart:.2g} from what PyTorch says, more than {LARGEST:g}.")
    one = random_inputs(model, 1, min(num_positions(model) or TIMED, TIMED))
    found = {
        "num_stages": early.partition.num_stages if early else args.num_stages,
        "rule": asdict(early.rule) if early else None,
        "largest_difference": apart,
        "seconds_pytorch": seconds(lambda: in_pytorch(one)),
        "seconds_onnx": seconds(lambda: run(one)),
        "num_threads": torch.get_num_threads(),
        "seed": 0,
        **provenance("cpu"),
    }
    found["versions"] |= package_versions(("onnx", "onnxruntime", "onnxscript"))
    if args.samples:
        rows = batches(args.samples, args.model, model.config, 1)[1]
        samples = [{name: row[name] for name in (*example, "labels")} for row in rows]  # no types: all are 0
        with tempfile.TemporaryDirectory() as folder:
            whole = export(Logits(model).eval(), example, Path(folder) / "model.onnx")
            ways = measure({"whole": whole, "early_exit": run, "early_exit_pytorch": in_pytorch}, samples)
        largest = max(difference(run, in_pytorch, without_labels(sample)) for sample in samples)
        found["samples"] = {"task": args.samples, "number": len(samples), "largest_difference": largest, **ways}
        for name, way in ways.items():
            stages = f", {way['stages']:.2f} stages" if "stages" in way else ""
            print(f"{name}: accuracy {way['accuracy']:.2%}, {1000 * way['seconds']:.2f} ms a sample{stages}")
    write_json(args.output_dir / "onnx.json", found)
    print(
        f"logits within {apart:.1g} of PyTorch's; one random sample takes {1000 * found['seconds_onnx']:.1f} ms, "
        f"with PyTorch {1000 * found['seconds_pytorch']:.1f} ms; written to {args.output_dir / 'model.onnx'}"
    )


if __name__ == "__main__":
    main()
