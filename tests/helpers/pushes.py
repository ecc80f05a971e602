"""A process that pushes to, and loads from, the Hub at HF_ENDPOINT. Arguments: what to do, folder, token."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import torch

TEXTS = ["a", "small", "set", "of", "words", "to", "make", "a", "tokenizer", "of", ",", "with", "some", "more"]


def tokenizer(folder):
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXTS]))
    return BertTokenizer(str(folder / "vocab.txt"))


def trained(folder, name, **settings):
    from runs import trainer

    given = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "hub_model_id": name,
        "push_to_hub": True,
        "model_card": True,
    }
    extra = {"processing_class": tokenizer(folder)}
    run = trainer(folder / name.partition("/")[2], "bert", extra=extra, **{**given, **settings})
    run.train()
    run.evaluate()
    return run


def push(folder):
    """During training and at its end."""
    token = sys.argv[3]
    run = trained(
        folder,
        "tester/texts",
        hub_strategy="every_save",
        hub_token=token,
        stage_order="sequential",
        feature_cache="disk",
        max_steps=6,
    )
    run._finish_current_push()
    run.push_to_hub(language="en", license="apache-2.0", dataset="some words", finetuned_from="tester/base")
    torch.save(run.model.state_dict(), folder / "weights.pt")


def refused(folder):
    """With a token that is not known."""
    from huggingface_hub.errors import HfHubHTTPError

    run = trained(folder, "tester/refused", push_to_hub=False, hub_token="hf_" + "x" * 20)
    try:
        run.push_to_hub()
    except HfHubHTTPError as error:
        (folder / "refused.json").write_text(json.dumps({"message": str(error), "steps": run.state.global_step}))


def retry(folder):
    """Where the connection is lost once; a second push makes it good."""
    run = trained(folder, "tester/dropped", push_to_hub=False, hub_token=sys.argv[3])
    failures = []
    for _ in range(3):
        try:
            run.push_to_hub()
            break
        except Exception as error:
            failures.append(type(error).__name__)
    (folder / "retry.json").write_text(json.dumps(failures))


def script(folder):
    """As the task scripts do, which push on saving and at their end."""
    from script import dataset, main
    from zoo import make

    make("bert").save_pretrained(folder / "model")
    tokenizer(folder).save_pretrained(folder / "model")
    dataset("texts").save_to_disk(folder / "data")
    given = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "output_dir": folder / "script",
        "hub_model_id": "tester/script",
        "hub_token": sys.argv[3],
        "num_stages": 2,
        "max_steps": 2,
        "report_to": "none",
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    token, sys.argv = sys.argv[3], ["script.py", *flags]
    sys.argv += ["--ignore_mismatched_sizes", "True", "--do_train", "--do_eval", "--use_cpu", "--push_to_hub"]
    main()
    sys.argv = ["pushes.py", "", str(folder), token]


def load(folder):
    """With plain transformers, and the snippet of the card."""
    from huggingface_hub import hf_hub_download
    from transformers import AutoModelForSequenceClassification

    from hf_mmst import load_stages

    model, report = AutoModelForSequenceClassification.from_pretrained("tester/texts", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in torch.load(folder / "weights.pt").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    stages = load_stages("tester/texts")
    assert stages.partition.num_stages == 3
    card = Path(hf_hub_download("tester/texts", "README.md")).read_text()
    plain, early = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(plain, {})
    (folder / "loaded.txt").write_text(said.getvalue())
    scope = {}
    exec(early, scope)
    assert scope["early"].partition == stages.partition


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = {"push": push, "refused": refused, "retry": retry, "script": script, "load": load}
    where = Path(sys.argv[2])
    for step in sys.argv[1].split("+"):
        steps[step](where)
