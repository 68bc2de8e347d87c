"""lm-eval's tasks on models of ours: the numbers that it has of the exported models through transformers."""

import json
import random

import numpy as np
import pytest
from tokenizers import processors

from conf.eval_settings import task_specs
from launch.cli import main
from model.generate import Sampling
from model.problems import BadInput
from parallel.layout import Layout
from parallel.scoring import Score
from tests.faults.tokenizer_kinds import KINDS as FOREIGN
from tests.model.test_huggingface import Drawn
from tests.ranks import run_ranks
from tests.shapes import preset, small
from tests.train.evaluate.local_tasks import COMPLETED, PROMPTS, TALES, write_tasks
from train.data.tokenizer import size, train_tokenizer
from train.pretrained import Source, open_source, write_checkpoint

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'deepnarrow[eval]'")
pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tests.train.evaluate.harnessed import by_lm_eval, opened, ours, scorer_of, speech_of
from train.evaluate import harness
from train.evaluate.harness_model import Generation, HarnessModel
from train.evaluate.lead import Leader
from train.evaluate.tasks import Asked, check, open_task


def _own():
    """As a run trains it: nothing stands before a text, and the end token begins one."""
    return train_tokenizer(iter(TALES * 3), 400), None


def _begins():
    """Llama 3's kind: byte-level, with a token before every text."""
    made = FOREIGN["byte-level BPE"]()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def _llama_2():
    """Llama 2's kind: a space before every text, bytes for unknown characters, and no token that begins one named."""
    return FOREIGN["BPE, prepend and byte fallback"](), {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
    }


TOKENIZERS = {"own": _own, "begins": _begins, "llama_2": _llama_2}
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of each tokenizer a checkpoint, its export, lm-eval's model of that, and tasks of which it knows an answer."""
    folder, theirs = tmp_path_factory.mktemp("models"), {}
    for kind, make in TOKENIZERS.items():
        tokenizer, config = make()
        own = folder / kind / "tokenizer"
        own.mkdir(parents=True)
        tokenizer.save(str(own / "tokenizer.json"))
        if config:
            (own / "tokenizer_config.json").write_text(json.dumps(config))
        weights = Drawn(small(vocab_size=size(tokenizer), max_seq_len=96))
        weights.tied = False
        checkpoint = folder / kind / "step-00000000"
        checkpoint.mkdir()
        write_checkpoint(weights, Source(own, weights, own / "tokenizer.json", None), checkpoint, 10**9)
        assert main(["export", str(checkpoint), str(folder / kind / "hf")]) == 0
        theirs[kind] = HFLM(pretrained=str(folder / kind / "hf"), dtype="float32", device="cpu", batch_size=3)
        asked = [Instance("generate_until", {}, (prompt, COMPLETED), 0) for prompt in PROMPTS[:2]]
        write_tasks(folder / kind / "tasks", dict(zip(PROMPTS, theirs[kind].generate_until(asked), strict=False)))
    return folder, theirs


@pytest.fixture(scope="module")
def expected(models):
    folder, theirs = models
    return {kind: by_lm_eval(lm, folder / kind / "tasks") for kind, lm in theirs.items()}


@pytest.fixture(scope="module")
def on_four_ranks(models):
    found, *others = run_ranks("tests.train.evaluate.harnessed", 4, models[0])
    assert others == [{kind: {} for kind in TOKENIZERS}] * 3
    return found


@pytest.fixture(scope="module")
def own(models):
    """The checkpoint, the tasks, how it is spoken to, and what asks it, on one process."""
    checkpoint = models[0] / "own" / "step-00000000"
    return checkpoint, models[0] / "own" / "tasks", speech_of(checkpoint), leader_of(checkpoint)


def leader_of(checkpoint):
    return Leader(scorer_of(checkpoint, Layout(1, 1, 1)), open_source(checkpoint).weights.config, None)


def approximately(value):
    return pytest.approx(value, rel=1e-6, abs=1e-4)


