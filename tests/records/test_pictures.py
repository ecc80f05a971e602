"""Pictures of a run: what they show, where they go, and that they end no run."""

import math
import sys
from types import SimpleNamespace

import pytest
from runs import assert_same, trainer, weights
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

from hf_mmst.records.pictures import PICTURE_NAME, PictureCallback, draw_training, pixels, stage_curves, write_picture
from hf_mmst.tasks.report import write_results

HISTORY = [
    {"step": 2, "loss": 2.0, "stage_1_loss": 1.0, "stage_1_transport": 0.1},
    {"step": 2, "eval_stage_1_accuracy": 0.5, "eval_stage_2_accuracy": 0.4, "eval_stage_2_loss": 3.0},
    {"step": 4, "loss": 2.0, "stage_2_loss": 0.9, "stage_2_transport": 0.2},
    {"step": 4, "eval_stage_1_accuracy": 0.6, "eval_stage_2_accuracy": 0.6, "eval_stage_2_loss": 3.0},
    {"step": 4, "eval_stage_1_accuracy": 0.7, "eval_stage_2_accuracy": 0.8, "eval_stage_2_loss": 3.0},
    {"step": 4, "train_runtime": 1.0},
]
PEAKS = {"stage_1_peak_bytes": 3 * 2**20, "stage_2_peak_bytes": 2**20, "stage_1_reserved_bytes": 2**30}


def test_curves_are_what_was_logged():
    curves = stage_curves(HISTORY, "loss")
    assert curves[0] == [2, 4]
    assert (curves[1][0], curves[2][1]) == (1.0, 0.9)
    assert math.isnan(curves[1][1])
    assert math.isnan(curves[2][0])
    assert stage_curves(HISTORY, "accuracy", "eval_") == {0: [2, 4], 1: [0.5, 0.7], 2: [0.4, 0.8]}  # the last of a step


def test_a_panel_for_each_that_is_known():
    figure = draw_training(HISTORY, PEAKS, 2 * 2**20)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "accuracy in evaluation",
        "task loss in training",
        "transport in training",
        "most memory of tensors, MiB",
    ]
    lines = [[list(line.get_ydata()) for line in axes.lines] for axes in figure.axes]
    assert lines[0] == [[0.5, 0.7], [0.4, 0.8]]
    assert lines[1][0][0] == 1.0
    assert lines[2][1][1] == 0.2
    assert [bar.get_height() for bar in figure.axes[3].patches] == [3, 1]
    assert set(lines[3][0]) == {2}  # the plan
    assert pixels(figure).shape == (640, 900, 3)
    assert draw_training([]) is None
    assert [axes.get_title() for axes in draw_training([*HISTORY[:1], HISTORY[2]]).axes] == titles[1:3]


def test_a_single_point_is_no_panel():
    assert draw_training(HISTORY[:2]) is None
    (axes,) = draw_training(HISTORY[:2], PEAKS, 2**20).axes
    assert "memory" in axes.get_title()


def test_the_memory_of_a_process_is_not_beside_a_plan_of_tensors():
    (axes,) = draw_training([], {"process_bytes": 2**30}, 2**20).axes
    assert axes.get_title() == "most memory of the process, MiB"
    assert [bar.get_height() for bar in axes.patches] == [1024]
    assert len(axes.lines) == 0


def test_pictures_are_on_white_in_a_dark_notebook():
    from matplotlib import style

    with style.context("dark_background"):
        corner = pixels(draw_training(HISTORY))[0, 0]
    assert corner.tolist() == [255, 255, 255]


def test_long_logs_are_thinned_to_means():
    history = [{"step": step, "stage_1_loss": float(step % 2), "stage_2_loss": 1.0} for step in range(1080)]
    line = draw_training(history).axes[0].lines[0]
    assert len(line.get_xdata()) == 120
    assert all(0.3 < value < 0.7 for value in line.get_ydata())


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_mmst.records.pictures.logger.warning", said.append)
    assert write_picture(tmp_path, HISTORY, PEAKS) == tmp_path / PICTURE_NAME
    assert (tmp_path / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    assert write_picture(tmp_path, []) is None
    (tmp_path / "file").write_text("")
    assert said == []
    assert write_picture(tmp_path / "file", HISTORY) is None
    assert "wrote no training.png (FileExistsError" in said[0]
    monkeypatch.setattr("hf_mmst.records.pictures.find_spec", lambda name: None)
    assert write_picture(tmp_path, HISTORY) is None


def test_tensorboard_has_pictures_and_grouped_numbers_and_training_is_the_same(tmp_path):
    """With one stage on the device at a time, so that the plan is made while layers stream."""
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed, as the extra dev does; trackio runs without it"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"stage_order": "sequential", "offload": "stages", "num_stages": 2, "end_to_end_laps": 1}
    settings |= {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2}
    plain = trainer(tmp_path / "plain", **settings)
    plain.train()
    run = trainer(tmp_path / "logged", report_to="tensorboard", **settings)
    run.train()
    run.evaluate()
    assert_same(weights(run.model), weights(plain.model))
    images, scalars = [], set()
    for path in (tmp_path / "logged").rglob("events*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0}).Reload()
        images += [image for tag in events.Tags()["images"] for image in events.Images(tag)]
        scalars |= {*events.Tags()["scalars"]}
    assert sorted(image.step for image in images) == [3, 6, 6, 6]  # two evaluations, the end, the one after it
    assert all(image.encoded_image_string.startswith(b"\x89PNG") for image in images)
    assert {"train/stage_1_loss", "train/stage_2_transport", "eval/stage_1_accuracy", "eval/stage_2_loss"} <= scalars
    write_results(run, {"eval_accuracy": 0.5})
    assert (tmp_path / "logged" / PICTURE_NAME).is_file()
    run.create_model_card()
    assert f"]({PICTURE_NAME})" in (tmp_path / "logged" / "README.md").read_text()


class Full(TensorBoardCallback):
    """A logger whose disk is full."""

    def __init__(self):
        self.tb_writer = self

    def add_image(self, *args, **kwargs):
        raise OSError(28, "No space left on device")


def test_a_logger_that_fails_is_one_warning(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_mmst.records.pictures.logger.warning", said.append)
    for name in ("on_train_begin", "on_log", "on_train_end"):
        monkeypatch.setattr(Full, name, getattr(TrainerCallback, name))
    run = trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, extra={"callbacks": [Full()]})
    run.train()
    assert run.state.global_step == 2
    (line,) = said
    assert "sends no pictures to Full (OSError" in line
    assert "numbers are logged as ever" in line


def test_trackio_gets_an_image(monkeypatch):
    sent = []
    fake = SimpleNamespace(log=sent.append, Image=lambda array: ("image", array.shape, array.dtype.name))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    callback = PictureCallback(lambda: [TrackioCallback.__new__(TrackioCallback)], PEAKS, lambda: 2**20)
    state = SimpleNamespace(is_world_process_zero=True, log_history=HISTORY, global_step=4)
    callback.on_evaluate(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.0})
    assert sent == [{"stages": ("image", (640, 900, 3), "uint8"), "train/global_step": 4}]
    state.is_world_process_zero = False
    callback.on_evaluate(None, state, None)
    assert len(sent) == 1
