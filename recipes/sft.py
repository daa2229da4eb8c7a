"""sft: M0 + demonstrations -> M1, which answers prompts.

    accelerate launch recipes/sft.py                       # settings: sft.yaml
    accelerate launch recipes/sft.py --learning_rate 1e-5  # any field of SFTArguments or SFTConfig

Reads   runs/m0; data_cards/*.md with columns prompt, completion (text or messages).
Writes  runs/m1: weights, tokenizer, README.md, manifest.json (last).
"""

from codexhf.arguments import SFTArguments
from codexhf.launch import importing, launch
from codexhf.parsing import parse


def main(argv=None):
    with importing():
        from trl import SFTConfig
    stage, training = parse((SFTArguments, SFTConfig), __file__, argv)
    with importing():  # late: what parse() refuses is refused at once
        from trl import SFTTrainer

        from codexhf import faster, models
        from codexhf.adapters import loading, lora_config, merge_adapters
        from codexhf.data import load_demonstrations, load_tasks
        from codexhf.evaluation import PassAt1, demonstrations_of
        from codexhf.execution import check_isolation
        from codexhf.run import run_stage
        from codexhf.tokenizer import load_tokenizer
    check_isolation(stage.unsafe_exec)
    named, file, seed = stage.chat_template, training.chat_template_path, training.seed
    tokenizer = load_tokenizer(stage.model, chat_template=file, named_template=named)
    train = load_demonstrations(
        stage.train_cards,
        tokenizer,
        models.within_context(stage.model, training.max_length),
        exclude=stage.exclude_cards,
        weights=stage.weights,
        when_exhausted=stage.when_exhausted,
        completion_only=training.completion_only_loss,
        seed=seed,
    )
    room = models.room_for(stage.model, stage.eval_max_new_tokens)
    tasks = load_tasks(
        stage.eval_cards, tokenizer, max_rows=stage.eval_tasks, max_prompt_tokens=room, seed=seed
    )
    trainer = SFTTrainer(
        model=models.load_policy(stage.model, tokenizer, **loading(stage)),
        args=faster.cut_already(training),
        train_dataset=train.ids,
        eval_dataset=demonstrations_of(tasks, tokenizer),
        processing_class=tokenizer,
        peft_config=lora_config(stage, stage.lora_dropout),
        callbacks=[PassAt1(tasks.dataset, tokenizer, stage, seed)],
    )
    data, parents = {"train": train, "eval": tasks}, {"m0": stage.model}
    return run_stage(trainer, stage, training, data=data, parents=parents, finish=merge_adapters)


if __name__ == "__main__":
    launch(main)
