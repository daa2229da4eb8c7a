"""What makes training faster on a GPU: compiled layers, and nothing computed for padding.

`torch_compile` and `padding_free` of a stage come down to `speed_up`; PPOTrainer calls its parts.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import TorchDynamoPlugin
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Trainer
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from codexhf.models import (
    backbone_of,
    backbone_states,
    base_model,
    compile_layers,
    evaluating,
    position_ids,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import SFTConfig

    from codexhf.arguments import StageArguments

FAR, FAR_IN_16_BITS = 1e-3, 0.05
"""How far states may be from those of padded rows, as a share of these; rounding gives a tenth."""


def cut_already(training: SFTConfig) -> SFTConfig:
    """Return arguments for rows that no longer need max_length, which TRL refuses if padding_free.

    A copy, where it differs: what was asked for is what a run records.
    """
    if not training.padding_free:
        return training
    args = copy.copy(training)
    args.max_length = None
    return args


def speed_up(trainer: Trainer, stage: StageArguments) -> None:
    """Do to a trainer's model what `torch_compile` and `padding_free` ask for.

    PPOTrainer has done it by then, and its `args` say no.
    """
    config = stage if hasattr(stage, "padding_free") else trainer.args
    asked = getattr(config, "padding_free", False)
    if skips_padding(asked, trainer.args, trainer.model):
        skip_padding(trainer.model)
        if hasattr(trainer.data_collator, "padding_free"):  # SFTTrainer's: else the head reads it
            trainer.data_collator.padding_free = True
        if isinstance(trainer.train_dataset, Dataset):  # accelerate cuts a stream's batches by row
            trainer.data_collator = WithBounds(trainer.data_collator)
    # else the copy of a batch waits for all that the GPU still has to do
    trainer.accelerator.dataloader_config.non_blocking = trainer.args.dataloader_pin_memory
    if trainer.args.torch_compile:
        trainer.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")  # not as a whole
        # what is recomputed must find the graph of its forward: one for all sizes. None: it may be
        recomputes = trainer.args.gradient_checkpointing is not False
        compile_layers(trainer.model, dynamic=recomputes or None)
        if wants_loss_alone(trainer):
            return_loss_alone(trainer.model)


@dataclass
class WithBounds:
    """A collator that says as well where the documents of its rows begin.

    Counted on a GPU they would be waited for in every step. Rows with padding stay as they are.
    """

    collate: Callable[[list], dict]

    def __call__(self, rows: list) -> dict:
        batch = self.collate(rows)
        if "position_ids" in batch and "attention_mask" not in batch:
            batch["document_bounds"] = _documents(None, batch["position_ids"])[2]
        return batch


def wants_loss_alone(trainer: Trainer) -> bool:
    """Return whether a trainer takes nothing but the loss from its model while it trains."""
    own = type(trainer).compute_loss is Trainer.compute_loss
    return own and trainer.compute_loss_func is None and trainer.label_smoother is None


def return_loss_alone(model: nn.Module) -> None:
    """Compile a model's loss, and let it keep its logits while it trains.

    accelerate copies what a model returns in float32: of 32 x 1,024 tokens and a vocabulary of
    50,304 that is 6.6 GB in every step.
    """
    base = base_model(model)
    base.loss_function = torch.compile(base.loss_function)
    read = model.forward

    @wraps(read.__func__)  # Trainer reads from it which columns a model takes
    def forward(self, *args, **kwargs):
        out = read(*args, **kwargs)
        alone = self.training and getattr(out, "loss", None) is not None
        return type(out)(loss=out.loss) if alone else out

    model.forward = MethodType(forward, model)


def fuse(model: nn.Module, kernels: dict | None) -> None:
    """Give the layers of a model Liger's kernels; its own loss would replace a policy's forward."""
    apply_liger_kernel(model, {**(kernels or {}), "fused_linear_cross_entropy": False})


@contextmanager
def fused(model: nn.Module, kernels: dict | None) -> Iterator[None]:
    """Lend a model Liger's kernels to sample: torch.compile cannot train them in a checkpoint."""
    code = vars(sys.modules[type(base_model(model)).__module__])
    names, modules = dict(code), [(module, set(vars(module))) for module in model.modules()]
    fuse(model, kernels)
    try:
        yield
    finally:
        code.update(names)
        for module, had in modules:
            for name in set(vars(module)) - had:
                delattr(module, name)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_bounds: Tensor | None = None,
    longest_document: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return causal attention (1, T, heads, D) within documents, where their bounds are given.

    It takes the place of transformers' "sdpa", and is that where they are not. Their names are not
    transformers' cu_seq_lens_q and max_length_q: continuous batching gives those to "sdpa" too.

    Args:
        query: (1, heads, T, D).
        key: (1, groups, T, D), where groups divides heads.
        value: (1, groups, T, D).
        document_bounds: (documents + 1,) int32, where each begins, and T.
        longest_document: its tokens, or more.
    """
    if document_bounds is None:
        given = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if kind == "cuda" and dtype != torch.float32:
        rows = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        bounds = (document_bounds, document_bounds, longest_document, longest_document)
        # what torch.nn.attention.varlen calls, whose arguments change from version to version
        found = torch.ops.aten._flash_attention_forward(
            *rows, *bounds, dropout, True, False, scale=scaling
        )[0]
        return found[None], None
    lengths = document_bounds.diff().tolist()
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    options = {"dropout_p": dropout, "is_causal": True, "scale": scaling, "enable_gqa": True}
    found = [scaled_dot_product_attention(*part, **options) for part in parts]
    return torch.cat(found, 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def skips_padding(asked: bool | None, args: TrainingArguments, model: nn.Module) -> bool:
    """Return whether a model is to skip padding: as asked, or (None) where it is faster and can.

    That is tried on the GPU: one that is sharded, and not there yet, skips padding if it is asked.
    """
    if asked is not None:
        return asked
    if args.device.type != "cuda" or base_model(model).device.type != "cuda":
        return False
    half = args.bf16 or args.fp16 or base_model(model).dtype in (torch.bfloat16, torch.float16)
    return half and obstacle(model) is None


def skip_padding(model: nn.Module) -> None:
    """Let the layers of a model read the real tokens of a batch as one row.

    A batch (B, L) says by its mask, or by positions that start again, which tokens belong together.
    Attention is told where each document begins, so there is no mask in memory.

    Raises:
        ValueError: its attention is not plain: causal, over all that was before.
    """
    problem = obstacle(model)
    if problem is not None:
        raise ValueError(
            f"padding_free: got a model with {problem}, expected plain causal attention by sdpa. "
            "Leave padding_free out: its rows are padded then."
        )
    backbone = backbone_of(model)
    backbone.forward = _without_padding(backbone)


def _without_padding(backbone: nn.Module) -> Callable:
    """Return a forward of a model's layers that reads a batch as one row, where it can."""
    read, config = backbone.forward, backbone.config

    @wraps(read)
    def forward(
        input_ids=None, attention_mask=None, position_ids=None, document_bounds=None, **given
    ):
        if not _can(config, input_ids, attention_mask, position_ids, given):
            return read(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **given,
            )
        at, positions, bounds = _documents(attention_mask, position_ids, document_bounds)
        out = read(
            input_ids=input_ids.flatten()[at][None],
            # of four dimensions, so that none is made; where it is read after all, torch refuses it
            attention_mask=input_ids.new_empty(1, 1, 0, 0),
            position_ids=positions[None],
            document_bounds=bounds,
            longest_document=input_ids.size(1),
            **given,
        )
        states = out.last_hidden_state[0]  # (T, H)
        spread = states.new_zeros(input_ids.numel(), states.size(1)).index_copy(0, at, states)
        out.last_hidden_state = spread.view(*input_ids.shape, -1)
        return out

    return forward


