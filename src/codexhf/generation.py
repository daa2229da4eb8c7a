"""Sample completions from a policy, in batches. Used by preferences, evaluation and callbacks.

PPO's rollouts have their own engine (`ppo/rollout.py`): they need log-probabilities and a
wrapped, possibly sharded model; this here is for plain models.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from codexhf.data import render_prompt


@torch.no_grad()
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

    Prompts of similar length share a batch, left-padded. Greedy when temperature is 0. The model's
    own generation defaults (top-k and the like) do not apply: the distribution is the model's.

    Args:
        prompts: strings or lists of messages; rendered with the chat template.
        progress: what to write before a progress bar; none when None.
    Returns:
        [prompt][n] token ids; the last one is the end token unless max_new_tokens ended it.
    """
    texts = [render_prompt(prompt, tokenizer) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = [i for i in sorted(range(len(texts)), key=lambda i: (lengths[i], i)) for _ in range(n)]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0 if temperature > 0 else None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out: list[list[list[int]]] = [[] for _ in texts]
    with for_generation(model, tokenizer), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(
            range(0, len(order), batch_size), desc=progress, disable=progress is None
        ):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
                return_token_type_ids=False,
            ).to(model.device)
            ids = model.generate(**batch, generation_config=config)
            for i, new in zip(rows, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                if tokenizer.eos_token_id in new:
                    new = new[: new.index(tokenizer.eos_token_id) + 1]
                out[i].append(new)
    return out


def sample(model, tokenizer, prompts: Sequence, **options) -> list[list[str]]:
    """Like `sample_ids`, decoded: [prompt][n] texts without special tokens."""
    groups = sample_ids(model, tokenizer, prompts, **options)
    return [tokenizer.batch_decode(group, skip_special_tokens=True) for group in groups]


@contextmanager
def for_generation(model, tokenizer):
    """Evaluation mode, cache on, left padding; everything as it was afterwards."""
    training, side, cache = model.training, tokenizer.padding_side, model.config.use_cache
    generation = model.generation_config
    model.eval()
    model.config.use_cache = True
    model.generation_config = GenerationConfig()
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        model.train(training)
        model.config.use_cache = cache
        model.generation_config = generation
        tokenizer.padding_side = side
