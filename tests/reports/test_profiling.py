import sys
import time
import types

import pytest

from trl.extras.profiling import ProfilingContext, profiling_context, profiling_decorator


@pytest.fixture
def trackers(monkeypatch):
    """Stand-ins for the three trackers, each with an active run."""
    logged = {"wandb": [], "mlflow": [], "trackio": []}
    variable = types.SimpleNamespace(get=lambda: object())
    contents = {
        "wandb": {"run": object(), "log": logged["wandb"].append},
        "mlflow": {
            "active_run": lambda: object(),
            "log_metrics": lambda metrics, step: logged["mlflow"].append((metrics, step)),
        },
        "trackio": {"context_vars": types.SimpleNamespace(current_run=variable), "log": logged["trackio"].append},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return logged


def _trainer(report_to, main=True):
    class MyTrainer:
        args = types.SimpleNamespace(report_to=report_to)
        accelerator = types.SimpleNamespace(is_main_process=main)
        state = types.SimpleNamespace(global_step=7)

        @profiling_decorator
        def work(self, seconds):
            """What it does."""
            time.sleep(seconds)
            return "done"

    return MyTrainer()


def test_all_trackers_get_the_seconds(trackers):
    trainer = _trainer(["wandb", "mlflow", "trackio"])
    assert trainer.work(0.02) == "done"
    key = "profiling/Time taken: MyTrainer.work"
    (wandb,), ((mlflow, step),), (trackio,) = trackers.values()
    assert list(wandb) == list(mlflow) == list(trackio) == [key]
    assert 0.02 <= wandb[key] < 1
    assert step == 7


def test_only_those_reported_to(trackers):
    with profiling_context(_trainer(["wandb"]), "block"):
        pass
    assert [len(entries) for entries in trackers.values()] == [1, 0, 0]


def test_only_the_main_process(trackers):
    _trainer(["wandb"], main=False).work(0)
    assert not trackers["wandb"]


def test_only_an_active_run(trackers):
    sys.modules["wandb"].run = None
    sys.modules["mlflow"].active_run = lambda: None
    sys.modules["trackio"].context_vars.current_run = types.SimpleNamespace(get=lambda: None)
    _trainer(["wandb", "mlflow", "trackio"]).work(0)
    assert not any(trackers.values())


def test_own_prefix_and_errors(trackers):
    with pytest.raises(RuntimeError, match="inside"), ProfilingContext("n", ["wandb"], metric_prefix="p"):
        raise RuntimeError("inside")
    assert list(trackers["wandb"][0]) == ["p: n"]


def test_decorator_keeps_the_name():
    work = type(_trainer([])).work
    assert (work.__name__, work.__doc__) == ("work", "What it does.")
