"""A recipe's comparison: three ways from the same weights, and what is said of them."""

import json

import pytest
import runs
import torch
import zoo
from PIL import Image
from transformers import AutoModelForSequenceClassification

from hf_mmst import Partition
from hf_mmst.tasks.comparison import compare, verdict
from hf_mmst.tasks.linear_probe import fitted, probed_accuracies


def test_three_ways_from_the_same_weights(tmp_path, capsys):
    zoo.make("bert", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    began = []

    def make(args):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        began.append((args.num_stages, args.transport_weight, torch.cat([p.flatten() for p in model.parameters()])))
        made = runs.trainer(tmp_path, "bert", model)
        return type(made)(
            model, args, train_dataset=made.train_dataset, eval_dataset=made.eval_dataset, compute_metrics=runs.accuracy
        )

    args = runs.arguments(tmp_path / "out", num_stages=3, stage_clipping=True, learning_rate=1e-4)
    found = compare(make, args, model="BERT", dataset="noise", elsewhere="See there.")
    assert [one[:2] for one in began] == [(3, 0.0), (3, 0.3), (1, 0.3)]
    assert all(torch.equal(one[2], began[0][2]) for one in began)
    assert args.output_dir == str(tmp_path / "out")
    whole, greedy, moved = found["rows"]
    assert (whole["num_stages"], whole["stage_clipping"], whole["head_learning_rate"]) == (
        1,
        False,
        pytest.approx(1e-3),
    )
    assert [row["way"] for row in found["rows"]] == ["end to end", "stages, greedy", "stages"]
    assert found["depths"] == [1, 2, 3]
    for row in (whole, greedy, moved):
        assert len(row["stage_accuracy"]) == 3
        assert row["stage_accuracy"][-1] == row["accuracy"]
        assert row["peak_bytes"] == pytest.approx(row["planned_bytes"], rel=0.03)
        assert row["seconds"] > 0
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(json.dumps(found))
    picture = Image.open(tmp_path / "out" / "compare.png").convert("RGBA")
    assert picture.getpixel((0, 0)) == (255, 255, 255, 255)
    assert "stages, with transport" in capsys.readouterr().out


def test_the_verdict_makes_nothing_of_noise():
    def row(accuracy):
        return {"accuracy": accuracy, "standard_error": 0.01}

    assert verdict(row(0.9), row(0.95), "X.") == "Transport wins 5.0 ± 1.4 points over greedy training."
    assert verdict(row(0.9), row(0.92), "X.").startswith("Transport shows no effect on these data: +2.0 ± 1.4 points")
    assert verdict(row(0.9), row(0.85), "X.") == (
        "Transport loses on these data: -5.0 ± 1.4 points to greedy training. X."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transport_weight": 0.0}, "transport_weight=0.0 cannot be compared: 0 is greedy"),
        ({"num_stages": 1}, "num_stages=1 cannot"),
        ({"stage_order": "end_to_end"}, "stage_order='end_to_end' cannot.*Set stage_order to simultaneous"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "choose by the samples that are reported",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(lambda args: None, runs.arguments(tmp_path, **settings), model="", dataset="", elsewhere="")


def test_a_linear_classifier_reads_what_is_there():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 8, generator=generator)
    assert (fitted(features, labels, 3)(features).argmax(-1) == labels).float().mean() < 0.7
    features[:, :3] += 6 * torch.nn.functional.one_hot(labels, 3)
    assert (fitted(features, labels, 3)(features).argmax(-1) == labels).float().mean() > 0.98


def test_probes_read_the_ends_of_stages(tmp_path):
    """A model whose second layer forgets its input leaves nothing to read after it."""
    trained = runs.trainer(tmp_path, num_stages=1)
    partition = Partition(tuple((f"vit.layers.{i}",) for i in range(4)))
    heads = runs.trainer(tmp_path, num_stages=4).heads

    class Forgets(torch.nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return torch.ones_like(hidden)

    trained.train_dataset = zoo.Samples("vit", 64)
    trained.eval_dataset = trained.train_dataset
    trained.model.vit.layers[1] = Forgets()
    seen, *unseen = probed_accuracies(trained, partition, heads)
    labels = torch.stack([torch.as_tensor(sample["labels"]) for sample in trained.eval_dataset])
    assert seen > 0.9
    assert unseen == [pytest.approx(labels.bincount().max().item() / len(labels))] * 2
