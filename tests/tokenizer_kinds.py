"""Tokenizers of the kinds that people bring, made in a moment: how they mark, pad and render."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "Write a function that adds two numbers, please.",
    "user assistant system model think Answer:",
] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "no newline behind the end": CHATML.replace("<|im_end|>\n", "<|im_end|>"),
    "a system turn of its own": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n"
        "{% endif %}" + CHATML
    ),
    "ends with eos": CHATML.replace("<|im_end|>\n", "</s>"),
    "writes bos": "<s>" + CHATML,
    "think in the generation prompt": CHATML.replace(
        "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif"
    ),
    "refuses system": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHATML
    ),
    "demands alternation": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
    ),
    "no special token at the end": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}


def byte_level(bos=False, eos=False) -> Tokenizer:
    """A byte-level BPE that adds the marks asked for around every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos or eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
        ids = [(mark, core.token_to_id(mark)) for mark in ("<s>", "</s>")]
        core.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=single, special_tokens=ids),
            ]
        )
    return core


def sentencepiece() -> Tokenizer:
    """BPE over words that carry a leading space, one before the text as well, and a BOS."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<unk>", *SPECIAL, *bytes_], show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core


def wrap(core: Tokenizer, **options) -> PreTrainedTokenizerFast:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | options
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        **{name: value for name, value in settings.items() if value is not None},
    )


def every_kind() -> dict[str, PreTrainedTokenizerFast]:
    """Name -> tokenizer."""
    kinds = {
        "plain": wrap(byte_level()),
        "bos": wrap(byte_level(bos=True)),
        "eos": wrap(byte_level(eos=True)),
        "bos and eos": wrap(byte_level(bos=True, eos=True)),
        "sentencepiece": wrap(sentencepiece()),
        "pad is eos": wrap(byte_level(bos=True), pad_token="</s>"),
        "no pad": wrap(byte_level(bos=True), pad_token=None),
        "left padding": wrap(byte_level(bos=True), padding_side="left"),
    }
    for name, template in TEMPLATES.items():
        kinds[name] = wrap(byte_level(bos="bos" in name), chat_template=template)
    kinds["sentencepiece chat"] = wrap(sentencepiece(), chat_template=CHATML)
    kinds["eos is the turn's end"] = wrap(
        byte_level(), eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    kinds["added tokens"] = wrap(byte_level(), chat_template=CHATML.replace("<|im_", "<|turn_"))
    kinds["added tokens"].add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|turn_start|>"), AddedToken("<|turn_end|>")]}
    )
    return kinds
