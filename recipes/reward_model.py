"""reward_model: M1 + preference pairs -> R, which scores answers.

    accelerate launch recipes/reward_model.py                       # uses reward_model.yaml
    accelerate launch recipes/reward_model.py --learning_rate 1e-4  # RewardModelArguments, RewardConfig

Reads   runs/m1; runs/prefs, or data_cards/*.md of type preference.
Writes  runs/rm: weights, score_mean and score_std in config.json, tokenizer, README.md, manifest.json.
"""

from trl import RewardConfig, RewardTrainer

from codexhf.arguments import RewardModelArguments, parse
from codexhf.data import load_pairs
from codexhf.models import load_reward_model, load_tokenizer
from codexhf.preferences import record_scores
from codexhf.run import run_stage


def main(argv=None):
    stage, training = parse((RewardModelArguments, RewardConfig), __file__, argv)
    tokenizer = load_tokenizer(stage.model)
    train = load_pairs(stage.train_cards, tokenizer, training.max_length)
    test = load_pairs(stage.eval_cards, tokenizer, training.max_length)
    model = load_reward_model(stage.model, new_head=True, seed=training.seed)
    trainer = RewardTrainer(
        model=model,
        args=training,
        train_dataset=train.dataset,
        eval_dataset=test.dataset,
        processing_class=tokenizer,
    )
    return run_stage(
        trainer,
        stage,
        training,
        data={"train": train, "test": test},
        parents={"m1": stage.model},
        finish=lambda trainer: record_scores(trainer, train.dataset, stage),
    )


if __name__ == "__main__":
    main()
