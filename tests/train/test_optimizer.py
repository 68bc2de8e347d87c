import pytest
import torch

from conf.train_settings import OptimizerConfig
from model.init import initialise
from model.transformer import Embedding, Transformer
from tests.shapes import matrices_and_vectors, small
from train.optimizer import adamw


def test_decay_pulls_on_matrices_and_on_nothing_else():
    model = Transformer(small())
    initialise(model, "", 1, 0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(*matrices_and_vectors(model), OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = 1.0 if "norm" in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.data, before[name] * shrunk, msg=name)


def test_one_step_is_adams():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = adamw([weight], [], OptimizerConfig(lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0))
    for gradient in ([[0.5, 3.0]], [[-0.25, 1.0]]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    g1, g2 = torch.tensor([[0.5, 3.0]]), torch.tensor([[-0.25, 1.0]])
    expected = torch.tensor([[1.0, -2.0]]) - 0.01 * g1.sign()
    m = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    v = (0.95 * 0.05 * g1**2 + 0.05 * g2**2) / (1 - 0.95**2)
    torch.testing.assert_close(weight.data, expected - 0.01 * m / v.sqrt(), rtol=1e-5, atol=1e-6)


def test_a_stage_without_a_norm():
    groups = adamw(*matrices_and_vectors(Embedding(small())), OptimizerConfig()).param_groups
    assert [group["weight_decay"] for group in groups] == pytest.approx([0.1])
