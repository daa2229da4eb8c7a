"""Weights that are spread over processes, by FSDP2 or ZeRO-3: made so, and held whole for a while.

accelerate shards what is trained. Here is what is left: models that only score, sampling, in which
processes take different numbers of steps, and what is saved at the end.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter of a model lies spread over processes."""
    return any(isinstance(p, DTensor) or _in_zero3(p) for p in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor; where it lies spread, every process must ask."""
    if _in_zero3(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module, first: bool) -> dict[str, torch.Tensor]:
    """Return a sharded model's state in main memory, {} on all but the first process.

    Every process must ask; the others hold one parameter at a time.
    """
    named = dict(model.named_parameters())  # tied weights once
    aliases = dict(model.named_parameters(remove_duplicate=False))
    named |= {name: t for name, t in model.state_dict().items() if name not in aliases}  # buffers
    state = ((name, whole(tensor)) for name, tensor in named.items())
    return {name: tensor.detach().cpu() for name, tensor in state if first}


def count(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter has, on all processes together."""
    return parameter.ds_numel if _in_zero3(parameter) else parameter.numel()


def keep_float32(accelerator: Any) -> None:
    """Let sharded training reduce gradients and return losses in float32, as DDP does.

    accelerate's policy rounds both to bfloat16, a loss of 7.36 to 7.375.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    given = plugin and plugin.mixed_precision_policy
    if given:
        # no output dtype: it would hold for every layer, and the head takes what its weights are
        plugin.mixed_precision_policy = MixedPrecisionPolicy(given.param_dtype, torch.float32)


def shard(model: nn.Module, accelerator: Any) -> nn.Module:
    """Spread a model that is not trained over the processes, layer by layer."""
    plugin = accelerator.state.fsdp_plugin
    options = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
    }
    for part in list(model.modules()):
        if type(part).__name__ in _layers(model):
            fully_shard(part, **options)
    return fully_shard(model, **options)


@contextmanager
def gathered(model: nn.Module | None, *parts: nn.Module) -> Iterator[None]:
    """Hold the weights of a sharded model whole on every process, in the dtype of its forward.

    Every process must come here. Within, each may run the model as often as it likes: nothing is
    sent. What is not sharded is left alone.

    Args:
        model: as it was sharded.
        parts: of it; none means all. What stands outside its layers is gathered with any part.
    """
    if model is not None and any(_in_zero3(p) for p in model.parameters()):
        with _gathered_zero3(model, parts or (model,)):
            yield
        return
    if not isinstance(model, FSDPModule):
        yield
        return
    model._get_fsdp_state()._lazy_init()  # else the first part that runs takes itself for the root
    inside = [module for part in parts or (model,) for module in part.modules()]
    groups = [m for m in dict.fromkeys([model, *inside]) if isinstance(m, FSDPModule)]
    hooks = [(group, group._forward_pre_hooks, group._forward_hooks) for group in groups]
    try:
        for group in groups:
            group.unshard()
            # FSDP's, which shard again after a forward, and which a CUDA graph would not call
            group._forward_pre_hooks, group._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for group, before, after in hooks:
            group._forward_pre_hooks, group._forward_hooks = before, after
            group.reshard()


@contextmanager
def _gathered_zero3(model: nn.Module, parts: Iterable[nn.Module]) -> Iterator[None]:
    import deepspeed

    hooks = [
        (hooks, name, hook)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for name, hook in hooks.items()
        if (hook.__module__ or "").startswith("deepspeed")  # which let go after a forward
    ]
    with deepspeed.zero.GatheredParameters([p for part in parts for p in part.parameters()]):
        for place, name, _ in hooks:
            del place[name]
        try:
            yield
        finally:
            for place, name, hook in hooks:
                place[name] = hook


@contextmanager
def written(model: nn.Module) -> Iterator[None]:
    """Let weights be changed in place on every process; ZeRO-3 takes over the first one's."""
    if not any(_in_zero3(p) for p in model.parameters()):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        yield


def _in_zero3(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")


def complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that took no step yet the zeros from which Adam's first one starts.

    A sharded checkpoint has to know every parameter, those of a frozen policy too.
    """
    known = next(((p, state) for p, state in optimizer.state.items() if state), None)
    if known is None:
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter if value.shape == known[0].shape else value)
                for name, value in known[1].items()
            }


def _layers(model: nn.Module) -> set[str]:
    """Return the classes of layers that are sharded one by one."""
    return set(getattr(model, "_no_split_modules", None) or ())
