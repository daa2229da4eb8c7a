"""preferences: M1's completions, labelled by unit tests or queued for people -> pairs.

    accelerate launch recipes/preferences.py                         # settings: preferences.yaml
    accelerate launch recipes/preferences.py --samples_per_prompt 8  # PreferencesArguments

Reads   runs/m1; data_cards/*.md of type prompt-only, with tests where `label_by` is unit_tests.
Writes  runs/prefs: train.jsonl, test.jsonl, README.md and test.md (their cards), manifest.json;
        unlabelled.jsonl for `python -m codexhf.label` where people label.
"""

from codexhf.arguments import PreferencesArguments
from codexhf.launch import importing, launch
from codexhf.parsing import parse


def main(argv=None):
    (stage,) = parse((PreferencesArguments,), __file__, argv)
    with importing():  # late: what parse() refuses is refused at once
        from codexhf.adapters import loading
        from codexhf.data import load_tasks
        from codexhf.execution import check_isolation
        from codexhf.models import load_policy, room_for, to_device
        from codexhf.preferences import make_pairs
        from codexhf.run import run_task
        from codexhf.tokenizer import load_tokenizer
    check_isolation(stage.unsafe_exec)
    tokenizer = load_tokenizer(stage.model)
    tasks = load_tasks(
        stage.prompt_cards,
        tokenizer,
        exclude=stage.exclude_cards,
        max_rows=stage.max_prompts,
        max_prompt_tokens=room_for(stage.model, stage.max_new_tokens),
        runs_tests=stage.label_by == "unit_tests",
        seed=stage.seed,
    )
    model = to_device(load_policy(stage.model, tokenizer, **loading(stage)))
    return run_task(
        stage,
        lambda folder: make_pairs(model, tokenizer, tasks.dataset, stage, folder),
        data={"prompts": tasks},
        parents={"m1": stage.model, "rm": stage.reward_model},
    )


if __name__ == "__main__":
    launch(main)
