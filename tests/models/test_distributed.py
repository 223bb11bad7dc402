import os
import sys
import types

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin

from tests.two_processes import run_on_two_processes
from trl.distributed import DistributedBackend, ensure_master_addr_port, global_then_local_main_first
from trl.models.distributed import get_all_parameters, iter_params, prepare_deepspeed, prepare_fsdp


def _accelerator(**state):
    return types.SimpleNamespace(state=types.SimpleNamespace(**state), device=torch.device("cpu"))


def _deepspeed(config):
    return _accelerator(deepspeed_plugin=types.SimpleNamespace(deepspeed_config=config, zero_stage=3))


@pytest.fixture
def initialized(monkeypatch):
    """Stands in for DeepSpeed, which is not installed here: records the config it is started with."""
    seen = {}

    def initialize(model, config):
        seen["config"] = config
        return model, None, None, None

    fake = types.ModuleType("deepspeed")
    fake.initialize = initialize
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    return seen


@pytest.mark.parametrize("stage", [1, 2])
def test_lower_zero_stages_become_0(tiny_model, initialized, stage):
    config = {
        "optimizer": {"type": "Adam"},
        "scheduler": {},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
    }
    tiny_model.train()
    engine = prepare_deepspeed(tiny_model, _deepspeed(config))
    assert not engine.training
    assert initialized["config"] == {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    assert "optimizer" in config  # the policy's own is not touched
    assert config["zero_optimization"]["stage"] == stage


def test_zero3_stays_sharded_with_buckets_of_the_models_size(tiny_model, initialized):
    prepare_deepspeed(tiny_model, _deepspeed({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))
    zero = initialized["config"]["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["reduce_bucket_size"] == 32 * 32
    assert zero["stage3_param_persistence_threshold"] == 320
    assert zero["stage3_prefetch_bucket_size"] == 0


def test_external_parameters_are_seen():
    module = torch.nn.Linear(2, 2)
    extra = torch.nn.Parameter(torch.zeros(1))
    module.ds_external_parameters = lambda: [("extra", extra)]
    assert [name for name, _ in get_all_parameters(module)] == ["weight", "bias", "extra"]
    assert iter_params(module)[-1] is extra


def test_unknown_fsdp_version(tiny_model):
    with pytest.raises(ValueError, match="versions 1 and 2.*3"):
        prepare_fsdp(tiny_model, _accelerator(fsdp_plugin=types.SimpleNamespace(fsdp_version=3)))


def test_fsdp1_wraps_as_the_plugin_says(tiny_model, monkeypatch):
    """FSDP1 does not run on CPUs: what it is asked for is recorded instead."""
    import torch.distributed.fsdp as fsdp

    seen = {}

    class Recorder(torch.nn.Module):
        def __init__(self, module, **kwargs):
            super().__init__()
            self.module = module
            seen.update(kwargs)

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        use_orig_params=True,
        ignored_modules="model.norm",
    )
    monkeypatch.setattr(fsdp, "FullyShardedDataParallel", Recorder)
    tiny_model.train()
    accelerator = _accelerator(fsdp_plugin=plugin)
    wrapped = prepare_fsdp(tiny_model, accelerator)
    assert isinstance(wrapped, Recorder)
    assert not wrapped.training
    assert seen["ignored_modules"] == [tiny_model.model.norm]
    assert seen["use_orig_params"] is True
    assert seen["device_id"] == torch.device("cpu")
    assert seen["auto_wrap_policy"].keywords["transformer_layer_cls"] == {type(tiny_model.model.layers[0])}
    assert prepare_fsdp(wrapped, accelerator) is wrapped  # not a second time


_FSDP2_SCRIPT = """
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tests.conftest import build_model
from trl.distributed import DistributedBackend
from trl.models.distributed import prepare_fsdp

plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
accelerator = Accelerator(cpu=True)
accelerator.state.fsdp_plugin = plugin
model, ids = build_model(), torch.arange(6)[None]
total, expected = sum(p.numel() for p in model.parameters()), model(ids).logits
sharded = prepare_fsdp(model, accelerator)
backend = DistributedBackend(accelerator)
assert backend.is_fsdp and backend.fsdp_version == 2 and not backend.is_zero3
assert not sharded.training
assert sum(p.to_local().numel() for p in sharded.parameters()) < 0.7 * total
with torch.no_grad():
    torch.testing.assert_close(sharded(ids).logits, expected)
"""


def test_fsdp2_shards_and_agrees_with_the_plain_model():
    run_on_two_processes(_FSDP2_SCRIPT)


# ---- DistributedBackend ----


def test_backend_of_one_process():
    backend = DistributedBackend(Accelerator(cpu=True))
    assert (backend.zero_stage, backend.fsdp_version, backend.is_zero3, backend.is_fsdp) == (0, 0, False, False)
    layer = torch.nn.Linear(1, 1)
    with backend.gather_params(layer.parameters()), backend.summon_full_params(layer):
        pass


def test_backend_of_zero3(monkeypatch):
    gathered = []

    class Gathered:
        def __init__(self, parameters):
            gathered.extend(parameters)

        def __enter__(self):
            pass

        def __exit__(self, *args):
            pass

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    backend = DistributedBackend(_deepspeed({}))
    assert backend.is_zero3
    layer = torch.nn.Linear(1, 1)
    with backend.gather_params(layer.parameters()):
        assert len(gathered) == 2


# ---- Process groups ----


def test_master_address(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    ensure_master_addr_port()
    assert os.environ["MASTER_ADDR"] == "localhost"
    assert 0 < int(os.environ["MASTER_PORT"]) < 65536
    ensure_master_addr_port("elsewhere", 1)
    assert os.environ["MASTER_ADDR"] == "localhost"  # what is set stays
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setenv("MASTER_PORT", "")
    ensure_master_addr_port("host", 1234)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("host", "1234")


_ORDER_SCRIPT = """
import sys, time
from accelerate import PartialState
from trl.distributed import global_then_local_main_first

state = PartialState(cpu=True)
with global_then_local_main_first():
    time.sleep(0.2 if state.is_main_process else 0)
    with open(sys.argv[1], "a") as log:
        log.write(str(state.process_index))
"""


def test_main_process_runs_the_block_first(tmp_path):
    log = tmp_path / "log"
    run_on_two_processes(_ORDER_SCRIPT, str(log))
    assert log.read_text() == "01"


def test_block_runs_once_alone():
    ran = []
    with global_then_local_main_first():
        ran.append(1)
    assert ran == [1]
