"""lm-eval's `local-completions` on a task of this file: `lm_eval_task.py URL MODEL TASK.json FOLDER`.

TASK.json: documents with `question`, `choices` and `gold`. Prints every log-likelihood and greedy flag, the metrics, and
what it generated.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

CHOICE = """
task: ganglion_choice
dataset_path: json
dataset_kwargs:
  data_files: {file}
  cache_dir: {cache}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
metadata:
  version: 1
"""
UNTIL = """
task: ganglion_until
dataset_path: json
dataset_kwargs:
  data_files: {file}
  cache_dir: {cache}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
metadata:
  version: 1
"""


def main() -> None:
    """Run both tasks."""
    url, model, file, folder = sys.argv[1:]
    tasks = Path(folder) / "tasks"
    tasks.mkdir()
    for name, text in (("choice", CHOICE), ("until", UNTIL)):
        text = text.format(file=file, cache=Path(folder) / "cache")
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    lm = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=model, num_concurrent=4, max_length=1024,
        batch_size=2, max_retries=1,
    )  # fmt: skip
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["ganglion_choice", "ganglion_until"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = results["samples"]
    told = {
        "backend": lm.tokenizer_backend,
        "is_tokenized": lm.tokenized_requests,
        "scores": [
            [
                [float(score), str(is_greedy) == "True"]
                for score, is_greedy in sample["filtered_resps"]
            ]
            for sample in sorted(samples["ganglion_choice"], key=lambda sample: sample["doc_id"])
        ],
        "accuracy": results["results"]["ganglion_choice"]["acc,none"],
        "texts": [
            sample["filtered_resps"][0]
            for sample in sorted(samples["ganglion_until"], key=lambda sample: sample["doc_id"])
        ],
    }
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
