"""tokenizer: corpora -> a byte-level BPE tokenizer with a chat template.

    accelerate launch recipes/tokenizer.py                    # settings: tokenizer.yaml
    accelerate launch recipes/tokenizer.py --vocab_size 8192  # any field of TokenizerArguments

Reads   data_cards/*.md of type language-modeling (and prompt-completion for chat_cards).
Writes  runs/tokenizer: tokenizer, README.md, manifest.json (last).
"""

from codexhf.arguments import TokenizerArguments
from codexhf.launch import importing, launch
from codexhf.parsing import parse


def main(argv=None):
    (stage,) = parse((TokenizerArguments,), __file__, argv)
    with importing():  # late: what parse() refuses is refused at once
        from codexhf.data import holding_out, load_heldout_texts, load_split
        from codexhf.run import run_task
        from codexhf.tokenizer import train_tokenizer
    corpora = load_split(
        stage.train_cards,
        "language-modeling",
        exclude=stage.exclude_cards,
        weights=stage.weights,
        when_exhausted=stage.when_exhausted,
        count=lambda row: len(row["text"]),
        seed=stage.seed,
    )
    chats = load_split(stage.chat_cards, "prompt-completion", exclude=stage.exclude_cards)
    heldout = load_heldout_texts(holding_out(stage.train_cards))
    return run_task(
        stage,
        lambda folder: train_tokenizer(stage, corpora, chats, heldout, folder),
        data={"train": corpora, "chats": chats},
        parents={},
    )


if __name__ == "__main__":
    launch(main)
