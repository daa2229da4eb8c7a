"""One rendering and one end, over the kinds of tokenizers that people bring.

python -m pytest tests/test_prompts.py
"""

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from codexhf import prompts
from codexhf.generation import sample_ids
from tokenizer_kinds import every_kind

KINDS = every_kind()
CHATS = [name for name, tokenizer in KINDS.items() if tokenizer.chat_template]
TEXTS = [name for name in KINDS if name not in CHATS]
ASKED = "Write a function that adds."
ANSWER = "def add(a, b):\n    return a + b"


def prompt_of(tokenizer):
    return prompts.in_form(ASKED, tokenizer)


def tiny(tokenizer, more=0):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + more,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    ).eval()


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_trained_on_the_context_that_it_is_sampled_in(name):
    tokenizer = KINDS[name]
    prompt = prompt_of(tokenizer)
    start = prompts.prompt_ids(prompt, tokenizer)
    ids, length = prompts.answered_ids(prompt, ANSWER, tokenizer)
    assert ids[:length] == start and len(ids) > length
    assert prompts.decode([ids[length:]], tokenizer)[0].strip() == ANSWER
    assert ids[-1] in prompts.end_ids(tokenizer)
    assert sum(token in prompts.end_ids(tokenizer) for token in ids[length:]) == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_marked_once_at_its_beginning_and_never_ended(name):
    tokenizer = KINDS[name]
    ids = prompts.prompt_ids(prompt_of(tokenizer), tokenizer)
    assert tokenizer.eos_token_id not in ids[-1:]
    assert ids.count(tokenizer.bos_token_id) == (
        "bos" in name or name in ("sentencepiece", "pad is eos", "no pad", "left padding")
    )


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("no pad",)])
def test_sft_learns_the_same_tokens_as_trl_would(name, tmp_path):
    """TRL's own rendering is the oracle, where it has the context of sampling and one end."""
    tokenizer = KINDS[name]
    prompt = prompt_of(tokenizer)
    completion = ANSWER
    if tokenizer.chat_template:
        completion = [{"role": "assistant", "content": ANSWER}]
    trainer = SFTTrainer(
        model=tiny(tokenizer),
        args=SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": completion}]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]["input_ids"]
    ours, _ = prompts.answered_ids(prompt, ANSWER, tokenizer)
    if name == "think in the generation prompt":  # TRL trains on a context that is never sampled
        assert theirs != ours
        return
    if name in ("eos", "bos and eos"):  # TRL writes two ends
        assert theirs == [*ours, tokenizer.eos_token_id]
        return
    if name == "no special token at the end":  # a model of TRL's would never stop
        assert [*theirs, tokenizer.eos_token_id] == ours
        return
    assert theirs[: len(ours)] == ours
    assert tokenizer.decode(theirs[len(ours) :]).strip() == ""  # what a template writes behind


@pytest.mark.parametrize("name", ["chatml", "a system turn of its own", "added tokens"])
def test_sampling_stops_where_the_template_closes_the_turn(name):
    tokenizer = KINDS[name]
    model = tiny(tokenizer)
    closing = prompts.end_ids(tokenizer)
    assert len(closing) == 2 and tokenizer.eos_token_id in closing
    end = next(token for token in closing if token != tokenizer.eos_token_id)
    with torch.no_grad():  # a model that always closes the turn
        model.lm_head = torch.nn.Linear(16, len(tokenizer))
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[end] = 50.0
    (group,) = sample_ids(model, tokenizer, [prompt_of(tokenizer)], n=2, max_new_tokens=5)
    assert group == [[end], [end]]


def test_every_end_token_of_the_generation_config_ends_an_answer():
    tokenizer = KINDS["plain"]
    config = GenerationConfig(eos_token_id=[9, tokenizer.eos_token_id])
    assert prompts.end_ids(tokenizer, config) == tuple(sorted({9, tokenizer.eos_token_id}))
    assert prompts.end_ids(tokenizer, GenerationConfig(eos_token_id=7)) == tuple(
        sorted({7, tokenizer.eos_token_id})
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("x", "x"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "text", "text": None}], ""),
        ([], ""),
    ],
)
def test_content_text(content, text):
    assert prompts.content_text(content) == text
    assert prompts.text_of([{"role": "user", "content": content}]) == text


@pytest.mark.parametrize("content", [[{"type": "image_url"}], 3, {"type": "text"}])
def test_other_content_is_refused_by_its_type(content):
    with pytest.raises(ValueError, match="content: got"):
        prompts.content_text(content)
    assert prompts.text_of([{"role": "user", "content": content}]) is None


def test_in_form_follows_the_tokenizer():
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert prompts.in_form("a", KINDS["plain"]) == "a"
    assert prompts.in_form("a", KINDS["chatml"]) == [{"role": "user", "content": "a"}]
    assert prompts.in_form(messages, KINDS["chatml"]) is messages
    assert prompts.in_form(messages, KINDS["plain"]) == "a\nb"


def test_padding():
    ids, mask = prompts.left_pad([[1, 2], [3]], "cpu")
    assert ids.tolist() == [[1, 2], [0, 3]] and mask.tolist() == [[True, True], [False, True]]
    ids, mask = prompts.right_pad([[1, 2], [3]], "cpu")
    assert ids.tolist() == [[1, 2], [3, 0]] and mask.tolist() == [[True, True], [True, False]]
