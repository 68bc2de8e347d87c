"""Other people's checkpoints: read as transformers reads them, refused by name, or taken over with a word."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli import main
from launch.speech import Tokenizer
from model.weights import streamed_logits
from tests.faults.foreign import (
    EMBEDDING,
    FILE,
    HEAD,
    INDEX,
    Q_PROJ,
    SINGLE,
    VOCAB,
    another_in_a_shard,
    copied,
    cut_off,
    each,
    edit,
    head_alone,
    led_out,
    linked,
    other_shape,
    others,
    put,
    shapeless,
    sharded,
    sign,
    spoil,
    stale_index,
    tensors,
    through_a_folder,
    unlisted,
    unsized,
    write,
    write_model,
    write_tokenizer,
)
from train.data.tokenizer import Encoder, load_tokenizer
from train.pretrained import open_source


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What transformers wrote: tied and not, with what people keep beside the weights."""
    folders = {}
    for name, tie in (("plain", False), ("tied", True)):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        write_model(folder, tie_word_embeddings=tie)
        write_tokenizer(folder)
        (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}")
        (folder / "tokenizer.model").write_bytes(b"sentencepiece")
        (folder / "README.md").write_text("a card")
    return folders


READ = {
    "D18 weights_ema beside": ("plain", tensors(others, target="weights_ema.safetensors"), "weights_ema.safetensors"),
    "D18 a stale index beside": ("plain", stale_index, INDEX),
    "D18 consolidated beside": (
        "plain",
        tensors(others, target="consolidated.safetensors"),
        "consolidated.safetensors",
    ),
    "D18 a variant beside": ("plain", tensors(others, target="model.fp16.safetensors"), "model.fp16.safetensors"),
    "D18 a pickle beside": ("plain", write("pytorch_model.bin", "none"), "pytorch_model.bin"),
    "D18 shards, another beside": ("plain", another_in_a_shard, "model-00001-of-00003.safetensors"),
    "D18 training_args is no weights": ("plain", write("training_args.bin", "none"), None),
    "D18 named by config.json": (
        "plain",
        each(
            tensors(others, target="other.safetensors"), edit("config.json", transformers_weights="other.safetensors")
        ),
        SINGLE,
    ),
    "D21 tied, both there and equal": ("tied", put(HEAD, lambda found: found[EMBEDDING].clone()), None),
    "D21 tied, under the head's name": ("tied", tensors(head_alone), None),
    "D21 fp64": ("plain", put(Q_PROJ, lambda found: found[Q_PROJ].double()), f"{Q_PROJ} is stored in float64"),
    "D22 heads null": ("plain", edit("config.json", head_dim=None, pretraining_tp=None), None),
    "D22 swish": ("plain", edit("config.json", hidden_act="swish"), None),
    "D22 two bases": (
        "plain",
        edit("config.json", rope_theta=77.0, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        "rope_theta=77.0",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read_is_what_transformers_reads_and_what_is_not_is_said(case, written, tmp_path, capsys):
    source, change, said = READ[case]
    folder = copied(written, tmp_path, source)
    change(folder)
    tokens_BL = torch.arange(4, 44)[None]
    ours = open_source(folder)
    words = capsys.readouterr().err
    assert said in words if said else not words
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens_BL).logits
    torch.testing.assert_close(streamed_logits(ours.weights, tokens_BL), theirs, rtol=1e-4, atol=1e-4)


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def config(key, value):
    return edit("config.json", **{key: value})


SECOND = "model-00002-of-00002.safetensors"
REFUSED = {
    "D18 a variant alone": (lambda f: (f / SINGLE).rename(f / "model.fp16.safetensors"), "no model.safetensors or"),
    "D18 shards without an index": (each(sharded, lambda f: (f / INDEX).unlink()), "no model.safetensors or"),
    "D18 an adapter": (write("adapter_config.json", "{}"), "adapter_config.json: adapters are not added"),
    "D18 a tensor in two shards": (
        each(sharded, lambda f: save_file(load_file(f / SECOND) | {HEAD: torch.zeros(VOCAB, 32)}, f / SECOND)),
        f"{HEAD} is in model-00001-of-00002.safetensors as well",
    ),
    "D21 two heads of one": (
        each(put(HEAD, lambda found: found[EMBEDDING] + 1), config("tie_word_embeddings", True)),
        "tie_word_embeddings=true: lm_head.weight and model.embed_tokens.weight are both there, and differ",
    ),
    "D21 quantised": (config("quantization_config", {"quant_method": "gptq"}), "config.json: quantization_config"),
    "D21 int8": (put(Q_PROJ, lambda found: found[Q_PROJ].to(torch.int8)), f"{Q_PROJ} is stored as I8"),
    "D21 fp8": (put(Q_PROJ, lambda found: found[Q_PROJ].to(torch.float8_e4m3fn)), f"{Q_PROJ} is stored as F8_E4M3"),
    "D21 booleans": (put(Q_PROJ, lambda found: found[Q_PROJ] > 0), f"{Q_PROJ} is stored as BOOL"),
    "D21 a tied head in int8": (
        each(put(HEAD, lambda found: found[EMBEDDING].to(torch.int8)), config("tie_word_embeddings", True)),
        f"{HEAD} is stored as I8",
    ),
    "D21 NaN": (spoil(Q_PROJ, float("nan")), f"model.safetensors: {Q_PROJ} holds NaN"),
    "D21 infinity": (spoil(Q_PROJ, -float("inf")), f"{Q_PROJ} holds infinite values"),
    "D21 fp64 beyond fp32": (put(Q_PROJ, lambda found: found[Q_PROJ].double() + 1e300), f"{Q_PROJ} holds infinite"),
    "D22 a list": (write("config.json", [1, 2]), "config.json: holds [1, 2], which is no JSON object"),
    "D22 cut off": (cut_off("config.json"), "config.json: is no JSON"),
    "D22 brackets without end": (write("config.json", "[" * 200_000), "config.json: is no JSON"),
    "D22 Latin-1": (lambda f: (f / "config.json").write_bytes(b'{"a": "caf\xe9"}'), "config.json: is no JSON"),
    "D22 an index without weight_map": (each(sharded, write(INDEX, {"metadata": {}})), f"{INDEX}: has no weight_map"),
    "D22 a weight_map of numbers": (each(sharded, write(INDEX, {"weight_map": {HEAD: 1}})), "has no weight_map"),
    "D22 an index that is a list": (each(sharded, write(INDEX, [])), f"{INDEX}: holds [], which is no JSON object"),
    "D22 an index cut off": (each(sharded, cut_off(INDEX)), f"{INDEX}: is no JSON"),
    "D22 an index that leads out": (lambda f: sharded(f, more="../other.safetensors"), "lies outside the folder"),
    "D22 an index to a root": (lambda f: sharded(f, more="/other.safetensors"), "lies outside the folder"),
    "D22 a missing shard": (each(sharded, lambda f: (f / SECOND).unlink()), f"{SECOND}: is not there, which"),
    "D22 a truncated shard": (each(sharded, cut_off(SECOND, 0.9)), f"{SECOND}: "),
    "D22 a truncated file": (cut_off(SINGLE, 0.9), f"{SINGLE}: "),
    "D22 a pointer of Git LFS": (write(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull would"),
    "D22 too many layers": (config("num_hidden_layers", 10**6), "num_hidden_layers=1000000: the files hold 21 tensors"),
    "D22 a rope that is a word": (config("rope_scaling", "linear"), "rope_scaling=linear: is no JSON object"),
    "D22 half a rotation": (config("partial_rotary_factor", 0.5), "partial_rotary_factor=0.5: is not implemented"),
    "D22 tie null": (config("tie_word_embeddings", None), "tie_word_embeddings=null: is neither true nor false"),
    "D22 bias null": (config("attention_bias", None), "attention_bias=null: is not implemented"),
    "D22 a file for another tokenizer": (
        each(sharded, config("transformers_weights", "../x.safetensors")),
        "no ../x.safetensors is there",
    ),
    "D22 base null": (
        each(config("rope_parameters", None), config("rope_theta", None)),
        "rope_theta=null: must be a number above 0",
    ),
}
NULLS = {"max_position_embeddings": (None, 0, "2048", 64.0, True, 10**30), "rms_norm_eps": (None, 0, "1e-5", -1.0)}
NULLS |= {"initializer_range": (None, "x"), "num_hidden_layers": (0, 2.0, "2"), "num_key_value_heads": (0, True)}
NULLS |= {"hidden_size": (-1, 2**31), "vocab_size": ("300",)}
REFUSED |= {
    f"D22 {key} {value!r}": (config(key, value), f"{key}={'null' if value is None else value}: must be a ")
    for key, values in NULLS.items()
    for value in values
}
REFUSED["D22 a base in quotes"] = (
    config("rope_parameters", {"rope_type": "default", "rope_theta": "1e4"}),
    "rope_theta=1e4: must be a number above 0",
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_llama_is_refused_in_one_sentence_with_its_file(case, written, tmp_path, capsys):
    change, said = REFUSED[case]
    folder = copied(written, tmp_path)
    change(folder)
    capsys.readouterr()
    assert main(["import", str(folder), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(str(folder)) and said in line and len(line) < 500
    assert not (tmp_path / "out").exists()


def test_d22_many_that_are_missing_are_counted(written, tmp_path, capsys):
    folder = copied(written, tmp_path)
    tensors(lambda found: [found.pop(key) for key in [*found] if "layers" in key])(folder)
    assert main(["import", str(folder), str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"{folder}: model.layers.0.input_layernorm.weight is missing" or "is missing" in lines[0]
    assert lines[-1] == "and 6 more like the last" and len(lines) == 13


@pytest.mark.parametrize("imported", [False, True], ids=["D19 init_from", "D19 import, then init_from"])
def test_weights_without_their_tokenizer_get_no_new_one(imported, written, overrides, tmp_path, capsys):
    folder = copied(written, tmp_path)
    without_tokenizer(folder)
    if imported:
        assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
        assert "has no tokenizer.json: training takes data.tokenizer=PATH" in capsys.readouterr().err
        folder = tmp_path / "ours"
    kept = [text for text in overrides if not text.startswith("model.")]
    begin = [*kept, f"init_from={folder}", f"hydra.run.dir={tmp_path}/run"]
    assert main(["train", *begin]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"init_from={folder}: has no tokenizer.json") and "data.tokenizer=PATH" in line
    assert not (tmp_path / "run").exists()
    assert main(["prepare", *begin, f"data.tokenizer={written['plain']}/tokenizer.json"]) == 0
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err


KEPT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "generation_config.json")
CONVERSIONS = {
    "D20 regroup": [["regroup", "--kv-heads", "2"]],
    "D20 import, export": [["import"], ["export"]],
    "D20 import, regroup, export": [["import"], ["regroup", "--kv-heads", "1"], ["export"]],
}


@pytest.mark.parametrize("name", ["plain", "tied"])
@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_conversion_keeps_special_tokens_files_and_the_tie(case, name, written, tmp_path, capsys):
    source = folder = copied(written, tmp_path, name)
    (source / SINGLE).rename(source / "named.safetensors")
    changes = {"auto_map": {"AutoModel": "code.Model"}, "transformers_weights": "named.safetensors", "mine": "kept"}
    edit("config.json", **changes)(source)
    for number, (verb, *rest) in enumerate(CONVERSIONS[case]):
        assert main([verb, str(folder), str(tmp_path / f"{number}"), *rest]) == 0
        folder = tmp_path / f"{number}"
    said = capsys.readouterr().err
    assert "not taken along: README.md" in said and "auto_map: not taken along" in said
    for file in KEPT:
        assert (folder / file).read_bytes() == (source / file).read_bytes(), file
    then, now = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "mine"):
        assert now[key] == then[key], key
    assert not {"auto_map", "transformers_weights"} & now.keys()
    assert (HEAD in load_file(folder / SINGLE)) == (name == "plain")
    one, two = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source, folder))
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert one.generation_config.to_dict() == two.generation_config.to_dict()
    assert (
        AutoTokenizer.from_pretrained(folder).special_tokens_map
        == AutoTokenizer.from_pretrained(source).special_tokens_map
    )


def test_d20_nothing_is_invented_where_the_source_says_nothing(written, tmp_path):
    source = copied(written, tmp_path)
    content = json.loads((source / "config.json").read_text())
    del content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]
    write("config.json", content)(source)
    for name in (*KEPT, "README.md"):
        (source / name).unlink(missing_ok=True)
    assert main(["regroup", str(source), str(tmp_path / "out"), "--kv-heads", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", SINGLE]
    assert not {"bos_token_id", "eos_token_id"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


def test_d21_regroup_keeps_each_weight_where_they_are_of_several_kinds(written, tmp_path):
    source = copied(written, tmp_path)
    put("model.norm.weight", lambda found: found["model.norm.weight"].bfloat16())(source)
    assert main(["regroup", str(source), str(tmp_path / "out"), "--kv-heads", "4"]) == 0
    before, after = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(before[key].float(), after[key]) for key in before)


SPOKEN = {
    "D20 bos before": ("bytes", "<s> $A", {}),
    "D20 nothing before": ("bytes", None, {}),
    "D20 nothing before, whatever is beside": ("bytes", None, {"add_bos_token": True}),
    "D20 metaspace, bos": ("metaspace", "<s> $A", {}),
    "D20 metaspace, nothing": ("metaspace", None, {"tokenizer_class": "LlamaTokenizer"}),
}


@pytest.mark.parametrize("case", SPOKEN)
def test_greedy_text_is_that_of_transformers_up_to_any_of_the_ends(case, written, tmp_path, capsys):
    kind, before, changes = SPOKEN[case]
    folder = copied(written, tmp_path)
    write_tokenizer(folder, kind, before)
    edit("tokenizer_config.json", **changes)(folder)
    prompt = "def load"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    free = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=3)[0, ids.shape[1] :]
    new = next(at for at in range(6, 20) if free[at] not in free[:at])  # makes an end of what comes after some tokens
    edit("generation_config.json", eos_token_id=[2, int(free[new])])(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False)[0]
    assert len(theirs) == ids.shape[1] + new + 1
    text = tokenizer.decode(theirs[:-1], skip_special_tokens=True)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == 0
    for source in (folder, tmp_path / "ours"):
        capsys.readouterr()
        options = ["--prompt", prompt, "--temperature", "0", "--max-tokens", "20"]
        assert main(["generate", str(source), *options]) == 0
        assert capsys.readouterr().out == text + "\n"
    if before is None:
        assert main(["generate", str(folder), "--prompt", ""]) == 2
        assert "--prompt='': is empty" in capsys.readouterr().err


def test_d20_a_run_with_a_tokenizer_from_elsewhere_is_exported_with_the_beginning_that_it_names(written, tmp_path):
    assert main(["import", str(written["plain"]), str(tmp_path / "ours")]) == 0
    sign(tmp_path / "ours", lambda body, folder: body["files"].pop("config.json"))
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    now = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (now["bos_token_id"], now["eos_token_id"]) == (1, 2)


def test_d20_a_space_that_begins_a_continuation_is_kept(tmp_path):
    write_tokenizer(tmp_path, "metaspace")
    tokenizer = load_tokenizer(tmp_path)
    space, y = (tokenizer.token_to_id(token) for token in ("▁", "y"))
    spoken = Tokenizer(tokenizer, frozenset(), None, Encoder(tokenizer))
    assert spoken.continuation(spoken.encode("x"), [space, y]) == " y"


OUTSIDE = {
    "D23 a piece above": (led_out("../" + FILE), "names files outside its folder"),
    "D23 a piece at a root": (led_out("{}/" + FILE), "names files outside its folder"),
    "D23 a piece through a linked folder": (through_a_folder, "names files outside its folder"),
    "D23 a link out": (linked, "names files outside its folder"),
    "D23 the folder above": (led_out(".."), "names files outside its folder"),
    "D23 a piece in a file without checksum": (unlisted, "names more.safetensors without its size and checksum"),
    "D23 a file without size": (unsized, f"names {FILE} without its size and checksum"),
    "D23 no piece": (lambda body, folder: body["tensors"].update({"head.norm.weight": 3}), "is no manifest"),
    "D23 no model": (shapeless, "describes no model"),
    "D23 another model": (other_shape, "and its model ["),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_manifest_that_names_files_elsewhere_is_damaged_whatever_its_digest(case, written, tmp_path, capsys):
    change, said = OUTSIDE[case]
    folder = tmp_path / "ours"
    assert main(["import", str(written["plain"]), str(folder)]) == 0
    sign(folder, lambda body, folder: None)
    open_source(folder)
    sign(folder, change)
    capsys.readouterr()
    assert main(["export", str(folder), str(tmp_path / "hf")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}: manifest.json ") and said in line


def test_d21_a_checkpoint_of_ours_that_is_not_finite_is_named(written, tmp_path, capsys):
    folder = tmp_path / "ours"
    assert main(["import", str(written["plain"]), str(folder)]) == 0
    found = load_file(folder / FILE)
    found["head.norm.weight"][0] = float("nan")
    save_file(found, folder / FILE)
    content = (folder / FILE).read_bytes()
    size = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sign(folder, lambda body, folder: body["files"].update({FILE: size}))
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert f"{folder / FILE}: head.norm.weight holds NaN" in capsys.readouterr().err