def assert_same(found, expected):
    """The answers to each question, and what is made of them; a sum of 1,300 nats is rounded at its eighth digit."""
    for task, samples in expected["samples"].items():
        for got, wanted in zip(found["samples"][task], samples, strict=True):
            for one, other in zip(got, wanted, strict=True):
                if isinstance(other, list):
                    assert one == [approximately(other[0]), other[1]], task
                else:
                    assert one == (other if isinstance(other, str) else approximately(other)), task
    assert found["results"].keys() == expected["results"].keys()
    for task, results in expected["results"].items():
        assert found["results"][task] == pytest.approx(results, rel=1e-4), task
    figures = {f"{name}/{metric}": value for name, of in found["figures"].items() for metric, value in of.items()}
    results = {
        task: {name.split(",")[0]: of for name, of in all_.items()} for task, all_ in expected["results"].items()
    }
    wanted = {
        "own_group/acc": results["own_group"]["acc"],
        "own_group/own_choice/acc_norm": results["own_choice"]["acc_norm"],
        "own_group/own_first/acc": results["own_first"]["acc"],
        "own_cloze/perplexity": results["own_cloze"]["perplexity"],
        "own_text/bits_per_byte": results["own_text"]["bits_per_byte"],
        "own_text/word_perplexity": results["own_text"]["word_perplexity"],
        "own_answer/exact_match": 0.4,
        "own_filtered/exact_match/strict": 0.4,
    }
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert "own_filtered/exact_match/lower" in figures


@every_tokenizer
def test_one_process_has_the_numbers_of_transformers(kind, models, expected):
    checkpoint = models[0] / kind / "step-00000000"
    assert_same(ours(leader_of(checkpoint), checkpoint, models[0] / kind / "tasks"), expected[kind])


@every_tokenizer
def test_stages_on_shared_matrices_have_the_numbers_of_transformers(kind, on_four_ranks, expected):
    assert_same(on_four_ranks[kind], expected[kind])


def test_tokenizers_differ_in_what_stands_before_a_text(models, expected):
    answers = {kind: json.dumps(of["samples"]) for kind, of in expected.items()}
    assert len(set(answers.values())) == len(TOKENIZERS)
    encoded = {kind: harness_model(models, kind).tok_encode("<s>a")[:2] for kind in TOKENIZERS}
    begins = encoded["begins"]
    assert begins[0] == 1 != begins[1]  # once, by its name; not again by the tokenizer
    assert encoded["llama_2"] == [1, 1]  # no token that begins a text is named, so that it is put there as well


def harness_model(models, kind):
    return HarnessModel(speech_of(models[0] / kind / "step-00000000"))


def test_examples_and_the_limit_are_those_of_lm_eval(models, own):
    _, tasks, speech, leader = own
    theirs = by_lm_eval(models[1]["own"], tasks, ("own_group",), num_fewshot=2, limit=3)
    task = opened("own_group", tasks, speech, shots=2, limit=3)
    asked = [instance.args[0] for instance in task._loaded["tasks"]["own_choice"].instances]
    assert len(asked) == 3 + 2 + 3 and all(text.count("\n\n") >= 2 for text in asked)
    figures = task.evaluate(leader)
    assert figures["own_choice/acc"] == theirs["results"]["own_choice"]["acc,none"]
    assert figures["acc"] == pytest.approx(theirs["results"]["own_group"]["acc,none"])
    assert task.notes == [
        "own_choice: 3 of 8 texts are cut from the left to the model's context of 96 tokens, as lm-eval cuts them",
        "own_first: 0 examples before each question, as the task itself says, whatever is asked for",
    ]


class Sure:
    """What asks a model that is sure of all it is asked."""

    def score(self, requests):
        return [Score(0.0, True) for _ in requests]


def test_an_evaluation_reads_and_writes_nothing_again_draws_nothing_and_keeps_no_answers(own, monkeypatch):
    _, tasks, speech, leader = own
    task = opened("own_cloze", tasks, speech)
    random.seed(7), np.random.seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = task.evaluate(leader)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.fewshot_context", refuse)
    monkeypatch.setattr(HarnessModel, "tok_encode", refuse)
    assert task.evaluate(Sure()) == {"acc": 1.0, "perplexity": 1.0} != first
    assert task.evaluate(leader) == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def refuse(*arguments, **settings):
    raise AssertionError("is not to be called")


