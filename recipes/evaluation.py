"""evaluation: M0, M1, M2 and R -> the same held-out numbers for each model.

    accelerate launch recipes/evaluation.py                  # settings: evaluation.yaml
    accelerate launch recipes/evaluation.py --num_samples 8  # any field of EvaluationArguments

Reads   runs/m0, runs/m1, runs/m2, runs/rm; data_cards/*.md of held-out tasks and corpora.
Writes  runs/evaluation: answers.json, README.md, manifest.json (last) with every metric.
"""

from codexhf.arguments import EvaluationArguments
from codexhf.launch import importing, launch
from codexhf.parsing import parse


def main(argv=None):
    (stage,) = parse((EvaluationArguments,), __file__, argv)
    with importing():  # late: what parse() refuses is refused at once
        from codexhf.benchmarks import load_benchmarks
        from codexhf.data import load_heldout_texts, load_tasks
        from codexhf.evaluation import evaluate_models, parents_of
        from codexhf.execution import check_isolation
        from codexhf.models import room_for
        from codexhf.run import run_task
        from codexhf.tokenizer import load_tokenizer
    check_isolation(stage.unsafe_exec)
    tokenizer = load_tokenizer(stage.reference)
    tasks = load_tasks(
        stage.heldout_cards,
        tokenizer,
        max_rows=stage.max_tasks,
        max_prompt_tokens=room_for([stage.reference, *stage.models], stage.max_new_tokens),
        seed=stage.seed,
    )
    corpora = load_heldout_texts(stage.text_cards, max_rows=stage.max_documents)
    benchmarks = load_benchmarks(stage, tokenizer)
    return run_task(
        stage,
        lambda folder: evaluate_models(stage, tasks, corpora, benchmarks, folder),
        data={"tasks": tasks, **corpora, **benchmarks},
        parents=parents_of(stage),
    )


if __name__ == "__main__":
    launch(main)
