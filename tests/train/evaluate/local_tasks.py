"""Tasks for lm-eval whose data lies beside them: one of each kind of request, a group and a tag."""

import json
from pathlib import Path
from typing import Any

TALES = [
    "The fox saw the grapes and jumped, and could not reach them.",
    "A crow that was thirsty threw stones into a jar until the water rose.",
    "Two frogs fell into the milk; one of them went on swimming.",
    "The tortoise came first, since the hare had slept: naïve — “quoted”, ☃ and 你好.",
]
LONG = (
    "An ant carried grain all summer, while a cricket sang of other things; in winter it asked for some, and was told "
    "to dance. Whoever has heard of it knows why, and whoever has not may ask an ant, or wait for a winter."
)
QUESTIONS = [
    {"question": "What did the fox want?", "choices": ["grapes", "a jar of milk", "to sleep"], "answer": 0},
    {"question": "Who won? ", "choices": ["the hare", "the tortoise"], "answer": 1},
    {"question": "", "choices": ["The ant", "A cricket that sang", "</s>"], "answer": 2},
    {"question": f"{LONG} {LONG} Who was told to dance?", "choices": ["an ant", "the cricket", "a crow"], "answer": 1},
    {"question": "<s>How many frogs?\n", "choices": ["one", "two", "2"], "answer": 1},
]
PROMPTS = ["The fox", "A crow threw ", f"{LONG} {LONG} And then", "Two frogs\n", "</s>What"]
COMPLETED = {"until": ["e"], "max_gen_toks": 24, "do_sample": False}
NAMES = ("own_group", "own_cloze", "own_text", "own_answer", "own_filtered")
"""One of each kind; `own_group` has two of multiple choice."""


def write_tasks(folder: Path, answers: dict[str, str]) -> Path:
    """Write tasks and their data.

    Args:
        folder: is made.
        answers: the right answer to some of the prompts.
    """
    clozes = [{"start": tale[: len(tale) // 2], "end": tale[len(tale) // 2 :]} for tale in TALES]
    clozes.append({"start": f"{LONG} {LONG}", "end": " Or a cricket."})
    prompts = [{"prompt": prompt, "answer": answers.get(prompt, "no such text")} for prompt in PROMPTS]
    folder.mkdir()
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    _write(folder, "own_choice", QUESTIONS, choice)
    _write(folder, "own_first", QUESTIONS[:2], {**choice, "num_fewshot": 0, "tag": "own_tag"})
    cloze = {"doc_to_text": "{{start}}", "doc_to_target": "{{end}}", "tag": "own_tag"}
    metrics = [{"metric": name, "aggregation": how} for name, how in (("perplexity", "perplexity"), ("acc", "mean"))]
    _write(folder, "own_cloze", clozes, {"output_type": "loglikelihood", **cloze, "metric_list": metrics})
    text = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": name} for name in _BY_LENGTH]}
    texts = [{"text": text} for text in (*TALES, f"{LONG} {LONG}")]
    _write(folder, "own_text", texts, {"output_type": "loglikelihood_rolling", **text})
    answer = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": COMPLETED,
        "metric_list": [{"metric": "exact_match"}],
    }
    _write(folder, "own_answer", prompts, answer)
    strict = {"name": "strict", "filter": [{"function": "take_first"}]}
    lower = {"name": "lower", "filter": [{"function": "lowercase"}, {"function": "take_first"}]}
    _write(folder, "own_filtered", prompts, {**answer, "filter_list": [strict, lower]})
    _write(folder, "own_beams", prompts, {**answer, "generation_kwargs": {"num_beams": 4}})
    _write(folder, "own_far", prompts, {**answer, "generation_kwargs": {"max_gen_toks": 96}})
    _write(folder, "own_code", prompts, {**answer, "unsafe_code": True})
    _write(folder, "own_long", [{"start": "It", "end": LONG * 2}], {"output_type": "loglikelihood", **cloze})
    _write(folder, "own_lost", prompts, answer)
    (folder / "own_lost.json").unlink()
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "own_group", "task": ["own_choice", "own_first"], "aggregate_metric_list": aggregate}
    (folder / "own_group.yaml").write_text(json.dumps(group))  # JSON is YAML
    return folder


_BY_LENGTH = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def _write(folder: Path, name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    data = folder / f"{name}.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    where = {"dataset_path": "json", "dataset_kwargs": read, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **where, **settings}))