def test_a_task_that_was_checked_is_not_loaded_again(own, monkeypatch):
    _, tasks, speech, _ = own
    (spec,), _ = task_specs(["lm_eval/own_text"])
    asked = Asked.of(preset(f"eval.include_path={tasks}", "eval.tasks=[lm_eval/own_text]"))
    assert check([spec], asked) == []
    with monkeypatch.context() as during:
        during.setattr("datasets.load_dataset", refuse)
        assert open_task(spec, asked, speech).name == "lm_eval/own_text"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_tekst", "lm_eval/own_tekst: lm-eval knows no such task in TASKS or of its own; lm_eval/own_text "),
        ("own_lost", "lm_eval/own_lost: cannot be loaded (FileNotFoundError: Unable to find 'TASKS/own_lost.json'"),
        ("own_beams", "lm_eval/own_beams: own_beams: generation_kwargs: num_beams=4: no completion is made so here; "),
        ("own_code", "lm_eval/own_code: runs code that the model writes, which is not done here; lm-eval itself would"),
    ],
)
def test_what_cannot_be_asked_is_said_before_a_process_starts(name, said, own, monkeypatch):
    _, tasks, *_ = own
    index = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda folder, lm_evals_own: index(folder, False))  # 14,000 files: 10 s
    (spec,), _ = task_specs([f"lm_eval/{name}"])
    (problem,) = harness.problems(spec, Asked(include_path=str(tasks)))
    assert problem.startswith("eval.tasks=" + said.replace("TASKS", str(tasks)))
    (problem,) = check([spec, *task_specs(["lm_eval/own_text"])[0]], Asked(include_path=str(tasks / "none")))
    assert problem.startswith(f"eval.include_path={tasks / 'none'}: is no folder; one with the YAML files")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = harness.problems(spec, Asked())
    assert problem == f"eval.tasks=lm_eval/{name}: lm-eval is not installed; pip install 'deepnarrow[eval]' would work"


def test_completions_that_the_context_does_not_hold_are_refused_as_the_task_is_opened(own):
    _, tasks, speech, _ = own
    with pytest.raises(BadInput) as refused:
        opened("own_far", tasks, speech)
    assert refused.value.problems == [
        "eval.tasks=lm_eval/own_far: own_far: generation_kwargs: max_gen_toks=96: the model's context of 96 tokens "
        "holds what is asked as well; from 1 to 95 would work"
    ]


def test_completions_are_made_as_a_task_wants_them():
    plain = Generation.of({"until": "\n", "num_beams": 1, "temperature": 0, "max_new_tokens": 5}, 64, "</s>")
    assert plain == Generation(5, ("\n", "</s>"), Sampling(temperature=0))
    drawn = Generation.of({"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9}, 512, "</s>")
    assert drawn == Generation(256, ("</s>",), Sampling(0.7, 50, 0.9))


def test_an_answer_that_the_context_does_not_hold_is_named(own):
    _, tasks, speech, _ = own
    said = r"own_long: own_long: '.{60}': its answer has \d{3} tokens behind what is asked, and the model scores"
    with pytest.raises(BadInput, match=said):
        opened("own_long", tasks, speech)


class Counted:
    """What asks the model, and how many tokens it asks to be made."""

    def __init__(self, leader):
        self.leader, self.asked = leader, []

    def complete(self, prompts, num_tokens, ends, sampling):
        self.asked.append((len(prompts), num_tokens))
        return self.leader.complete(prompts, num_tokens, ends, sampling)


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 5}])
def test_completions_in_stretches_are_those_made_at_once_and_end_with_their_stops(sampled, own, monkeypatch):
    model, counted = HarnessModel(own[2]), Counted(own[3])
    model.scorer = counted
    prompts = [*PROMPTS[:2], PROMPTS[3]]
    asked = [Instance("generate_until", {}, (prompt, {"max_gen_toks": 40, **sampled}), 0) for prompt in prompts]
    whole = model.generate_until(asked)
    assert counted.asked == [(3, 16), (3, 24)]
    assert model.generate_until(asked) == whole
    stop = whole[0][3:5]
    monkeypatch.setattr("train.evaluate.harness_model._STRETCH", 4)
    counted.asked.clear()
    asked[0].args[1]["until"] = [stop]
    again = model.generate_until(asked)
    assert again[0] == whole[0].split(stop)[0]
    if not sampled:
        assert again[1:] == whole[1:]
    assert sum(rows * tokens for rows, tokens in counted.asked) < 2.5 * 40
