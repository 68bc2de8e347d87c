"""Directories of other people's checkpoints as transformers writes them, and what can be wrong with them."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NAMES = ["<unk>", "<s>", "</s>", "<pad>"]
VOCAB = 300


def write_tokenizer(folder, kind="bytes", before="<s> $A"):
    """One of the two kinds of Llama's tokenizers, with what it puts around a text."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder, alphabet = decoders.Metaspace(prepend_scheme="first", split=False), []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10, initial_alphabet=alphabet, special_tokens=NAMES, show_progress=False
    )
    tokenizer.train_from_iterator([Path(json.__file__).read_text("utf-8")], trainer)
    if before:
        tokenizer.post_processor = processors.TemplateProcessing(single=before, special_tokens=[("<s>", 1)])
    described = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), NAMES, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **described).save_pretrained(folder)


def write_model(folder, **changes):
    torch.manual_seed(1)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB)
    special = dict(bos_token_id=1, eos_token_id=[2, 7], pad_token_id=3, max_position_embeddings=64)
    config = LlamaConfig(**shape, **special, initializer_range=0.2, **changes)
    LlamaForCausalLM(config).save_pretrained(folder)


def copied(written, tmp_path, name="plain"):
    return Path(shutil.copytree(written[name], tmp_path / "hf"))


def edit(name, **changes):
    def change(folder):
        content = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps(content))

    return change


def tensors(change, source=SINGLE, target=SINGLE):
    """Write a file of weights again, with some of them changed."""

    def made(folder):
        found = load_file(folder / source)
        change(found)
        save_file(found, folder / target, {"format": "pt"})

    return made


def sharded(folder, **other):
    """Two files and an index, in place of the one file."""
    found = load_file(folder / SINGLE)
    names = {key: f"model-0000{1 + ('layers.1' in key)}-of-00002.safetensors" for key in found}
    for name in set(names.values()):
        save_file({key: value for key, value in found.items() if names[key] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names | other}))
    (folder / SINGLE).unlink()


def others(found):
    for key in found:
        found[key] = found[key] + 1


def put(key, value):
    def change(found):
        found[key] = value(found)

    return tensors(change)


def spoil(key, value):
    def change(found):
        found[key][0, 0] = value

    return tensors(change)


def each(*changes):
    def change(folder):
        for one in changes:
            one(folder)

    return change


def cut_off(name, share=0.5):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def write(name, content):
    return lambda folder: (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def stale_index(folder):
    tensors(others, target="model-00001-of-00001.safetensors")(folder)
    names = dict.fromkeys(load_file(folder / SINGLE), "model-00001-of-00001.safetensors")
    write(INDEX, {"metadata": {}, "weight_map": names})(folder)


def another_in_a_shard(folder):
    sharded(folder)
    tensors(others, "model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors")(folder)


def head_alone(found):
    found[HEAD] = found.pop(EMBEDDING)


def sign(folder, change):
    """Change a manifest and give it the digest of what it then says."""
    body = json.loads((folder / "manifest.json").read_text())
    del body["sha256"]
    change(body, folder)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, **body}))


FILE = "weights00000.safetensors"


def led_out(where):
    def change(body, folder):
        shutil.copy(folder / FILE, folder.parent / FILE)
        body["tensors"]["head.norm.weight"]["pieces"][0]["file"] = where.format(folder.parent)

    return change


def linked(body, folder):
    shutil.move(folder / FILE, folder.parent / FILE)
    (folder / FILE).symlink_to(folder.parent / FILE)


def unlisted(body, folder):
    shutil.copy(folder / FILE, folder / "more.safetensors")
    body["tensors"]["head.norm.weight"]["pieces"][0]["file"] = "more.safetensors"


def through_a_folder(body, folder):
    (folder / "below").symlink_to(folder.parent)
    body["tensors"]["head.norm.weight"]["pieces"][0]["file"] = f"below/{FILE}"


def unsized(body, folder):
    body["files"][FILE] = {}


def shapeless(body, folder):
    body["config"] = {}


def other_shape(body, folder):
    body["config"]["model"]["d_ff"] = 50
