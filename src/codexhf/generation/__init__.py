"""Sample completions from any model; preferences, evaluation, callbacks and PPO sit above it.

`engines.py` has the interface and transformers' own two engines, `native.py` ours, which stops
computing a row when its completion ends: with completions of differing length that is several times
faster than `model.generate`. All sample from the model's own distribution, without the filters of
its generation config.
"""

import inspect
import warnings
from collections.abc import Sequence

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from codexhf.generation.engines import ContinuousBatchingEngine, Engine, HFEngine, Sampling
from codexhf.generation.native import NativeEngine, preallocated_cache
from codexhf.models import base_model, evaluating, uncompiled
from codexhf.prompts import decode, end_ids, left_pad, prompt_ids, vocabulary_size


def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence,
    *,
    n: int = 1,
    max_new_tokens: int = 96,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 42,
    progress: str | None = None,
) -> list[list[list[int]]]:
    """Return n completions, as token ids, for each prompt, in the order of the prompts.

    Prompts of similar length share a batch. The global random state is left alone.

    Args:
        prompts: text or messages, as `prompts.prompt_ids` takes them.
        temperature: of sampling; 0 is greedy.
        progress: what to write before a progress bar; none when None.
    Returns:
        [prompt][n] token ids; the last one is an end token unless max_new_tokens ended it.
    """
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    order = [i for i in sorted(range(len(ids)), key=lambda i: (len(ids[i]), i)) for _ in range(n)]
    ends = end_ids(tokenizer, model.generation_config)
    engine = engine_for(
        model, Sampling(max_new_tokens, ends, batch_size, vocabulary_size(tokenizer))
    )
    out: list[list[list[int]]] = [[] for _ in ids]
    batches = range(0, len(order), batch_size)
    with evaluating(model), uncompiled(model):
        for number, start in enumerate(tqdm(batches, desc=progress, disable=progress is None)):
            rows = order[start : start + batch_size]
            sampled = engine.generate(
                model,
                *left_pad([ids[i] for i in rows], model.device),
                seed=seed + 1_000_003 * number,
                temperature=temperature,
            )
            lengths = sampled.lengths.tolist()
            for i, row, length in zip(rows, sampled.responses.tolist(), lengths, strict=True):
                out[i].append(row[:length])
    return out


def sample(model, tokenizer, prompts: Sequence, **options) -> list[list[str]]:
    """Like `sample_ids`, decoded: [prompt][n] texts without special tokens."""
    groups = sample_ids(model, tokenizer, prompts, **options)
    return [decode(group, tokenizer) for group in groups]


def engine_for(
    model: nn.Module, sampling: Sampling, name: str = "native", cuda_graphs: bool = True
) -> Engine:
    """Return the engine of that name; where it cannot sample from the model, one that can.

    native and continuous_batching know attention caches alone.
    """
    wanted, reason = name, None
    if name in ("native", "continuous_batching"):
        try:
            preallocated_cache(base_model(model), 1)
        except ValueError as error:
            name, reason = "hf", str(error)
        if "past_key_values" not in inspect.signature(base_model(model).forward).parameters:
            name, reason = "hf", f"{type(base_model(model)).__name__} takes no cache of keys."
    if name != wanted:
        warnings.warn(f"{wanted!r} cannot sample: {reason} {name!r} samples instead.", stacklevel=3)
    return make_engine(name, sampling, cuda_graphs)


def make_engine(name: str, sampling: Sampling, cuda_graphs: bool = True) -> Engine:
    """Return the engine of that name, or say what is missing for it."""
    if name == "native":
        return NativeEngine(sampling, fixed_shapes=None if cuda_graphs else False)
    return (HFEngine if name == "hf" else ContinuousBatchingEngine)(sampling)
