"""Gradients of two processes equal those of one over both batches: DDP, and FSDP2 with and without the head apart."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.conftest import build_model
from trl.losses.language_modeling import nll
from trl.ops.scoring import score_tokens


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, 512, (2, 10), generator=generator)
    input_ids[1, :3] = input_ids[0, :3]
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def _loss(model, seed, objective, layout="padded"):
    groups = torch.zeros(2, dtype=torch.long)
    scores = score_tokens(model, _batch(seed), objective=objective, chunk_size=4, layout=layout, groups=groups)
    return -scores.logps.sum() if objective is None else scores.loss_sum


def _wrap(kind, model):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if kind == "fsdp2, head apart":
        fully_shard(model.lm_head)
    return fully_shard(model)


def _compare(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    for tied, kind in [
        (False, "ddp"), (True, "ddp"), (False, "fsdp2"), (True, "fsdp2"), (False, "fsdp2, head apart")
    ]:  # fmt: skip
        for objective, layout in ((nll, "padded"), (None, "padded"), (None, "shared_prefix")):
            alone = build_model(tie_word_embeddings=tied)
            (sum(_loss(alone, seed, objective) for seed in range(2)) / 2).backward()
            model = build_model(tie_word_embeddings=tied)
            wrapped = _wrap(kind, model)  # DDP reduces as long as it lives
            _loss(wrapped, rank, objective, layout).backward()
            expected = dict(alone.named_parameters())
            for name, parameter in model.named_parameters():
                grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                torch.testing.assert_close(grad, expected[name].grad, rtol=1e-4, atol=1e-5, msg=f"{kind}: {name}")
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's own end is now and then aborted by the group's threads


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_gradients_of_two_processes_equal_those_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_compare, args=(port,), nprocs=2)
