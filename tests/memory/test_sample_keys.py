"""Keys of samples follow their content; views of them repeat themselves."""

import torch
from transformers import set_seed
from zoo import Noisy, Samples

from hf_mmst.memory.sample_keys import FixedViews, KeyedCollator


def test_views_differ_and_leave_the_generators_alone():
    views = FixedViews(Noisy("vit"), 2, seed=0)
    set_seed(1)
    expected = torch.rand(3)
    set_seed(1)
    seen = []
    for epoch in range(4):
        views.epoch = epoch
        seen.append(views[3]["pixel_values"])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_keys_follow_content_and_not_padding():
    def stacked(samples):
        return {k: torch.stack([sample[k] for sample in samples]) for k in samples[0]}

    collate = KeyedCollator(stacked, ["labels"], without_padding=True)
    samples = [Samples("bert")[i] for i in range(4)]
    keys = collate(samples)["feature_keys"]
    assert len(keys.unique()) == 4
    changed = [{**sample, "labels": sample["labels"] + 1} for sample in samples]
    assert torch.equal(collate(changed)["feature_keys"], keys)
    for sample in changed:
        sample["attention_mask"] = torch.cat([sample["attention_mask"], torch.zeros(2, dtype=torch.long)])
        sample["input_ids"] = torch.cat([sample["input_ids"], torch.ones(2, dtype=torch.long)])
    assert torch.equal(collate(changed)["feature_keys"], keys)
    kept = KeyedCollator(stacked, ["labels"], without_padding=False)
    assert not torch.equal(kept(changed)["feature_keys"], kept(samples)["feature_keys"])
    changed[1]["input_ids"][0] += 1
    assert (collate(changed)["feature_keys"] != keys).tolist() == [False, True, False, False]
