import random

import torch

from parallel.state import boxes


def test_boxes_hold_consecutive_elements_of_a_matrix_where_they_lie():
    chance = random.Random(0)
    for _ in range(300):
        shape = (chance.randrange(1, 6), chance.randrange(1, 6))
        whole = torch.arange(80.0).reshape(8, 10)
        origin = (chance.randrange(0, 9 - shape[0]), chance.randrange(0, 11 - shape[1]))
        part = whole[origin[0] : origin[0] + shape[0], origin[1] : origin[1] + shape[1]]
        flat = part.flatten()
        start = chance.randrange(0, len(flat))
        stop = chance.randrange(start + 1, len(flat) + 1)
        cut = list(boxes(start, flat[start:stop], shape, origin))
        assert len(cut) <= 3
        seen = torch.cat([box.values.flatten() for box in cut])
        assert torch.equal(seen, flat[start:stop])
        for box in cut:
            (row, column), (height, width) = box.offsets, box.values.shape
            assert torch.equal(box.values, whole[row : row + height, column : column + width])


def test_a_box_of_a_vector_is_one():
    (box,) = boxes(2, torch.arange(3.0), (7,), (10,))
    assert box.offsets == (12,) and box.values.shape == (3,)


def test_boxes_are_views():
    flat = torch.zeros(10)
    for box in boxes(3, flat, (4, 4), (0, 0)):
        box.values.fill_(1)
    assert flat.eq(1).all()