def states_at(model: nn.Module, input_ids: Tensor, mask: Tensor | None, at: Tensor) -> Tensor:
    """Return the last hidden states (N, H) where `at` (b, l) is True.

    Args:
        mask: (b, l), or None where no padding precedes a real token. A model that skips padding
            then reads each row up to the last column that is wanted.
    """
    if mask is None and "forward" in vars(backbone_of(model)):
        mask = at.flip(1).cumsum(1).flip(1) > 0
    return backbone_states(model, input_ids, mask)[at]


def obstacle(model: nn.Module) -> str | None:
    """Return what of a model needs its rows as they are, or None.

    What no configuration says, such as attention that takes no bounds, is found by trying.
    """
    base, config = base_model(model), base_model(model).config.get_text_config()
    if not hasattr(base, base.base_model_prefix):
        return f"no layers under {base.base_model_prefix!r}"
    if not base._supports_attention_backend or config._attn_implementation != "sdpa":
        return f"attention by {config._attn_implementation!r}"
    for name in ("sliding_window", "attn_logit_softcapping", "num_experts", "num_local_experts"):
        if getattr(config, name, None):
            return name
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return f"layers of {', '.join(sorted(kinds))}" if kinds else _tried(model)


@torch.no_grad()
def _tried(model: nn.Module) -> str | None:
    """Return what is wrong with the states of two short rows that are read as one, or None."""
    backbone = backbone_of(model)
    weight = next(backbone.parameters())
    if weight.is_meta or not weight.numel():  # sharded: it cannot be called yet
        return None
    ids = torch.tensor([[0, 1, 2, 3], [0, 0, 4, 5]], device=weight.device)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=weight.device)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    # on a GPU in bfloat16, as flash attention takes it: it knows not all cards and widths of heads
    half = torch.autocast(weight.device.type, torch.bfloat16, weight.device.type == "cuda")
    with evaluating(model), half:
        try:
            expected, found = (
                read(**given, use_cache=False).last_hidden_state[mask.bool()]
                for read in (backbone, _without_padding(backbone))
            )
        except (RuntimeError, TypeError) as error:
            return f"layers that need their padding ({str(error).splitlines()[0]})"
    far = (found - expected).float().norm() / expected.float().norm()
    exact = expected.dtype == torch.float32 and weight.device.type != "cuda"
    limit = FAR if exact else FAR_IN_16_BITS  # NaN is for those to tell who look for it
    return "layers that see other rows of a batch" if far > limit else None


