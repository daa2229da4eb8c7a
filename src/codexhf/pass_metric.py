"""pass@k as a metric of the library `evaluate`, whose import is slow: hence a file of its own."""

import json

import datasets
import evaluate

from codexhf.completions import judge
from codexhf.passes import summarise


class PassAtK(evaluate.Metric):
    """pass@k over tasks, with the code run in the sandbox.

    compute(predictions=[[code, ...], ...], references=[{"tests": json, "entry_point": name}, ...],
    k=[1, 4]) returns pass@k for each k, its 95% interval, and the verdict counts.
    """

    def __init__(self, timeout_s: float = 3.0, progress: str | None = None, **kwargs):
        self.timeout_s, self.progress = timeout_s, progress
        super().__init__(config_name="default", keep_in_memory=True, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Chen et al. 2021, arXiv:2107.03374",
            inputs_description="predictions: n programs per task; references: tests per task",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": {
                        "tests": datasets.Value("string"),
                        "entry_point": datasets.Value("string"),
                    },
                }
            ),
        )

    def _compute(self, predictions, references, k=(1,)):
        tests = [json.loads(r["tests"]) for r in references]
        names = [r["entry_point"] for r in references]
        verdicts = judge(predictions, tests, names, self.timeout_s, self.progress)
        return summarise(verdicts, k)
