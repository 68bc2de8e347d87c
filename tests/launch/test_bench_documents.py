"""`deepnarrow bench documents` on a small model."""

import pytest

from launch.bench import documents
from tests.shapes import preset

SHAPE = [
    *["model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=96", "model.vocab_size=400"],
    *["model.max_seq_len=64", "train.seq_len=64", "train.micro_batch=2"],
]


def test_each_way_is_measured_on_the_same_tokens_and_says_how_much_is_seen():
    found = documents.measure(SHAPE, rounds=1)
    rows = found["rows"]
    assert [(row["what"], row["way"]) for row in rows] == [
        *[("attention", way) for way in ("whole", "documents", "documents, a mask of all pairs")],
        *[("a stage of 2 blocks", way) for way in ("whole", "documents")],
    ]
    for row in rows:
        assert row["tokens_per_second"] == 128 / row["seconds"] > 0
        assert row["speedup"] == pytest.approx(rows[0 if row["what"] == "attention" else 3]["seconds"] / row["seconds"])
    batch = documents.random_batch(preset(*SHAPE).model, 2, 64, True)
    assert found["documents"]["number"] == len(batch.documents.lengths) > 2
    assert found["documents"]["attended"] == sum(n * n for n in batch.documents.lengths) / (2 * 64**2) < 1
    text = documents.as_text(found)
    assert f"{found['documents']['number']} documents of {128 / found['documents']['number']:.0f} on average" in text
    assert "a mask of all pairs" in text and "documents one after another" in text
