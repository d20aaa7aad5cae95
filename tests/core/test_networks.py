"""Networks are the functions that their modules state."""

import pytest
import torch
from torch.nn import functional as F

from anomalib_gen._runtime import forked_rng
from anomalib_gen.networks import ResidualMLP


def make(*sizes, seed=0, **parameters):
    with forked_rng(seed):
        return ResidualMLP(*sizes, **parameters).double(), torch.randn(7, sizes[0], dtype=torch.float64)


@pytest.mark.parametrize("context_features", [0, 1, 4])
@pytest.mark.parametrize("n_blocks", [0, 1, 3])
@pytest.mark.parametrize(("n_inputs", "n_outputs"), [(1, 1), (3, 10)])
def test_shapes(n_inputs, n_outputs, n_blocks, context_features):
    network, x = make(n_inputs, n_outputs, n_blocks=n_blocks, context_features=context_features)
    context = torch.ones(7, context_features, dtype=torch.float64) if context_features else None
    assert network(x, context).shape == (7, n_outputs)


def test_zero_output_is_zero_everywhere_and_still_learns():
    network, x = make(3, 4)
    y = network(100 * x)
    assert torch.equal(y, torch.zeros(7, 4, dtype=torch.float64))
    y.sum().backward()
    assert network.output.weight.grad.abs().min() > 0
    network, x = make(3, 4, zero_output=False)
    assert network(x).abs().min() > 0


def test_is_the_stated_recursion():
    network, x = make(3, 2, hidden_features=6, n_blocks=2, context_features=4, zero_output=False)
    with forked_rng(1):
        c = torch.randn(7, 4, dtype=torch.float64)
    h = x @ network.input.weight.T + network.input.bias + c @ network.context[0].weight.T
    for k in range(2):
        b, a, v = network.first[k], network.second[k], network.context[k + 1]
        inner = F.silu(h) @ b.weight.T + b.bias + c @ v.weight.T
        h = h + F.silu(inner) @ a.weight.T + a.bias
    expected = F.silu(h) @ network.output.weight.T + network.output.bias
    torch.testing.assert_close(network(x, c), expected)


def test_context_matters_row_by_row():
    network, x = make(3, 2, context_features=1, zero_output=False)
    low, high = torch.zeros(7, 1, dtype=torch.float64), torch.ones(7, 1, dtype=torch.float64)
    mixed = torch.cat([low[:3], high[3:]])
    at_low, at_high = network(x, low), network(x, high)
    assert ((at_low - at_high).abs() > 1e-6).all()
    torch.testing.assert_close(network(x, mixed), torch.cat([at_low[:3], at_high[3:]]))


def test_without_context_there_is_none_to_learn():
    network, _ = make(3, 2)
    assert not [name for name, _ in network.named_parameters() if name.startswith("context")]


def test_rows_do_not_mix():
    network, x = make(3, 2, zero_output=False)
    torch.testing.assert_close(network(x)[2:4], network(x[2:4]))
