"""pretrain: corpora -> M0, a language model of text and code.

    accelerate launch recipes/pretrain.py                  # settings: pretrain.yaml
    accelerate launch recipes/pretrain.py --max_steps 500  # PretrainArguments, TrainingArguments

Reads   runs/tokenizer; data_cards/*.md of type language-modeling.
Writes  runs/m0: weights, tokenizer, README.md, manifest.json (last).
"""

from codexhf.arguments import PretrainArguments
from codexhf.launch import importing, launch
from codexhf.parsing import parse


def main(argv=None):
    with importing():
        from transformers import TrainingArguments
    stage, training = parse((PretrainArguments, TrainingArguments), __file__, argv)
    with importing():  # late: what parse() refuses is refused at once
        from transformers import Trainer

        from codexhf.adapters import merge_adapters, new_or_loaded_policy
        from codexhf.data import load_packed, load_packed_each
        from codexhf.evaluation import BitsPerByte
        from codexhf.run import run_stage
        from codexhf.tokenizer import load_tokenizer
        from codexhf.tokens import packed_collator
    tokenizer = load_tokenizer(stage.tokenizer)
    train = load_packed(
        stage.train_cards,
        tokenizer,
        stage.max_length,
        exclude=stage.exclude_cards,
        weights=stage.weights,
        when_exhausted=stage.when_exhausted,
        num_workers=training.dataloader_num_workers,
        seed=training.seed,
    )
    heldout = load_packed_each(
        stage.train_cards, tokenizer, stage.max_length, max_rows=stage.max_eval_rows
    )
    model = new_or_loaded_policy(stage, tokenizer, training.seed)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train.arrays,
        eval_dataset={name: part.arrays for name, part in heldout.items()},
        data_collator=packed_collator,
        processing_class=tokenizer,
        callbacks=[BitsPerByte(heldout, tokenizer)],
    )
    parents = {"tokenizer": stage.tokenizer, "base": stage.model}
    return run_stage(
        trainer, stage, training, data={"train": train}, parents=parents, finish=merge_adapters
    )


if __name__ == "__main__":
    launch(main)
