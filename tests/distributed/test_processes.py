"""Several processes over gloo give the weights of one process on the joined batch."""

import json
import time

import psutil
import pytest
import torch
from killed import killed_rank, rank, run
from processes import ranks, watched
from runs import StopAt
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint
from worker import CASES, IN_THREE, main, train

BY_NUMBER = {2: [*CASES], 3: IN_THREE}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Where so many processes have trained their cases, in turn, in one launch."""
    folders = {}

    def launch(number):
        if number not in folders:
            folders[number] = tmp_path_factory.mktemp(f"{number}_processes")
            ranks(number, main, folders[number], BY_NUMBER[number], folder=folders[number])
        return folders[number]

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives, case by case."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    return lambda case: found[case] if case in found else found.setdefault(case, train(case, folder))


@pytest.mark.parametrize(("number", "case"), [(number, case) for number in BY_NUMBER for case in BY_NUMBER[number]])
def test_processes_equal_one(number, case, launched, alone):
    first, *others = (load_file(launched(number) / f"{case}.{rank}") for rank in range(number))
    for key, tensor in alone(case).items():
        if key.startswith("watched"):
            continue
        assert all(torch.equal(first[key], other[key]) for other in others), key
        if any(name in key for name in ("transport", "loss", "perplexity", "accuracy")):  # means of batches
            torch.testing.assert_close(first[key], tensor, rtol=5e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
        else:
            torch.testing.assert_close(first[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("number", BY_NUMBER)
@pytest.mark.parametrize(
    ("case", "starts", "layers"),
    [
        ("vit", 2 * 6, 4 * 6),  # all stages but the last, in each step
        ("vit sequential accumulation", 0, 4 + 4 + 2 * 4),
        ("bert accumulation", 2 * 6, 4 * 6),  # once in two micro-batches
        ("bert stage_clipping", 3 * 6, 2 * 6),  # two stages have stepped before
        ("beit side inputs", 0, 4 * 6),
    ],
)
def test_gradients_are_sent_while_the_next_stage_runs(case, starts, layers, number, launched):
    found = load_file(launched(number) / f"{case}.{number - 1}")
    assert (int(found["watched.starts"]), int(found["watched.layers"])) == (starts, layers)


@pytest.mark.parametrize("number", BY_NUMBER)
def test_gradients_that_are_late_or_in_one_process_only(number, launched):
    first, *others = (load_file(launched(number) / f"unlike.{rank}") for rank in range(number))
    late = sum(range(number)) / number + 1 / number
    expected = {"late": torch.full((1, 2), late), "one": torch.full((1, 2), 1 / number)}
    assert {name for name in first if "weights" not in name} == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(first[name], gradient)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def test_a_killed_process_ends_the_others_and_another_number_goes_on(tmp_path):
    """Two processes, of which one is killed; then one alone from what was saved; then two from there."""
    folder = tmp_path / "killed"
    code, _ = watched(2, killed_rank, folder, "processes", 3, folder=tmp_path)
    assert time.time() - float((folder / "killed").read_text()) < 60
    assert code == 1
    assert not any(psutil.pid_exists(int((tmp_path / f"pid.{number}").read_text())) for number in range(2))
    reached = int(get_last_checkpoint(folder).rpartition("-")[2])
    assert 3 <= reached < 18
    run(folder, "processes", StopAt(18))
    ranks(2, rank, folder, "processes", folder=tmp_path)
    run(tmp_path / "straight", "processes")
    found, expected = folder / "checkpoint-36", tmp_path / "straight" / "checkpoint-36"
    for name in ("model.safetensors", "stages.safetensors"):
        torch.testing.assert_close(load_file(found / name), load_file(expected / name), rtol=1e-4, atol=1e-6)
    weights = [json.loads((one / "stages.json").read_text())["transport_state"]["weights"] for one in (found, expected)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)
    assert weights[0][0] != 0.3
