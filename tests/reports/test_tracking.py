import sys
import types

import pandas as pd
import pytest

from trl.reports.tracking import (
    get_comet_experiment_url,
    get_trackio_space_url,
    get_wandb_run_url,
    log_table_to_comet_experiment,
)


class _Variable:
    def __init__(self, value):
        self.value = value

    def get(self):
        return self.value


def _install(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def _trackio(run, space):
    return types.SimpleNamespace(current_run=_Variable(run), current_space_id=_Variable(space))


def test_no_tracker_no_url(monkeypatch):
    for name in ("wandb", "trackio", "comet_ml"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert get_wandb_run_url() is get_trackio_space_url() is get_comet_experiment_url() is None


def test_wandb(monkeypatch):
    _install(monkeypatch, "wandb", run=None)
    assert get_wandb_run_url() is None
    _install(monkeypatch, "wandb", run=types.SimpleNamespace(url="http://w"))
    assert get_wandb_run_url() == "http://w"


def test_trackio(monkeypatch):
    run = types.SimpleNamespace(project="p", name="r")
    _install(monkeypatch, "trackio", context_vars=_trackio(None, None))
    assert get_trackio_space_url() is None
    _install(monkeypatch, "trackio", context_vars=_trackio(run, None))
    assert get_trackio_space_url() is None  # only local
    _install(monkeypatch, "trackio", context_vars=_trackio(run, "Me/my_space"))
    assert get_trackio_space_url().startswith("https://me-my-space.hf.space/?project=p&runs=r")


def test_comet(monkeypatch):
    sent = []
    experiment = types.SimpleNamespace(url="http://c", log_table=lambda **kwargs: sent.append(kwargs))
    table = pd.DataFrame({"a": [1]})
    _install(monkeypatch, "comet_ml", get_running_experiment=lambda: None)
    assert get_comet_experiment_url() is None
    log_table_to_comet_experiment("t.csv", table)
    assert not sent
    _install(monkeypatch, "comet_ml", get_running_experiment=lambda: experiment)
    assert get_comet_experiment_url() == "http://c"
    log_table_to_comet_experiment("t.csv", table)
    assert sent == [{"tabular_data": table, "filename": "t.csv"}]


def test_comet_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "comet_ml", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install comet-ml"):
        log_table_to_comet_experiment("t.csv", pd.DataFrame())
