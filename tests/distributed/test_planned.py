"""Plans of one of several processes, beside what two real ones take, and budgets in them."""

import json

import pytest
import torch
from benchmark_planner import BATCH, batch_of
from planned import MEASURED, OFFLOADED, main, make
from processes import ranks

from hf_mmst import plan
from hf_mmst.planning.devices import Device
from hf_mmst.planning.fake_processes import one_of_processes
from hf_mmst.planning.simulation import Simulation
from hf_mmst.planning.ways import Way

LINKED = Device("unit", {"fp32": 1e12}, 1e12, 1e9, 1e10, between=1e9)


def simulation(name, precision="fp32", **settings):
    model = make(name)
    return Simulation(model, batch_of(model, BATCH), precision, **{"num_processes": 2, **settings})


@pytest.fixture(scope="module")
def planned():
    return {name: simulation(model, precision).peak(way).total for name, (model, precision, way) in MEASURED.items()}


@pytest.fixture(scope="module")
def found(planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    shards = {"stage_order": "end_to_end"}
    budgets = {
        "fits": {**shards, "memory_budget": str(int(1.06 * planned["vit shards"]))},
        "fits not": {**shards, "memory_budget": "1KiB"},
        "order unset": {"memory_budget": str(int(1.06 * planned["vit stages"]))},
        "order unset, fits not": {"memory_budget": "1KiB"},
    }
    ranks(2, main, folder, budgets, folder=folder)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return first | {"second": second}


@pytest.mark.parametrize("name", MEASURED)
def test_one_of_two_processes_takes_what_was_planned(name, planned, found):
    """PyTorch's own account of the real tensors of the first process, which has the larger shards."""
    assert planned[name] == pytest.approx(found[name], rel=0.001)


def test_a_budget_confirms_shards(planned, found):
    fits = found["fits"]
    assert (fits["order"], fits["offload"], fits["planned"]) == ("end_to_end", "layers", planned["vit shards"])
    assert fits["kind"].endswith("FSDP")
    assert 'memory_budget="1KiB": Nothing fits' in found["fits not"]["error"]
    assert "end to end, layers offloaded, needs" in found["fits not"]["error"]


def test_a_budget_after_the_accelerator_keeps_layers_on_the_device(found):
    unset = found["order unset"]
    assert (unset["order"], unset["offload"]) == ("simultaneous", "none")
    assert unset == found["second"]["order unset"]
    assert 'Or set stage_order="end_to_end"' in found["order unset, fits not"]["error"]


@pytest.mark.parametrize("for_gpu", [False, True])
def test_many_layers_in_shards_are_planned_with_a_few(for_gpu):
    model = make("vit", 10)
    many = Simulation(model, batch_of(model, 2), for_gpu=for_gpu, num_processes=2)
    few = many._fewer.peak(OFFLOADED, [0])
    assert few == many.simulated_peak(OFFLOADED)


def test_on_a_gpu_shards_rest_in_host_memory():
    """What is on the device is about the same with more processes."""
    model = make("vit", 4)
    peaks = []
    for number in (2, 8):
        found = plan(
            model, batch_of(model, BATCH), 2**40, speeds=LINKED, num_processes=number, stage_order="end_to_end"
        )
        row = next(row for row in found.rows if row.way.offload == "layers")
        weights = sum(p.nbytes for p in model.parameters())
        assert row.resting_bytes == 4 * weights // number  # with gradients and two states
        assert (row.peak.weights, row.peak.states) == (0, 0)
        layers = sum(
            p.nbytes for p in [*model.vit.layers.parameters(), *model.vit.embeddings.patch_embeddings.parameters()]
        )
        assert row.moved_bytes == pytest.approx((2 * weights + layers) / number, abs=3)
        assert row.sent_bytes == pytest.approx((2 * weights + layers) * (number - 1) / number, abs=3)
        peaks.append(row.peak.total)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)
    whole = next(row for row in found.rows if row.way == Way())
    assert peaks[1] < whole.peak.total / 2


def test_ways_that_several_processes_refuse_are_not_planned():
    model = make("vit")
    for settings in ({}, {"stage_order": "end_to_end"}, {"stage_objective": "model"}):
        ways = [row.way for row in plan(model, BATCH, "1KiB", num_processes=2, **settings).rows]
        assert not any(way.offload == "stages" or way.resident_layers or way.rests_inputs for way in ways)
        assert not any(way.layer_batch_size or way.offloaded_step == "device" for way in ways)
    model.config.layerdrop = 0.1  # the other processes would wait for layers that are skipped
    found = plan(model, BATCH, "1GiB", num_processes=2, stage_order="end_to_end")
    assert not any(row.way.offload == "layers" for row in found.rows)
    assert "Layers are not offloaded: config.layerdrop=0.1 skips layers at random" in found.reason


def test_times_are_predicted_if_the_link_between_devices_is_known():
    model, batch = make("vit"), BATCH
    unknown = plan(model, batch, 2**40, speeds="t4", num_processes=2)
    assert all(row.prediction is None for row in unknown.rows)
    assert all(row["predicted"] is None for row in unknown.to_dict()["rows"])
    linked = plan(model, batch, 2**40, speeds=LINKED, num_processes=2)
    one = {row.way: row.prediction.seconds for row in plan(model, batch, 2**40, speeds=LINKED).rows}
    for row in linked.rows:
        if row.way.offload == "none":
            assert row.prediction.seconds >= one[row.way]
        else:
            assert row.prediction.seconds > row.sent_bytes / 2 / LINKED.between


def test_numbers_of_processes_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="num_processes=0 is not a whole number of at least 1"):
        plan(make("vit"), BATCH, num_processes=0)
    with pytest.raises(ValueError, match="layer_batch_size in offloading is for layers that one process offloads"):
        plan(make("vit"), BATCH, num_processes=2, offloading={"layer_batch_size": 2})
    with one_of_processes(2), pytest.raises(ValueError, match="num_processes=3, but this is one of 2 processes"):
        plan(make("vit"), BATCH, num_processes=3)
    assert not torch.distributed.is_initialized()
