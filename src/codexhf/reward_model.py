"""The reward model R: load it, draw its head, score with it, normalise and record its scores.

Two rewards share one model: `ModelReward` takes text and its own tokenizer, `IdReward` takes the
token ids that PPO has already. Both are rewards under the contract of rewards.py.
"""

import inspect
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from codexhf import models
from codexhf.adapters import adapts_classifier, read_adapter
from codexhf.arguments import RewardModelArguments, model_folder
from codexhf.faster import states_at
from codexhf.generation import sample
from codexhf.hub import ADAPTER, resolve
from codexhf.knobs import knob, knob_errors
from codexhf.models import backbone_of, backbone_states, base_model, load_policy, to_device
from codexhf.prompts import Prompt, answered_ids, end_ids, prompt_ids, right_pad, text_of
from codexhf.sharding import gathered
from codexhf.tokenizer import load_tokenizer, spare_token
from codexhf.trackers import log_samples

SCALE = ("score_mean", "score_std")
"""Fields of R's config: mean and standard deviation of its score on M1's answers."""


def load_reward_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    new_head: bool = False,
    seed: int = 42,
    **loading: Any,
) -> PreTrainedModel:
    """Load a sequence classification model with one label.

    Args:
        tokenizer: with which it will be trained; see `pad_apart`.
        new_head: allow a missing score head (a policy that becomes a reward model or a critic),
            which `draw_head` then fills from `seed`.
        loading: dtype and so on, as `adapters.loading` gives them.
    Raises:
        ValueError: the head is missing and `new_head` is False, or weights are not finite.
    """
    set_seed(seed)
    folder = resolve(path)
    base = models.adapter_base(folder)
    kind = classifier_class(AutoConfig.from_pretrained(base or folder, trust_remote_code=False))
    model, info = kind.from_pretrained(
        base or folder,
        num_labels=1,
        use_safetensors=True,
        trust_remote_code=False,
        use_cache=False,
        output_loading_info=True,
        **{"dtype": torch.float32, **loading},
    )
    missing = [name for name in info["missing_keys"] if "score" in name or "classifier" in name]
    if base is not None and adapts_classifier(folder):
        model, missing = _with_scale(read_adapter(model, folder), folder).merge_and_unload(), []
        model.requires_grad_(True)  # peft froze it
        base = None
    if missing and not new_head:
        raise ValueError(
            f"{path}: the weights of {', '.join(missing)} are missing, so this is not a trained "
            "reward model. Give the folder that recipes/reward_model.py wrote."
        )
    if base is not None:  # of a policy: the layers below the head change, and there is no head
        backbone_of(model).load_state_dict(backbone_of(load_policy(path)).state_dict())
    if missing:
        check_scalar_head(model, path)
        draw_head(model, seed)
    if tokenizer is not None:
        pad_apart(model, tokenizer)
    return models.check_finite(model, path)


def pad_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make model and tokenizer agree on a pad token that ends no answer.

    transformers' classifiers read the score behind the last token that is not padding. With the
    end token as padding that is one token earlier than where `ModelReward` and PPO read it. Where
    no other token is free, one is added, and an embedding if need be.
    """
    if tokenizer.pad_token_id in end_ids(tokenizer):
        spare = spare_token(tokenizer)
        if spare is None:
            spare = "<|pad|>"
            tokenizer.add_special_tokens({"pad_token": spare})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
        tokenizer.pad_token = spare
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def classifier_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads a sequence classifier of this family, by `from_pretrained`.

    Families without one (Granite, Cohere 2, OLMoE, Mamba, ...) get one of transformers' generic
    kind; it exists in this process alone, so what it saved is loaded again through here.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForSequenceClassification
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    base = next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.replace("ForCausalLM", "ForSequenceClassification")
    fields = {"base_model_prefix": causal.base_model_prefix}
    return type(name, (_GenericClassifier, base), fields)


class _GenericClassifier(GenericForSequenceClassification):
    """Passes on what the backbone takes: those with a state and no cache take fewer arguments."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        backbone = backbone_of(self)
        wanted = inspect.signature(backbone.forward).parameters
        given = {n: value for n, value in kwargs.items() if value is not None and n in wanted}
        read = backbone(input_ids=input_ids, attention_mask=attention_mask, **given)
        hidden = read.last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (mask.long() * torch.arange(mask.size(1), device=mask.device)).argmax(1)
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden)[rows, last])


