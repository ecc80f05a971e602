# /// script
# dependencies = ["hf-mmst[recipes]"]
# ///
"""
Train a model of billions of parameters end to end, on a CPU, in a process that the system holds to a budget.

    python recipes/billions.py --model vit-g --budget 1GiB
    python recipes/billions.py --model decoder-3b --budget 4GiB
    python recipes/billions.py --model tiny --budget 1GiB

The run is a process of its own whose private memory, that of the interpreter and all libraries with it, is limited
by the system (RLIMIT_DATA, Linux): an allocation beyond that fails, and the run with it. Layers rest in mapped files,
which do not count: their pages are the system's to take back. Resident bytes, with such pages, are measured beside it.
The model is made on the meta device, so that its weights are made where they rest. Needs as much room in --folder as
weights, gradients and optimizer states take: 16 bytes a parameter, in fp32 with AdamW.
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STATUS = ("RssAnon", "VmRSS", "VmHWM", "VmData")  # of Linux, in kB
SEED = 42


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["vit-g", "decoder-3b", "tiny"], default="vit-g")
    parser.add_argument("--batch_size", type=int, help="2 images, or 1 text")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed: it makes the optimizer's states")
    parser.add_argument("--budget", default="1GiB", help="private memory of the whole process")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/billions"))
    parser.add_argument("--folder", help="where layers rest; a temporary one by default")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first step is not timed. Set it to 2 or more.")
    if sys.platform != "linux":
        parser.error("a process is held to a budget, and its memory measured, as Linux does")
    args.batch_size = args.batch_size or (1 if args.model == "decoder-3b" else 2)
    return args


def status(process: int | str = "self") -> dict[str, int]:
    """Bytes of a process, as the system has them: private and resident; resident; the most of it; private."""
    text = Path(f"/proc/{process}/status").read_text()
    found = re.findall(rf"^({'|'.join(STATUS)}):\s+(\d+) kB$", text, re.MULTILINE)
    return {name: 1024 * int(value) for name, value in found}


def make_model(args: argparse.Namespace):
    """The model, without data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    wide = {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 16, "intermediate_size": 6144}
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    with torch.device("meta"):
        if args.model == "decoder-3b":
            config = LlamaConfig(
                hidden_size=3072,
                num_hidden_layers=28,
                num_attention_heads=24,
                num_key_value_heads=8,
                intermediate_size=8192,
                vocab_size=32_000,
                tie_word_embeddings=True,
            )
            return LlamaForCausalLM(config)
        sizes = {**wide, "patch_size": 14} if args.model == "vit-g" else small
        return ViTForImageClassification(ViTConfig(**sizes, num_labels=10))


def train(args: argparse.Namespace) -> dict:
    """Train in this process; what it found out about itself."""
    import torch
    from transformers import TrainerCallback

    from hf_mmst import MMSTConfig, MMSTTrainer
    from hf_mmst.planning.simulation import Simulation
    from hf_mmst.planning.ways import Way

    imported = status()
    model = make_model(args)
    parameters = sum(p.numel() for p in model.parameters())

    class Samples(torch.utils.data.Dataset):
        """Random images with labels, or random texts."""

        def __len__(self):
            return args.batch_size

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            if args.model == "decoder-3b":
                ids = torch.randint(model.config.vocab_size, (args.seq_len,), generator=generator)
                return {"input_ids": ids, "labels": ids}
            image = torch.randn(3, model.config.image_size, model.config.image_size, generator=generator)
            return {"pixel_values": image, "labels": torch.randint(10, (), generator=generator)}

    class Steps(TrainerCallback):
        """Seconds, and log, of each step."""

        def __init__(self):
            self.seconds, self.logs = [], []

        def on_step_begin(self, *_, **__):
            self._begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self._begin)

        def on_log(self, _args, _state, _control, logs, **_kwargs):
            if "loss" in logs:
                self.logs.append(logs)
                print(logs, status(), file=sys.stderr, flush=True)

    samples, steps = Samples(), Steps()
    batch = torch.utils.data.default_collate([samples[index] for index in range(args.batch_size)])
    with torch.device("meta"):
        twin = make_model(args)
    planned = Simulation(twin, batch).peak(Way(stage_order="end_to_end", offload="layers")).total
    del twin
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        config = MMSTConfig(
            folder,
            stage_order="end_to_end",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            optim=args.optim,
            seed=SEED,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = MMSTTrainer(model, config, train_dataset=samples, callbacks=[steps])
        trainer.train()
    losses = [log["loss"] for log in steps.logs]
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"the losses {losses} are not all finite")
    return {
        "parameters": parameters,
        "losses": losses,
        "planned_bytes": planned,
        "imported_bytes": imported["VmRSS"],
        "imported_private_bytes": imported["VmData"],
        "first_step_seconds": steps.seconds[0],
        "step_seconds": sum(steps.seconds[1:]) / len(steps.seconds[1:]),
        "moved_in_bytes": steps.logs[-1]["moved_in_bytes"],
        "moved_out_bytes": steps.logs[-1]["moved_out_bytes"],
    }


def in_a_process(args: argparse.Namespace, limit: int) -> dict:
    """What a new process, held to `limit`, has found, and the most that it took meanwhile."""
    # pyarrow's own allocator would reserve addresses for 1 GiB, which count.
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "TOKENIZERS_PARALLELISM": "false"}

    def hold() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, __file__, *sys.argv[1:], "--run"]
    most = dict.fromkeys(STATUS, 0)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=hold) as process:
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
        reader.start()
        while process.poll() is None:
            for name, value in status(process.pid).items():
                most[name] = max(most[name], value)
            time.sleep(0.02)
        reader.join()
    if process.returncode != 0:
        raise SystemExit(f"the run ended with exit code {process.returncode}: see above")
    return {
        **json.loads(output[-1]),
        "peak_private_bytes": most["VmData"],
        "peak_anonymous_resident_bytes": most["RssAnon"],
        "peak_resident_bytes": most["VmHWM"],
    }


def main() -> None:
    """Train in a process that is held to the budget, write and show."""
    args = parse()
    if args.run:
        print(json.dumps(train(args)))
        return
    from hf_mmst.field_checks import parse_bytes
    from hf_mmst.records.results import provenance
    from hf_mmst.tasks.report import write_json

    limit = parse_bytes("budget", args.budget)
    found = in_a_process(args, limit)
    settings = {key: getattr(args, key) for key in ("model", "batch_size", "seq_len", "steps", "optim")}
    enforced = "RLIMIT_DATA of the whole process: private writable memory; pages of mapped files are not limited"
    row = {**provenance("cpu"), "seed": SEED, **settings, "limit_bytes": limit, "enforced_by": enforced, **found}
    write_json(args.output_dir / "results.json", row)
    above = row["peak_resident_bytes"] - row["imported_bytes"]
    print(
        f"{row['parameters'] / 1e9:.2f} B parameters, {row['step_seconds']:.0f} s a step; private "
        f"{row['peak_private_bytes'] / 2**20:.0f} of {limit / 2**20:.0f} MiB; resident, with pages of mapped files, "
        f"{row['peak_resident_bytes'] / 2**20:.0f} MiB, {above / 2**20:.0f} above import, where "
        f"{row['planned_bytes'] / 2**20:.0f} MiB of tensors were planned"
    )


if __name__ == "__main__":
    main()
