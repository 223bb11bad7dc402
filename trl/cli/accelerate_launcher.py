"""
Start a training script under Accelerate.

Two things `accelerate launch` does silently are put right: several processes asked for where it would start one, and
a CPU run that is left with a single thread.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType, patch_environment

from .accelerate_config import resolve_accelerate_config_argument


def launch_training_script(
    script_name: str,
    launch_args: list[str],
    training_script_args: list[str],
    *,
    launch_command_fn: Callable[[Any], None] = launch_command,
    launch_parser_fn: Callable[[], Any] = launch_command_parser,
) -> None:
    """
    Start a script of `trl.scripts` through Accelerate, and wait for it.

    Args:
        script_name: such as `"sft"` (or `"sft.py"`).
        launch_args: arguments of `accelerate launch`; also `--accelerate_config`.
        training_script_args: arguments of the script.
        launch_command_fn: starts the processes.
        launch_parser_fn: makes the launcher's parser.

    Raises:
        ValueError: no such script, an unknown Accelerate config, or more processes than devices.
    """
    script = Path(str(resources.files("trl.scripts"))) / f"{script_name.removesuffix('.py')}.py"
    if not script.is_file():
        raise ValueError(f"There is no training script {script.name} in {script.parent}.")
    launch_args = resolve_accelerate_config_argument(launch_args)
    args = launch_parser_fn().parse_args([*launch_args, str(script), *training_script_args])
    environment = _plan_devices(args)
    with patch_environment(**environment):
        launch_command_fn(args)


def _plan_devices(args: Namespace) -> dict[str, str]:
    """
    Settle CPU or accelerator, and one process or several, where Accelerate leaves it to chance.

    Returns:
        Environment variables for the processes. `args` is changed in place.
    """
    config = _config_file(args)
    if config is None:
        _set_plain_defaults(args)
    parallel = ("multi_gpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "tpu")
    if any(getattr(args, name, False) for name in parallel) or getattr(args, "mpirun_hostfile", None):
        return {}
    kind = config.distributed_type if config is not None else None
    on_cpu = args.cpu or not torch.accelerator.is_available()
    if kind not in (None, DistributedType.NO, DistributedType.MULTI_CPU):
        return {}
    processes = args.num_processes
    if processes is None and kind == DistributedType.MULTI_CPU:
        processes = config.num_processes
    if processes is not None and processes > 1:
        if not on_cpu:
            _refuse_silent_single_process(args, kind)
            args.multi_gpu = args.multi_gpu or (args.num_machines or 1) > 1
            return {}
        return _use_several_cpu_processes(args, processes)
    if on_cpu and config is None:
        args.num_processes = 1
        _set_cpu_threads(args, 1)
    return {}


def _set_plain_defaults(args: Namespace) -> None:
    """Accelerate's own defaults, said aloud, so that it does not warn of each."""
    for name, default in (("num_machines", 1), ("mixed_precision", "no"), ("dynamo_backend", "no")):
        if getattr(args, name) is None:
            setattr(args, name, default)


def _config_file(args: Namespace) -> Any:
    if args.config_file is not None:
        return load_config_from_file(args.config_file)
    if os.path.isfile(default_config_file) and not args.cpu:
        return load_config_from_file(None)
    return None


def _refuse_silent_single_process(args: Namespace, kind: DistributedType | None) -> None:
    devices, wanted = torch.accelerator.device_count(), args.num_processes // (args.num_machines or 1)
    if kind == DistributedType.NO:
        raise ValueError(
            f"{args.num_processes} processes are asked for, but {args.config_file or default_config_file} is for one "
            "(`distributed_type: 'NO'`). Use `--accelerate_config multi_gpu`, or `--num_processes 1`."
        )
    if devices < wanted:
        raise ValueError(
            f"{wanted} processes are asked for here, but there {'is' if devices == 1 else 'are'} {devices} "
            f"accelerator{'s' * (devices != 1)}. Use `--num_processes {devices}`, or `--cpu` to run them on the CPU."
        )


def _use_several_cpu_processes(args: Namespace, processes: int) -> dict[str, str]:
    """Start them with torchrun, over gloo. `accelerate launch --cpu --num_processes 2` would start one."""
    args.multi_gpu, args.cpu = True, False  # the launcher that starts several processes; what they use is the CPU
    args.num_processes = processes
    args.num_machines = args.num_machines or 1
    _set_cpu_threads(args, max(processes // args.num_machines, 1))
    return {"ACCELERATE_USE_CPU": "true"}


def _set_cpu_threads(args: Namespace, processes_here: int) -> None:
    """Share the cores between the processes; Accelerate would give each a single thread."""
    if args.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        args.num_cpu_threads_per_process = max(cores // processes_here, 1)