def draw_head(model: PreTrainedModel, seed: int) -> None:
    """Draw the weights of a score head from N(0, 1/(hidden + 1)), reproducibly.

    Source: Stiennon et al. 2020, appendix C.1 (arXiv:2009.01325).
    """
    head = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head.shape, generator=generator) * (head.shape[1] + 1) ** -0.5
    with torch.no_grad():
        head.copy_(drawn)


def check_scalar_head(model: nn.Module, what: str) -> None:
    """Refuse a reward model or critic without a one-output `score` head."""
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise ValueError(
            f"{what}: got {type(model).__name__}, expected a transformers model, or one in an "
            "adapter of peft."
        )
    head = getattr(base_model(model), "score", None)
    outputs = getattr(head, "out_features", None)
    if outputs != 1:
        found = "no `score` head" if head is None else f"a `score` head with {outputs} outputs"
        raise ValueError(
            f"{what}: got {type(model).__name__} with {found}, expected one with 1 output. "
            "Load it with AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)."
        )


@dataclass(eq=False)
class ModelReward:
    """The learned reward model under the contract of every other reward.

    Text goes in and is tokenised with the reward model's own tokenizer, so that policy and reward
    model need not share one. It is rendered as reward_model.py rendered its training pairs:
    messages through the chat template, a string prompt continued as plain text and ended by eos.
    Special tokens that an answer spells out are blanked: else it could end its own turn and
    write the next one.

    A text over `max_tokens` loses its end (right truncation), is counted in `truncated` and
    warned of once: its score is that of the part that was read.
    """

    model: PreTrainedModel  # a sequence classifier with one label
    processing_class: PreTrainedTokenizerBase  # that it was trained with
    _: KW_ONLY
    mean: float = knob(0.0, "Of the raw score, as saved in the model's config.")
    std: float = knob(1.0, "Standard deviation of the raw score.", above=0)
    clip: float | None = knob(None, "Bound on the absolute normalised score.", above=0)
    batch_size: int = knob(32, "Texts per forward pass.", low=1)
    max_tokens: int | None = knob(None, "Longest text; None: as model and tokenizer allow.")
    name: str = knob("reward_model", "What the score is called in logs and in `rewards:`.")

    def __post_init__(self) -> None:
        own = self.processing_class
        context = models.context_of(self.model.config) or math.inf
        self._limit = int(min(context, own.model_max_length))
        if errors := [*self._errors(), *knob_errors(self)]:
            raise ValueError(f"reward {self.name!r}: " + "\n".join(errors))
        self.max_tokens, self.__name__ = self.max_tokens or self._limit, self.name
        self.truncated = 0
        added = own.added_tokens_decoder.values()
        special = {*own.all_special_tokens} | {token.content for token in added if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def _errors(self) -> Iterator[str]:
        model, own = self.model, self.processing_class
        pad_id = model.config.get_text_config().pad_token_id
        embedded = model.get_input_embeddings().num_embeddings
        if model.config.num_labels != 1:
            yield (
                f"model: got {model.config.num_labels} labels, expected 1. "
                "Load it with AutoModelForSequenceClassification and num_labels=1."
            )
        if model.get_output_embeddings() is not None:
            yield (
                f"model: got {type(model).__name__}, a language model without a `score` head, "
                "expected a sequence classifier. Train one with recipes/reward_model.py."
            )
        if own.eos_token_id is None or own.pad_token_id is None:
            yield (
                f"tokenizer: got eos {own.eos_token!r} and pad {own.pad_token!r}, expected both. "
                "Set the missing one."
            )
        elif pad_id != own.pad_token_id:
            yield (
                f"model.config.pad_token_id: got {pad_id!r}, expected the tokenizer's "
                f"{own.pad_token_id}. The model finds the last token by it: set it."
            )
        if len(own) > embedded:
            yield (
                f"tokenizer: got {len(own)} tokens, expected at most the model's {embedded}. Use "
                "the model's own tokenizer."
            )
        if self.max_tokens is not None and not 1 <= self.max_tokens <= self._limit:
            yield f"max_tokens: got {self.max_tokens!r}, expected 1 to {self._limit}, or None."

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        rows = [self._tokens(*pair) for pair in zip(prompts, completions, strict=True)]
        # Neighbours of like length share a batch, so little of a forward pass is padding.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        scores = np.zeros(len(rows))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scores[batch] = self._scores([rows[row] for row in batch])
        return scores.tolist()

    def _tokens(self, prompt: Prompt, completion: str) -> list[int]:
        """Return the token ids of one prompt with its answer, at most `max_tokens` of them."""
        # A space, not nothing: removing a token may join its neighbours into another one.
        completion = self._special.sub(" ", completion)
        completion = completion.encode("utf-8", "replace").decode()  # lone surrogates
        ids, _ = answered_ids(prompt, completion, self.processing_class)
        if len(ids) > self.max_tokens:
            self.truncated += 1
            if self.truncated == 1:
                warnings.warn(
                    f"reward {self.__name__!r}: a text of {len(ids)} tokens is cut to "
                    f"{self.max_tokens} before it is scored. Shorten prompts or answers; "
                    "further ones are counted in `truncated`.",
                    stacklevel=3,
                )
        return ids[: self.max_tokens]

    def _scores(self, batch: list[list[int]]) -> list[float]:
        """Return the normalised, clipped scores of token id lists, in their order."""
        self.model.eval()
        input_ids, mask = right_pad(batch, self.model.device)  # (B, T)
        rows = torch.arange(len(batch), device=input_ids.device)
        with torch.no_grad():
            hidden = backbone_states(self.model, input_ids, mask)
            logits = self.model.score(hidden)[rows, mask.sum(1) - 1]  # (B, 1)
        scores = (logits.squeeze(-1).float() - self.mean) / self.std  # (B,)
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        return scores.tolist()


class IdReward:
    """A reward model that reads the policy's own token ids, which saves tokenising again.

    It takes part in a RewardSum like any reward: `read` is called first, with ids, and the call
    with text returns what was read.
    """

    def __init__(self, model: nn.Module, name: str, normalize: bool):
        self.model, self.__name__ = model, name
        self.mean, self.std = scale_of(model) if normalize else (0.0, 1.0)
        self.scores: list[float] = []

    @torch.no_grad()
    def read(self, count: int, batches: Iterable[tuple[Tensor, Any]]) -> None:
        """Score `count` rows at their last real token.

        Args:
            batches: row numbers (b,) and the `Layout` of these rows.
        """
        scores = torch.zeros(count, device=self.model.device)
        for index, layout in batches:
            columns = torch.arange(layout.input_ids.size(1), device=layout.last.device)
            at = columns == layout.last[:, None]
            hidden = states_at(self.model, layout.input_ids, layout.attention_mask, at)
            scores[index] = self.model.score(hidden).squeeze(-1).float()
        self.scores = ((scores - self.mean) / self.std).tolist()

    def __call__(
        self, prompts: Sequence, completions: Sequence[str], **columns: Any
    ) -> list[float]:
        return self.scores


def scale_of(model: nn.Module) -> tuple[float, float]:
    """Return mean and standard deviation of the score as the config has them, or 0 and 1."""
    return getattr(model.config, "score_mean", 0.0), getattr(model.config, "score_std", 1.0)


def adapted_reward_model(path: str, trained: bool = False, **loading: Any) -> nn.Module:
    """R as adapters on the model that it was trained from, which others may share.

    Where R was saved without adapters, or that model is gone, it is R as a plain model.
    """
    adapter = resolve(path) / ADAPTER
    base = models.adapter_base(adapter)
    if base is None or model_folder(str(base)):
        return load_reward_model(path, **loading)
    model = read_adapter(load_reward_model(str(base), new_head=True, **loading), adapter, trained)
    return _with_scale(model, resolve(path))


def _with_scale(model: nn.Module, folder: Path) -> nn.Module:
    """Take over what R's folder says of its scores and its padding, and its base does not."""
    saved = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    scale = {name: value for name, value in vars(saved).items() if name in SCALE}
    model.config.update(scale)
    model.config.get_text_config().pad_token_id = saved.get_text_config().pad_token_id
    return model


def load_model_reward(
    path: str, clip: float | None = None, *, adapted: bool = False, **loading: Any
) -> ModelReward:
    """The reward model as a reward function: its own tokenizer, normalised by its saved scores.

    Args:
        adapted: read it by `adapted_reward_model`.
    Raises:
        ValueError: config.json has no score_mean and score_std, so scores have no known scale.
    """
    model = (adapted_reward_model if adapted else load_reward_model)(path, **loading)
    return as_reward(to_device(model), path, clip)


def as_reward(model: nn.Module, path: str, clip: float | None) -> ModelReward:
    """The model of a folder, loaded or outlined, as a reward."""
    for name in SCALE:
        if not hasattr(model.config, name):
            raise ValueError(
                f"{path}: config.json has no {name}, so its scores cannot be normalised. Train the "
                "reward model with recipes/reward_model.py, or write the two numbers there."
            )
    mean, std = scale_of(model)
    return ModelReward(model, load_tokenizer(path), mean=mean, std=std, clip=clip)


def prompts_to_score(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, stage: RewardModelArguments
) -> list[Prompt]:
    """Return the different prompts of some pairs that M1 has room to answer.

    Raises:
        ValueError: none has.
    """
    prompts = list({json.dumps(p): p for p in pairs["prompt"]}.values())
    room = models.room_for(stage.model, stage.score_max_new_tokens)
    if room is None:
        return prompts[: stage.score_samples]
    fitting = [prompt for prompt in prompts if len(prompt_ids(prompt, tokenizer)) <= room]
    count, tokens = len(prompts), stage.score_max_new_tokens
    if not fitting:
        raise ValueError(
            f"score_max_new_tokens: got {tokens}, which leaves {room} tokens of {stage.model}'s "
            f"context for a prompt: too few for each of {count}. Lower it."
        )
    if dropped := count - len(fitting):
        told = f"{dropped} of {count} prompts leave no room for {tokens} tokens"
        print(f"{told} and do not count in score_mean", flush=True)
    return fitting[: stage.score_samples]


@torch.no_grad()
def record_scores(trainer, prompts: Sequence[Prompt], stage: RewardModelArguments) -> dict:
    """Save mean and standard deviation of R's score on M1's answers in R's config.

    PPO normalises the reward with them, so that a reward of 0 is what M1 gets on average.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    dtype = getattr(torch, stage.dtype)
    answers = sample(
        to_device(load_policy(stage.model, tokenizer, dtype=dtype)),  # gone before R is held whole
        tokenizer,
        prompts,
        n=-(-stage.score_samples // len(prompts)),
        seed=trainer.args.seed,
        max_new_tokens=stage.score_max_new_tokens,
    )
    owners = [p for p, group in zip(prompts, answers, strict=True) for _ in group]
    texts = [answer for group in answers for answer in group]
    with gathered(model):
        scores = ModelReward(model.eval(), tokenizer)(owners, texts)
    mean, std = float(np.mean(scores)), float(np.std(scores))
    shown = zip(owners, texts, scores, strict=True)
    rows = [{"prompt": text_of(p), "completion": a, "score": f"{s:.3f}"} for p, a, s in shown]
    log_samples(trainer.args, trainer.state.global_step, rows)
    if not std > 0:
        raise ValueError(
            f"R gives every answer the score {mean}: it has learned nothing. Train it longer or "
            "raise its learning_rate."
        )
    model.config.score_mean, model.config.score_std = mean, std
    return {"score_mean": mean, "score_std": std, "score_samples": len(scores)}
