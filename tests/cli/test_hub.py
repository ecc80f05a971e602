"""Pushing to a Hub and loading from it, over real HTTP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from huggingface_hub import ModelCard

WORKER = Path(__file__).parents[1] / "helpers/pushes.py"


def run(hub, folder, what):
    """A process of its own, because the address of the Hub is read when huggingface_hub is imported."""
    env = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "info"}
    command = [sys.executable, str(WORKER), what, str(folder), hub.token]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A hub after pushes with a token that it knows, with one that it does not, over a lost connection; and loading."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        hub.drops = [r"PUT /objects/", r"POST /api/models/tester/dropped/commit"]
        said = run(hub, folder, "retry+push+refused+script+load")
        yield hub, folder, said


def test_training_pushes_checkpoints_and_then_the_whole(pushed):
    hub, _, _ = pushed
    repo = hub.repos["tester/texts"]
    assert repo.commits[0] == "Training in progress, step 2"
    assert repo.commits[-1] == "End of training"
    assert {"model.safetensors", "config.json", "stages.safetensors", "stages.json"} <= repo.files.keys()
    assert {"README.md", "stages.png", "tokenizer.json", "tokenizer_config.json"} <= repo.files.keys()
    assert not [name for name in repo.files if "checkpoint" in name or "saving" in name or "cache" in name]
    assert repo.files["stages.png"].startswith(b"\x89PNG")
    assert hub.verified == hub.objects.keys()


def test_the_card_says_what_the_run_found(pushed):
    hub, folder, _ = pushed
    card = ModelCard(hub.repos["tester/texts"].files["README.md"].decode())
    data = card.data
    assert {"hf_mmst", "module-wise", "text-classification"} <= {*data.tags}
    assert (data.base_model, data.license, data.language, data.metrics) == (
        "tester/base",
        "apache-2.0",
        ["en"],
        ["accuracy"],
    )
    state = json.loads((folder / "texts" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["max_steps"] == 6
    (accuracy,) = [one for one in data.eval_results if one.metric_type == "accuracy"]
    assert accuracy.dataset_name == "some words"
    assert f"| accuracy | {accuracy.metric_value:.4f} |" in card.text
    assert f"| 3 | `bert.encoder.layer.2` .. `bert.encoder.layer.3` | {accuracy.metric_value:.4f} |" in card.text
    for words in (
        "| stage_order | sequential |",
        "| the whole process |",
        "| tensors, planned |",
        "stages.png",
    ):
        assert words in card.text


def test_a_task_script_pushes(pushed):
    hub, _, _ = pushed
    repo = hub.repos["tester/script"]
    assert repo.commits[-1] == "End of training"
    assert {"model.safetensors", "stages.json", "README.md", "tokenizer.json"} <= repo.files.keys()
    card = ModelCard(repo.files["README.md"].decode())
    assert (card.data.language, card.data.pipeline_tag) == (["en"], "text-classification")
    assert f"| accuracy | {card.data.eval_results[-1].metric_value:.4f} |" in card.text


def test_it_loads_elsewhere_with_plain_transformers(pushed):
    _, folder, _ = pushed
    assert "LABEL_" in (folder / "loaded.txt").read_text()


def test_a_refused_token_says_so_and_loses_nothing(pushed):
    hub, folder, _ = pushed
    found = json.loads((folder / "refused.json").read_text())
    assert "401" in found["message"]
    assert found["steps"] == 4
    assert (folder / "refused" / "checkpoint-4" / "model.safetensors").is_file()
    assert "tester/refused" not in hub.repos


def test_a_lost_connection_is_made_good_by_pushing_again(pushed):
    hub, folder, _ = pushed
    assert [one.partition("/")[0] for one in hub.dropped] == ["PUT ", "POST "]  # the first is tried again by itself
    assert json.loads((folder / "retry.json").read_text()) == ["RemoteProtocolError"]
    repo = hub.repos["tester/dropped"]
    assert repo.commits == ["End of training"]
    assert {"model.safetensors", "README.md", "stages.safetensors"} <= repo.files.keys()


def test_tokens_are_in_no_file_and_no_line(pushed):
    hub, folder, said = pushed
    for token in (hub.token, "hf_" + "x" * 20):
        assert token not in said
        secret = token.encode()
        assert not any(secret in data for repo in hub.repos.values() for data in repo.files.values())
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 20
        assert not [path for path in files if secret in path.read_bytes()]
