"""The processes of a run: which one this is, which GPUs are its own, and what they tell each other.

torchrun and accelerate launch start the same script several times and say in the environment which process is which.
Each process has the whole model and its own rows. transformers' Trainer adds up their gradients. All else that they
must agree on goes through this file: folders, interruptions, counts of tokens, answers, and checksums of what they
train.

The standard library answers what the environment says. torch.distributed is imported where processes talk.
"""
import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from LoTA import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

T = TypeVar("T")
# What shards a model, {the variable that its launcher sets: its name}.
SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed ZeRO",
            "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
ODD = 0x1E3779B97F4A7C15            # an odd number with bits all over, so that no two places of a checksum weigh alike
LONGEST_WAIT = timedelta(hours=12)  # while one process merges or writes a large model; a dead one is noticed at once

# The group that the processes talk in: gloo, because its messages are in the CPU's memory and no GPU waits for them.
_talk = None


# --- what the environment says ------------------------------------------------------------------------------------

def count() -> int:
    """How many processes there are, on all machines."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"the environment says {name}={text}, and a number is wanted: torchrun sets it")
    return int(text)


def check_launch(device_map: str) -> None:
    """Raises UserError for a way to start several processes in which nothing here can train or evaluate.

    device_map: the flag's value. Prints what accelerate launch --cpu does with its --num_processes.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise UserError(f"{name} cuts tensors into shards, and that fits neither packed integers nor a quantile, "
                            "which needs its tensor whole: start torchrun without it, and --device_map auto spreads a "
                            "model that is too large for one GPU")
    if count() > 1 and device_map not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device_map {device_map} would put all {count()} processes on one device: leave it at auto, "
                        "which gives each process GPUs of its own")
    if count() == 1 and "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        print("accelerate launch --cpu has started one process, whatever its --num_processes says; "
              "torchrun --nproc_per_node 2 starts two")


def own_gpus(there: int) -> list[int]:
    """The indices of this process's GPUs, of `there` on this machine. With one process all are its own.

    The processes of a machine take turns, so that the first GPU of a process is that of its local rank, where
    accelerate puts the rows. Raises UserError where a process would have none.
    """
    local, locals_ = _number("LOCAL_RANK", rank()), _number("LOCAL_WORLD_SIZE", count())
    if there < locals_:
        raise UserError(f"{locals_} processes on a machine with {there} GPUs: start at most one process for each GPU, "
                        "or give --device_map cpu")
    return list(range(local, there, locals_))


@contextmanager
def one_voice() -> Iterator[None]:
    """While the block runs, only the first process prints, shows progress, and warns."""
    if is_first():
        yield
        return
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}      # read when they are imported
    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          warnings.catch_warnings(action="ignore")):
        yield


# --- talking ------------------------------------------------------------------------------------------------------

def connect(device: str) -> None:
    """Joins the other processes. Nothing happens where there are none, or where it was done before.

    device: the flag --device_map. On a CPU the gradients go through gloo, on GPUs through NCCL.
    """
    global _talk
    if count() == 1 or _talk is not None:
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    PartialState(cpu=on_cpu, backend="gloo" if on_cpu else None)
    # accelerate refuses a model that has a device map, which every GPTQ model has, because the map usually means that
    # one process uses all GPUs. Here it names this process's own. The variable is accelerate's way to say so.
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    # accelerate hands torch the argument that Trainer's ddp_broadcast_buffers becomes, under its old name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    _talk = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


def leave() -> None:
    """Ends what connect() began. Only for a process that has nothing left to say."""
    global _talk
    if _talk is not None:
        import torch.distributed as dist
        _talk = None
        dist.destroy_process_group()


def agree(value: T) -> T:
    """The first process's value, in all processes."""
    if _talk is None:
        return value
    import torch.distributed as dist
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_talk)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, in all processes."""
    if _talk is None:
        return [value]
    import torch.distributed as dist
    values = [None] * count()
    dist.all_gather_object(values, value, group=_talk)
    return values


def wait() -> None:
    """Waits until all processes are here."""
    gather(None)


def shared_folder(folder: "Path | None", flag: str) -> "Path":
    """The folder that the first process made, in all processes, which wait for it. The others' `folder` is not read.

    Raises UserError where a process does not see it. flag: the one that names another place.
    """
    folder = agree(folder)
    if not folder.is_dir():
        raise UserError(f"{folder.absolute()} was made by process 0 and is not there for process {rank()}: give "
                        f"{flag} a folder that all machines see")
    return folder


def first_difference(what: Mapping[str, object]) -> tuple[str, int, object, object] | None:
    """(name, process, value of process 0, its value) of the first entry of `what` that is another one in a process."""
    values = gather(dict(what))
    return next(((name, process, value, theirs[name]) for process, theirs in enumerate(values)
                 for name, value in values[0].items() if theirs[name] != value), None)


def require_equal(what: Mapping[str, object]) -> None:
    """Raises UserError where a process has another value than the first one. what: {its name in the message: value}."""
    if found := first_difference(what):
        name, process, first, other = found
        raise UserError(f"the processes have not the same {name}: process 0 has {first}, process {process} has {other}")


def require_same(tensors: "Mapping[str, torch.Tensor]", step: int) -> None:
    """Raises RuntimeError where a tensor of this process differs in a bit from the first one's.

    tensors: {name: tensor}, of the same shapes in all processes. step: for the message.
    """
    if _talk is None:
        return
    import torch
    sums = [checksum(tensor) for tensor in tensors.values()]
    sums = torch.stack([one.to(sums[0].device) for one in sums]).tolist()       # the CPU waits for the GPUs once
    if found := first_difference(dict(zip(tensors, sums, strict=True))):
        raise RuntimeError(f"{found[0]} is not the same in process 0 and in process {found[1]} at step {step}: the "
                           "processes train apart; resume from the checkpoint before")


def checksum(tensor: "torch.Tensor") -> "torch.Tensor":
    """A number of all bits of a tensor and of their places: int64, 0-dim, on its device. Of any dtype, any shape.

    It is a sum of integers modulo 2**64, so the order of the sum does not matter.
    """
    import torch
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integers).flatten().long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device).mul_(ODD)).sum()

