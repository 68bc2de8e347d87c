"""The package `deepnarrow`, as a notebook uses it, on a real run."""

import inspect
import json
import math
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import deepnarrow
from launch.cli import main
from model.generate import Decoder, Sampling, complete
from model.transformer import Transformer
from tests.ranks import ROOT
from tests.train.checkpoint import runs


@pytest.fixture(scope="module")
def run_dir(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    short = "data.document_separator='\\n'"  # many borders of documents among the tokens held out
    runs.finish(folder, 1, *overrides, short, "train.max_steps=3", "train.val_sequences=7")
    return folder


@pytest.fixture(scope="module")
def loaded(run_dir):
    return deepnarrow.load(run_dir, device="cpu")


@pytest.mark.launch
def test_a_run_a_checkpoint_and_a_hugging_face_directory_are_the_same_model(loaded, run_dir, tmp_path):
    model, tokenizer = loaded
    assert type(model) is Transformer and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids_BL = torch.tensor([tokenizer.encode("def f(x):\n")])
    assert main(["export", str(run_dir), str(tmp_path / "hf")]) == 0
    (checkpoint,) = run_dir.glob("checkpoints/step-*3")
    for source, begins in ((str(checkpoint), tokenizer.begins), (tmp_path / "hf", None)):
        other, others = deepnarrow.load(source, device="cpu")
        assert others.ends == tokenizer.ends and others.begins == begins  # transformers puts nothing before a text
        assert others.encode("def f(x):\n") == ids_BL[0].tolist()[begins is None :]
        assert torch.equal(other(ids_BL), model(ids_BL))
    half, _ = deepnarrow.load(run_dir, tokenizer=tmp_path / "hf", device="cpu", dtype=torch.bfloat16)
    torch.testing.assert_close(half(ids_BL).float(), model(ids_BL), atol=0.05, rtol=0.05)


@pytest.mark.launch
@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 5, "top_p": 0.9, "seed": 7}], ids=["greedy", "drawn"])
def test_text_is_that_of_the_command(how, loaded, run_dir, capsys):
    options = [word for key, value in how.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert main(["generate", str(run_dir), "--prompt", "def é", "--max-tokens", "20", *options]) == 0
    assert deepnarrow.generate(*loaded, "def é", max_tokens=20, **how) == capsys.readouterr().out[:-1]
    assert main(["generate", str(run_dir), "--prompt", "a", "--prompt", "", "--max-tokens", "9", *options]) == 0
    one, two = deepnarrow.generate(*loaded, ["a", ""], max_tokens=9, **how)
    assert capsys.readouterr().out == f"--- a\n{one}\n--- \n{two}\n"
    assert len(deepnarrow.generate(*loaded, "a", max_tokens=10**6)) > 20  # to the end of the context
    assert deepnarrow.generate(*loaded, []) == []


@pytest.mark.launch
def test_text_ends_at_whichever_of_the_tokens_that_end_one(loaded):
    model, tokenizer = loaded
    prompt = tokenizer.encode("def ")
    decoder = Decoder([model.embedding, *model.blocks, model.head], [prompt], 40)
    (made,) = complete(decoder, 20, (), Sampling(temperature=0))
    ends = {made[9], made[4]}
    short = made[: next(at for at, token in enumerate(made) if token in ends)]
    text = deepnarrow.generate(model, replace(tokenizer, ends=frozenset(ends)), "def ", temperature=0)
    assert text == "def " + tokenizer.continuation(prompt, short)


@pytest.mark.launch
def test_the_loss_of_texts_is_the_mean_over_their_tokens(loaded):
    model, tokenizer = loaded
    texts = ["import os\n", "x = [1, 2]\n" * 40, "", "é"]
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids[0] in tokenizer.ends
        for at in range(0, len(ids) - 1, 64):  # the context; the second text is several times as long
            piece = torch.tensor(ids[at : at + 65])
            with torch.no_grad():
                total += float(F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum"))
            count += len(piece) - 1
    found = deepnarrow.evaluate(model, tokenizer, iter(texts))
    assert found.num_tokens == count == sum(len(tokenizer.encode(text)) - 1 for text in texts)
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert deepnarrow.evaluate(model, tokenizer, texts[0]) == deepnarrow.evaluate(model, tokenizer, [texts[0]])


@pytest.mark.launch
def test_the_loss_on_what_a_run_held_out_is_its_validation_loss(loaded, run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    found = deepnarrow.evaluate(*loaded, held_out=run_dir)
    assert found.loss == pytest.approx(summary["val_loss"], rel=1e-6) and found.num_tokens == 7 * 32
    (earlier,) = run_dir.glob("checkpoints/step-*2")
    assert deepnarrow.evaluate(*deepnarrow.load(earlier), held_out=run_dir).loss > found.loss


@pytest.mark.gpu
@pytest.mark.launch
def test_on_a_gpu_it_is_the_same_to_the_rounding_of_bf16(loaded, run_dir):
    model, tokenizer = deepnarrow.load(run_dir)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.bfloat16)}
    assert deepnarrow.generate(model, tokenizer, "def ", max_tokens=5).startswith("def ")
    there, here = (deepnarrow.evaluate(*of, held_out=run_dir) for of in ((model, tokenizer), loaded))
    assert there.num_tokens == here.num_tokens and there.loss == pytest.approx(here.loss, rel=0.01)


@pytest.mark.launch
def test_the_examples_of_the_docstrings_run(loaded, run_dir):
    names = {"torch": torch, "deepnarrow": deepnarrow, "model": loaded[0], "tokenizer": loaded[1]}
    for documented in (deepnarrow, deepnarrow.load, deepnarrow.generate, deepnarrow.evaluate):
        before_args = inspect.getdoc(documented).partition("\nArgs:")[0]
        example = [line[4:] for line in before_args.splitlines() if line.startswith("    ")]
        assert example
        exec("\n".join(example).replace("runs/tiny-stdlib-574187f", str(run_dir)), names)
    assert names["logits_BLV"].shape[0] == 1 and names["logits_BLV"].shape[-1] == 400


@pytest.mark.launch
def test_what_cannot_be_is_said_by_argument(loaded, run_dir, tmp_path):
    for call, said in [
        (lambda: deepnarrow.load(tmp_path / "no"), f"{tmp_path}/no: no weights are there"),
        (lambda: deepnarrow.load("~no-one/run"), "source=~no-one/run: no user no-one"),
        (lambda: deepnarrow.load(run_dir, tokenizer="~no-one/t"), "tokenizer=~no-one/t: no user no-one"),
        (lambda: deepnarrow.generate(*loaded, "a", top_k=0, max_tokens=0), "top_k=0: must be at least 1"),
        (lambda: deepnarrow.generate(*loaded, "a = 1\n" * 40), "prompt='a = 1"),
        (lambda: deepnarrow.generate(*loaded, "a\udcff"), "prompt=a\\udcff: is not UTF-8"),
        (lambda: deepnarrow.evaluate(*loaded), "texts, held_out: one of the two"),
        (lambda: deepnarrow.evaluate(*loaded, "a", held_out=run_dir), "texts, held_out: one of the two"),
        (lambda: deepnarrow.evaluate(*loaded, []), "texts: there is no token to predict"),
        (lambda: deepnarrow.evaluate(*loaded, ["a\udcff"]), "texts=a\\udcff: is not UTF-8"),
        (lambda: deepnarrow.evaluate(*loaded, held_out=tmp_path), f"{tmp_path}: no weights are there"),
    ]:
        with pytest.raises(deepnarrow.BadInput) as error:
            call()
        assert error.value.problems[0].startswith(said), error.value
    with pytest.raises(deepnarrow.BadInput, match=r"^top_k=0.*\nmax_tokens=0: must be at least 1$"):
        deepnarrow.generate(*loaded, "a", top_k=0, max_tokens=0)


def test_a_process_that_has_another_package_of_our_names_is_told_where_that_is(monkeypatch):
    foreign = types.ModuleType("model")
    foreign.__file__ = "/notebooks/model.py"
    monkeypatch.setitem(sys.modules, "model", foreign)
    with pytest.raises(ImportError, match=r"^model: .* imported /notebooks/model.py as model already; .* would work$"):
        deepnarrow._take_floors()
    foreign.__file__, foreign.__path__ = None, ["/notebooks/model"]  # a folder without __init__.py
    with pytest.raises(ImportError, match="has imported /notebooks/model as model"):
        deepnarrow._take_floors()


def test_importing_it_waits_for_nothing_and_leaves_the_path_alone(tmp_path):
    (tmp_path / "model.py").write_text("raise SystemExit('imported')")
    says = "import sys; before = [*sys.path]; import deepnarrow; import model.problems; print(deepnarrow.__version__)"
    says += "; assert sys.path == before and not {'torch', 'hydra'} & sys.modules.keys()"
    command = [sys.executable, "-c", f"import sys; sys.path[1:1] = [{str(ROOT)!r}]; {says}"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == deepnarrow.__version__ != ""
    assert set(dir(deepnarrow)) >= {"load", "generate", "evaluate", "BadInput"}
    with pytest.raises(AttributeError, match="has no attribute 'train'"):
        deepnarrow.train  # noqa: B018
