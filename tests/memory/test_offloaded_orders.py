"""Layers offloaded in the orders in which stages learn from losses of their own: the numbers of all in memory."""

import pytest
from elsewhere import play
from runs import assert_same, losses, run_resting, weights


@pytest.mark.parametrize(
    ("order", "place", "settings"),
    [
        ("simultaneous", "in place", {}),
        ("simultaneous", "late", {"stage_clipping": True, "gradient_accumulation_steps": 2}),
        ("sequential", "early", {"head_layers": 1}),
        ("simultaneous", "early", {"stage_clipping": True}),
        ("multi_lap", "in place", {"stage_clipping": True, "end_to_end_laps": 1}),
        ("sequential", "late", {"stage_objective": "model"}),
    ],
)
def test_the_numbers_are_those_of_all_in_memory(order, place, settings, tmp_path, monkeypatch):
    play(place, monkeypatch)
    trained = {}
    for offload in ("none", "layers"):
        trained[offload] = run_resting(tmp_path / offload, "bert", None, order, offload, **settings)
        trained[offload].train()
    assert_same(weights(trained["layers"].model), weights(trained["none"].model))
    assert_same(weights(trained["layers"].heads), weights(trained["none"].heads))
    assert losses(trained["layers"]) == losses(trained["none"])
    assert trained["layers"]._run.moved["moved_in_bytes"] > 0
