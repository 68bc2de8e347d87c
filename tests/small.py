"""A run of seconds: a model of four narrow blocks on forty files of the standard library."""

import sysconfig
from pathlib import Path


def write_corpus(folder: Path, files: int = 40) -> Path:
    """Copy the files into a folder that is there."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def small_run(corpus: Path, cache: Path) -> list[str]:
    """The overrides of the run, with a cache of its own."""
    return [
        *["model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=64"],
        *["model.vocab_size=400", "model.max_seq_len=64", "train.seq_len=32", "model.init_std=0.05"],
        *["train.global_batch=8", "train.micro_batch=2"],
        *["data=files", f"data.path={corpus}", "data.val_fraction=0.2", f"data.cache_dir={cache}"],
    ]
