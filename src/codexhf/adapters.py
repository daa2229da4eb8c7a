"""LoRA: adapters on a frozen base, which the models of one process share where it is equal.

Every stage that trains takes `use_peft`. What comes out is a plain model, with its adapter next to
it in the folder `adapter`; PPO reads R from there, so that policy, reference, critic and R hold one
base between them.
"""

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from codexhf.arguments import PretrainArguments
from codexhf.hub import ADAPTER
from codexhf.models import backbone_of, base_model, load_policy, new_policy
from codexhf.sharding import whole, writable

if TYPE_CHECKING:
    from peft import LoraConfig


def loading(stage) -> dict:
    """Return how a stage's models are loaded, as arguments of from_pretrained."""
    options: dict = {"dtype": getattr(torch, stage.dtype)}
    if stage.attn_implementation is not None:
        options["attn_implementation"] = stage.attn_implementation
    if getattr(stage, "load_in_4bit", False):
        from transformers import BitsAndBytesConfig

        # Dettmers et al. 2023 (arXiv:2305.14314), sections 3 and 4
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = {"": PartialState().device}
    return options


def lora_config(stage, dropout: float = 0.0, task: str = "CAUSAL_LM") -> "LoraConfig | None":
    """The LoRA settings of a stage with `use_peft`, on all linear layers; None without it.

    Args:
        dropout: on the adapters; PPO has none, as its ratio compares two forwards.
        task: peft's; SEQ_CLS trains the score head in full next to the adapters.
    """
    if not stage.use_peft:
        return None
    from peft import LoraConfig  # a second and a half that most stages do without

    return LoraConfig(
        r=stage.lora_r,
        lora_alpha=stage.lora_alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type=task,
    )


def new_or_loaded_policy(stage: PretrainArguments, tokenizer, seed: int) -> nn.Module:
    """The model that pretraining starts from: `stage.model`, or new weights."""
    if stage.model is None:
        return new_policy(stage.architecture, tokenizer, stage.max_length, seed, **loading(stage))
    return with_lora(load_policy(stage.model, tokenizer, **loading(stage)), stage, seed)


def with_lora(model: PreTrainedModel, stage, seed: int, task: str = "CAUSAL_LM") -> nn.Module:
    """Return a model with new adapters that change nothing yet; without `use_peft` the model."""
    config = lora_config(stage, task=task)
    if config is None or not isinstance(model, PreTrainedModel):
        return model
    from peft import get_peft_model

    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    if task == "SEQ_CLS":
        wide_head(adapted)
    return adapted


def wide_head(model: nn.Module) -> None:
    """Keep the score head, which is trained in full, in float32: bfloat16 rounds its steps away."""
    for part in base_model(model).score.float().modules():
        if isinstance(part, nn.Linear):  # in peft's wrapper: as it was, and as it is trained
            part.register_forward_pre_hook(_in_own_dtype)


def _in_own_dtype(head: nn.Module, inputs: tuple) -> tuple:
    wide = next(head.parameters()).dtype  # held whole by FSDP it may be bfloat16
    return (inputs[0].to(wide), *inputs[1:])


def adapts_classifier(folder: Path) -> bool:
    """Whether the adapter in a folder is of a classifier, and brings its head."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config["task_type"] == "SEQ_CLS"


def read_adapter(model: PreTrainedModel, folder: Path, trained: bool = False) -> nn.Module:
    """Put a saved adapter of a classifier, and its head, onto the base that it was trained on."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trained)
    wide_head(adapted)
    return adapted


@torch.no_grad()
def share_base(*models: nn.Module | None) -> int:
    """Let equal frozen weights below the heads of several models be one tensor; return the bytes.

    What is trained is never shared. Models that differ by more than their adapters keep their own.
    """
    known: dict[str, nn.Parameter] = {}
    models, saved = [model for model in models if model is not None], 0
    for model in models:
        for where, module in backbone_of(model).named_modules():
            where = re.sub(r"\.?base_layer$", "", where)
            for name, weight in module._parameters.items():
                if weight is None or weight.requires_grad or ".lora_" in f".{where}":
                    continue
                first = known.setdefault(f"{where}.{name}", weight)
                if first is not weight and _equal(first, weight):
                    module._parameters[name] = first
                    saved += weight.numel() * weight.element_size()
    for model in models:
        model.shares_base = saved > 0
    return saved


def _equal(a: nn.Parameter, b: nn.Parameter) -> bool:
    if type(a) is not type(b) or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    scales = [getattr(getattr(w, "quant_state", None), "absmax", None) for w in (a, b)]
    if scales[0] is not None and not torch.equal(*scales):
        return False
    return torch.equal(a, b.to(a.device))


def own_base(model: nn.Module) -> None:
    """Undo `share_base` for one model: give it copies of what it does not train."""
    copies: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not weight.requires_grad:
                if weight not in copies:
                    copies[weight] = nn.Parameter(weight.detach().clone(), requires_grad=False)
                module._parameters[name] = copies[weight]


def merge_adapters(trainer) -> dict:
    """Fold trained adapters into the weights, so that later stages load plain models.

    They are saved on their own as well. Of PPO's trainer the models are policy and critic; the
    critic's adapter stays in value_model/.
    """
    from peft import PeftModel

    output_dir, holders = Path(trainer.args.output_dir), [(trainer, "model", "")]
    if not isinstance(trainer.model, PeftModel) and hasattr(trainer.model, "policy"):
        holders = [(trainer.model, "value_model", "value_model"), (trainer.model, "policy", "")]
    holders = [given for given in holders if isinstance(getattr(*given[:2]), PeftModel)]
    for holder, name, where in holders:
        model, folder = getattr(holder, name), output_dir / where / ADAPTER
        weights = {n: whole(w) for n, w in model.named_parameters() if w.requires_grad}
        if trainer.is_world_process_zero():
            model.save_pretrained(folder, state_dict=weights)
            (folder / "README.md").unlink(missing_ok=True)  # a card stands above
        trainer.accelerator.wait_for_everyone()
        setattr(holder, name, _folded(model, folder))
    if not holders:
        return {}
    trainer.model_wrapped = trainer.model
    return {"adapters_merged": True}


def _folded(model: nn.Module, adapter: Path) -> PreTrainedModel:
    """Return the plain model that an adapted one computes."""
    base = base_model(model)
    if not getattr(base, "is_quantized", False):
        if getattr(model, "shares_base", False):
            own_base(model)  # folding writes into the base
        with writable(model):
            return model.merge_and_unload()
    # 4 bits would round the adapter away: it is folded into the weights that they were made from
    from peft import PeftModel

    config = copy.deepcopy(base.config)
    del config.quantization_config
    plain = type(base).from_pretrained(
        base.name_or_path, config=config, dtype=base.dtype, use_safetensors=True
    )
    if plain.can_generate():
        plain.generation_config = base.generation_config
    return PeftModel.from_pretrained(plain.to(base.device), str(adapter)).merge_and_unload()