def _can(config, input_ids, mask, positions, given: dict) -> bool:
    """Return whether a call can do without padding."""
    if input_ids is None or (mask is None and positions is None):
        return False
    cached = config.use_cache if given.get("use_cache") is None else given["use_cache"]
    wanted = ("past_key_values", "output_hidden_states", "output_attentions")
    if cached or any(given.get(name) for name in wanted):
        return False
    shaped = positions is None or positions.shape == input_ids.shape
    return shaped and (mask is None or mask.dim() == 2)


def _documents(
    mask: Tensor | None, positions: Tensor | None, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the T real tokens of (B, L) are, their positions (T,), and documents' bounds.

    Args:
        mask: (B, L), 1 where a token is real; None: everywhere.
        positions: (B, L), 0 where a document begins, as each row does; None: it is one.
        bounds: of the documents, where they are known.
    """
    length = (positions if mask is None else mask).size(1)
    if mask is None:
        at = torch.arange(positions.numel(), device=positions.device)
    else:
        at = mask.flatten().nonzero().squeeze(1)
        positions = position_ids(mask) if positions is None else positions
    positions = positions.flatten()[at]
    if bounds is not None:
        return at, positions, bounds
    rows = torch.diff(at // length, prepend=at.new_full((1,), -1)) > 0
    starts = (rows | (positions == 0)).nonzero().squeeze(1)
    bounds = torch.cat([starts, starts.new_full((1,), len(at))]).to(torch.int32)
    return at, positions, bounds
