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
from worker import CASES, main, train


@pytest.fixture(scope="module", params=[2, 3])
def launched(request, tmp_path_factory):
    """All cases, trained in turn by so many processes, in one launch."""
    folder = tmp_path_factory.mktemp(f"{request.param}_processes")
    ranks(request.param, main, folder, [*CASES], folder=folder)
    return folder, request.param


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives, case by case."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    return lambda case: found[case] if case in found else found.setdefault(case, train(case, folder))


@pytest.mark.parametrize("case", CASES)
def test_processes_equal_one(case, launched, alone):
    folder, number = launched
    first, *others = (load_file(folder / f"{case}.{rank}") for rank in range(number))
    for key, tensor in alone(case).items():
        if key.startswith("watched"):
            continue
        assert all(torch.equal(first[key], other[key]) for other in others), key
        if any(name in key for name in ("transport", "loss", "perplexity", "accuracy")):  # means of batches
            torch.testing.assert_close(first[key], tensor, rtol=5e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
        else:
            torch.testing.assert_close(first[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


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
def test_gradients_are_sent_while_the_next_stage_runs(case, starts, layers, launched):
    folder, number = launched
    found = load_file(folder / f"{case}.{number - 1}")
    assert (int(found["watched.starts"]), int(found["watched.layers"])) == (starts, layers)


def test_gradients_that_are_late_or_in_one_process_only(launched):
    folder, number = launched
    first, *others = (load_file(folder / f"unlike.{rank}") for rank in range(number))
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
