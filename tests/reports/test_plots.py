import builtins
import logging
import math

import pytest

from trl.reports import plots
from trl.reports.plots import _collect, plot_training_curves

LOG = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0},
    {"step": 2, "loss": 1.5, "learning_rate": 5e-4, "grad_norm": math.nan},
    {"step": 2, "eval_loss": 1.6, "eval_runtime": 3.0},
    {"step": 2, "train_runtime": 9.0, "train_loss": 1.75},
]


def test_picture(tmp_path):
    path = plot_training_curves(LOG, tmp_path / "new" / "curves.png")
    assert path == tmp_path / "new" / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn():
    panels = _collect(LOG)
    assert list(panels) == ["Loss", "Learning rate", "Gradient norm"]
    assert panels["Loss"] == [("train", [1, 2], [2.0, 1.5]), ("eval", [2], [1.6])]
    assert panels["Gradient norm"] == [("train", [1], [1.0])]  # what is not a number is left out


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("mean_token_accuracy", "Token accuracy"),
        ("eval_mean_token_accuracy", "Token accuracy"),
        ("reward", "Reward"),
        ("rewards/accuracies", "Preference accuracy"),
        ("accuracy", "Preference accuracy"),
    ],
)
def test_panels_of_other_methods(key, title):
    assert list(_collect([{"step": 1, key: 0.5}])) == [title]


def test_nothing_logged(tmp_path):
    assert plot_training_curves([], tmp_path / "x.png") is None
    assert plot_training_curves([{"step": 1, "train_runtime": 1.0}], tmp_path / "x.png") is None
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch, caplog):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    level = plots.logger.level
    plots.logger.setLevel(logging.INFO)
    plots.logger.addHandler(caplog.handler)
    try:
        assert plot_training_curves(LOG, tmp_path / "x.png") is None
    finally:
        plots.logger.removeHandler(caplog.handler)
        plots.logger.setLevel(level)
    assert "matplotlib is not installed" in caplog.text


def test_drawing_leaves_the_users_backend_alone(tmp_path):
    import sys

    before = "matplotlib.pyplot" in sys.modules
    plot_training_curves(LOG, tmp_path / "x.png")
    assert ("matplotlib.pyplot" in sys.modules) is before
