"""Loads Hugging Face directories with transformers, and says what each loses on a text, and what its cache takes.

python compare.py TEXT DIRECTORY ...

It needs transformers, and nothing of deepnarrow: what it says of a directory is what others will see.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(text: str, folders: list[str]) -> list[float]:
    """Print a line for each directory; returns the losses, in nats a token."""
    losses = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        shape = model.config
        ids = torch.tensor(tokenizer(text)["input_ids"])
        length = shape.max_position_embeddings
        rows_NL = ids[: len(ids) // length * length].view(-1, length)
        with torch.no_grad():
            losses.append(sum(model(row_L[None], labels=row_L[None]).loss.item() for row_L in rows_NL) / len(rows_NL))
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        numbers = 2 * kv_heads * shape.hidden_size // heads * shape.num_hidden_layers
        begin = tokenizer("def ", return_tensors="pt")["input_ids"]
        said = tokenizer.decode(model.generate(begin, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
        print(
            f"{Path(folder).name}: {type(model).__name__}, {heads} query heads on {kv_heads}, {numbers:,} numbers of "
            f"cache a token; loss {losses[-1]:.4f}\n    {said!r}"
        )
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).read_text("utf-8"), sys.argv[2:])
