"""Export, import and regrouping of a model much larger than the memory that they may take, in one rank."""

import resource
import sys
from pathlib import Path

import torch

from launch.cli import main
from model.config import ModelConfig
from model.transformer import full_shapes
from tests.ranks import report
from train.data.tokenizer import train_tokenizer


class Zeros:
    """A model of two thirds of a gigabyte that takes none."""

    config = ModelConfig(n_layers=9, d_model=1024, n_heads=16, n_kv_heads=16, d_ff=2816, vocab_size=32768)

    def read(self, name):
        return torch.zeros(full_shapes(self.config)[name], dtype=torch.bfloat16)


def run():
    from model.huggingface import write_huggingface

    folder = Path(sys.argv[1])
    (folder / "hf").mkdir()
    write_huggingface(Zeros(), folder / "hf", torch.float32, 200_000_000, 0, 0)
    train_tokenizer(iter(["some text"]), 300).save(str(folder / "hf" / "tokenizer.json"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shard = ["--max-shard-gb", "0.2"]
    assert main(["import", str(folder / "hf"), str(folder / "ours"), *shard]) == 0
    assert main(["regroup", str(folder / "ours"), str(folder / "gqa"), "--kv-heads", "4", *shard]) == 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    size = sum(file.stat().st_size for file in (folder / "ours").iterdir())
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return {"bytes": size, "grown": grown}


if __name__ == "__main__":
    report(run)
