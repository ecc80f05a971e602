# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
How many layers early exit saves: accuracy against mean depth, with thresholds chosen on one half of a test split and
measured on the other. The rule with a threshold that costs half a point at most is saved with the model.

    python recipes/vit_cifar.py --output_dir digits && python recipes/early_exit.py images digits
    python recipes/bert_text.py --output_dir texts && python recipes/early_exit.py texts texts

On the digits or the news that those recipes use where the Hub cannot be reached. Writes `early_exit.json`, and
`exits.json` into the folder of the model.
"""

import argparse
from pathlib import Path

from bert_text import bbc_news
from transformers import AutoTokenizer, DataCollatorWithPadding, default_data_collator
from vit_cifar import mnist_digits

from hf_mmst import EarlyExit, calibrate
from hf_mmst.inference.exit_rules import ExitRule, exit_curve
from hf_mmst.records.results import provenance
from hf_mmst.tasks.pixels import to_tensors
from hf_mmst.tasks.report import write_json

DROPS = (0.0, 0.005, 0.01, 0.02)


def batches(task: str, folder: str, config, size: int = 50) -> tuple[list[dict], list[dict]]:
    """Batches of the two halves of the test split, shuffled."""
    test = (mnist_digits() if task == "images" else bbc_news())["test"].shuffle(seed=1)
    if task == "images":
        samples = test.with_transform(to_tensors(None, config, augment=False))
        collate = default_data_collator
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        samples = test.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True, remove_columns="text"
        )
        collate = DataCollatorWithPadding(tokenizer)
    rows = [samples[i] for i in range(len(samples))]
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return tuple([dict(collate(half[i : i + size])) for i in range(0, len(half), size)] for half in halves)


def measure(early: EarlyExit, test: list[dict], rule: ExitRule) -> dict[str, float]:
    """Accuracy and mean number of layers, with samples leaving."""
    early.rule = rule
    right, layers, number = 0, 0, 0
    for batch in test:
        labels = batch["labels"]
        found = early(**{name: value for name, value in batch.items() if name != "labels"})
        right += int((found.logits.argmax(-1) == labels).sum())
        layers += int(found.layers_run.sum())
        number += len(labels)
    return {"accuracy": right / number, "mean_layers": layers / number}


def main() -> None:
    """Calibrate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("images", "texts"))
    parser.add_argument("model", help="the folder that the recipe has written")
    parser.add_argument("--output_dir", help="where early_exit.json goes; the model's folder by default")
    args = parser.parse_args()
    early = EarlyExit.from_pretrained(args.model)
    validation, test = batches(args.task, args.model, early.model.config)
    found = early.observe(validation)
    whole = measure(early, test, ExitRule(threshold=2.0))
    rows = []
    kinds = {
        "threshold": ExitRule(),
        "patience": ExitRule(patience=1),
        "threshold, heads together": ExitRule(ensemble=True),
    }
    for kind, rule in kinds.items():
        early.rule = rule
        for drop in DROPS:
            point = calibrate(early, found, drop)
            chosen = {"max_drop": drop, "threshold": point.rule.threshold, "patience": point.rule.patience}
            rows.append({"kind": kind, **chosen, **measure(early, test, point.rule)})
            if (kind, drop) == ("threshold", 0.005):
                early.save_rule(args.model)
            early.rule = rule
    temperatures = calibrate(early, found, 0.0).rule.temperatures
    together = measure(early, test, ExitRule(threshold=2.0, temperatures=temperatures, ensemble=True))
    num_layers, head_layers = len(early.partition.layers), len(early.heads.layers)
    rule = ExitRule(temperatures=temperatures)
    curve = exit_curve(rule, early.observe(test), early.partition, head_layers)
    content = {
        "task": args.task,
        "num_layers": num_layers,
        "num_stages": early.partition.num_stages,
        "num_validation_samples": len(found.labels),
        "num_test_samples": sum(len(batch["labels"]) for batch in test),
        "head_layers": head_layers,
        "whole": whole,
        "together": together,
        "rows": rows,
        "temperatures": temperatures,
        "curve": [{"threshold": p.rule.threshold, "accuracy": p.accuracy, "layers": p.mean_layers} for p in curve],
        "seed": 1,
        **provenance("cpu"),
    }
    write_json(Path(args.output_dir or args.model) / "early_exit.json", content)
    print(f"the rule with a threshold is in {Path(args.model) / 'exits.json'}")
    print(f"whole model: {whole['accuracy']:.2%} with {num_layers} layers")
    print(f"all heads together: {together['accuracy']:.2%} with {together['mean_layers']:.0f} layers")
    for row in rows:
        words = f"{row['accuracy']:.2%} with {row['mean_layers']:.2f} layers"
        print(f"{row['kind']}, a drop of at most {row['max_drop']:.1%}: {words}")


if __name__ == "__main__":
    main()
