"""The tokenizer: trained on corpora, or loaded with what every stage needs of one."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from codexhf.arguments import TokenizerArguments
from codexhf.data import Data
from codexhf.hub import resolve
from codexhf.prompts import end_ids, text_of

GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of tokenizers that are all in their tokenizer.json."""

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END +
    "{% else %}" + USER + "{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip


TEMPLATES = {
    "plain": "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}",
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
"""Chat templates by name, for base models without one of their own."""


def new_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with distinct pad and end tokens and a chat template.

    Byte-level: every text encodes and decodes to itself. Deterministic for equal texts in order.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Digits one by one, so that numbers are spelled the same everywhere.
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(
    stage: TokenizerArguments, corpora: Data, chats: Data, heldout: dict[str, Data], folder: Path
) -> dict:
    """Train the stage's tokenizer, save it, and measure bytes per token on held-out documents."""
    texts, left = [], stage.max_characters
    for row in corpora.dataset:
        texts.append(row["text"][:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    for row in chats.dataset:
        texts += [text_of(row["prompt"]), text_of(row["completion"])]
    print(
        f"learning {stage.vocab_size} tokens from {sum(map(len, texts)):,} characters", flush=True
    )
    tokenizer = new_tokenizer(texts, stage.vocab_size)
    tokenizer.save_pretrained(folder)
    metrics: dict = {"vocab_size": len(tokenizer)}
    for card, data in heldout.items():
        documents = data.dataset["text"]
        tokens = sum(len(ids) for ids in tokenizer(list(documents))["input_ids"])
        metrics[f"bytes_per_token_{card}"] = sum(len(t.encode()) for t in documents) / tokens
    return metrics


def load_tokenizer(
    path: str,
    padding_side: str = "right",
    *,
    chat_template: str | None = None,
    named_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a pad token.

    Where none is set, a special token that nothing else uses pads, or else the end token: no stage
    takes padding for text, since masks come from lengths.

    Args:
        chat_template: file of a template in the place of the tokenizer's own.
        named_template: name of one of TEMPLATES instead.
    Raises:
        ValueError: no end token, without which a model would never learn to stop; no such template.
    """
    folder = resolve(path)
    # AutoTokenizer takes the class of the model's type, with tokens of its own, whatever was saved.
    as_saved = get_tokenizer_config(folder).get("tokenizer_class") in GENERIC
    loader = PreTrainedTokenizerFast if as_saved else AutoTokenizer
    tokenizer = loader.from_pretrained(folder, padding_side=padding_side, trust_remote_code=False)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{path}: the tokenizer has no eos_token. Set one and save it: "
            "tokenizer.eos_token = ...; tokenizer.save_pretrained(...)"
        )
    if named_template == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        raise ValueError(
            f"chat_template: got chatml, but the vocabulary of {path} has no <|im_end|>, so no "
            "answer would end. Use plain."
        )
    if named_template and chat_template:
        raise ValueError(
            f"chat_template: got {named_template!r} and chat_template_path {chat_template!r}, "
            "expected one of them."
        )
    if named_template or chat_template:
        tokenizer.chat_template = TEMPLATES.get(named_template) or read_template(chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = spare_token(tokenizer) or tokenizer.eos_token
        print(f"{path}: no pad token; {tokenizer.pad_token!r} pads", flush=True)
    return tokenizer


def reads_ids_of(path: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of `tokenizer` mean the same to the model of a folder or Hub id.

    A folder without a tokenizer is taken to have that one: PPO saves its critic so.
    """
    if not get_tokenizer_config(resolve(path)):
        return True
    return load_tokenizer(path).get_vocab().items() <= tokenizer.get_vocab().items()


def read_template(path: str) -> str:
    """Return the text of a chat template's file.

    Raises:
        ValueError: not a file of TRL's two suffixes, with what was probably meant.
    """
    file = Path(path)
    if file.is_file() and file.suffix in (".jinja", ".j2"):
        return file.read_text(encoding="utf-8")
    inside = file / "chat_template.jinja"
    meant = f" Did you mean {str(inside)!r}?" if inside.is_file() else ""
    raise ValueError(
        f"chat_template_path: got {path!r}, expected a .jinja file, such as the one that a "
        f"tokenizer's folder has. `chat_template: plain` needs no file.{meant}"
    )


def spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that neither begins nor ends a text nor stands in the chat template."""
    taken = {*end_ids(tokenizer), tokenizer.bos_token_id}
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in sorted(special - taken)]
    return next((t for t in tokens if t not in (tokenizer.chat_template or "")), None)
