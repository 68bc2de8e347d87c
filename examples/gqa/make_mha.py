"""Makes what the example converts: a Hugging Face directory with a small multi-head Llama, trained, and its tokenizer.

python make_mha.py FOLDER [STEPS]

It needs transformers, and nothing of deepnarrow. FOLDER gets mha/, corpus/ with the text that it is trained on, and
held_out.txt, text that it is not trained on. Whoever has a directory of their own needs none of this.
"""

import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGES = ("asyncio", "email", "http", "json", "logging")
HELD_OUT = "csv.py"
BEGIN, END = "<s>", "</s>"
VOCAB, LENGTH, ROWS, RATE = 1024, 128, 8, 3e-3


def main(folder: Path, steps: int) -> None:
    """Write the corpus, train a tokenizer and then the model on it, and save both as transformers does."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            name = "-".join(path.relative_to(library).with_suffix("").parts)
            (corpus / f"{name}.py").write_bytes(path.read_bytes())
    (folder / "held_out.txt").write_bytes((library / HELD_OUT).read_bytes())
    texts = [path.read_text("utf-8") for path in sorted(corpus.glob("*.py"))]
    tokenizer = train_tokenizer(texts)
    model = train(tokenizer, texts, steps)
    tokenizer.save_pretrained(folder / "mha")
    model.save_pretrained(folder / "mha")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, as Llama 3's is one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=[BEGIN, END], show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BEGIN, eos_token=END)


def train(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> LlamaForCausalLM:
    """Train a Llama of 8 query and 8 key/value heads with AdamW, its rate falling to a tenth over the steps."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=VOCAB,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    ids = torch.tensor([id for text in texts for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    rows_NL = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for step in range(steps):
        batch_BL = rows_NL[torch.randint(len(rows_NL), (ROWS,))]
        loss = model(batch_BL, labels=batch_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}")
    return model


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 500)
