"""Networks of images: shapes of any size, independence of the batch, gradients, and bounds on their slope."""

import pytest
import torch

from anomalib_gen.networks import (
    ConvDecoder,
    ConvNet,
    Reshaped,
    ResidualMLP,
    SpectralConv,
    UNet,
    make_network,
)
from anomalib_gen.networks.convolution import pyramid, shrink

SHAPES = [(1, 8, 8), (3, 9, 13), (2, 28, 28), (4, 8, 64)]


def randomised(network, seed=0):
    """Weights away from the neutral start, or many things would hold because outputs are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.5)
    return network.double().eval()


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_pyramid_halves_the_longer_sides():
    assert pyramid(28, 28) == [(28, 28), (14, 14), (7, 7), (4, 4)]
    assert pyramid(8, 64) == [(8, 64), (4, 32), (4, 16), (4, 8), (4, 4)]
    assert pyramid(256, 256, 8)[-1] == (8, 8)
    x = torch.arange(7.0).expand(1, 1, 4, 7)
    torch.testing.assert_close(shrink(x, (4, 4))[0, 0, 0], torch.tensor([0.5, 2.5, 4.5, 6.0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    x, c = draw(2, *shape), draw(2, 5)
    assert UNet(shape, 2 * shape[0], channels=8, context_features=5).double()(x, c).shape == (
        2,
        2 * shape[0],
        *shape[1:],
    )
    assert ConvNet(shape, 3, channels=8, context_features=5).double()(x, c).shape == (2, 3)
    assert ConvDecoder(6, shape, channels=8).double()(draw(2, 6)).shape == (2, *shape)


@pytest.mark.parametrize("n_blocks", [0, 1, 2])
def test_blocks_a_level_may_be_none_or_several(n_blocks):
    shape = (1, 16, 16)
    assert UNet(shape, 1, channels=8, n_blocks=n_blocks)(torch.zeros(1, *shape)).shape == (1, *shape)
    assert ConvNet(shape, 1, channels=8, n_blocks=n_blocks)(torch.zeros(1, *shape)).shape == (1, 1)
    assert ConvDecoder(2, shape, channels=8, n_blocks=n_blocks)(torch.zeros(1, 2)).shape == (1, *shape)


@pytest.mark.slow
def test_large_images():
    shape = (3, 256, 256)
    x = torch.zeros(1, *shape)
    assert UNet(shape, 3, channels=8, context_features=2)(x, torch.zeros(1, 2)).shape == x.shape
    assert ConvDecoder(4, shape, channels=8)(torch.zeros(1, 4)).shape == x.shape
    assert ConvNet(shape, 1, channels=8)(x).shape == (1, 1)


def networks():
    shape = (2, 12, 12)
    yield "unet", randomised(UNet(shape, 2, channels=8, context_features=3)), (draw(6, *shape), draw(6, 3))
    yield "net", randomised(ConvNet(shape, 2, channels=8, context_features=3)), (draw(6, *shape), draw(6, 3))
    yield "decoder", randomised(ConvDecoder(4, shape, channels=8)), (draw(6, 4),)


@pytest.mark.parametrize(("name", "network", "inputs"), list(networks()))
def test_an_image_does_not_know_of_the_others(name, network, inputs):
    whole = network(*inputs)
    torch.testing.assert_close(network(*(x[2:3] for x in inputs)), whole[2:3], rtol=1e-10, atol=1e-12)
    assert whole.flatten(1).std(0).max() > 1e-3


@pytest.mark.parametrize(("name", "network", "inputs"), list(networks()))
def test_every_weight_and_input_has_a_gradient(name, network, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    network(*inputs).square().sum().backward()
    for label, p in [*network.named_parameters(), *enumerate(inputs)]:
        # A constant in front of a group norm with one channel a group is taken away again.
        if not str(label).endswith(("first.bias", "input.bias", "skip.bias", "qkv.bias")):
            assert p.grad is not None, label
            assert float(p.grad.abs().max()) > 0, label


@torch.no_grad()
def test_a_new_network_is_neutral():
    x = draw(2, 1, 8, 8).float()
    assert float(UNet((1, 8, 8), 1, channels=8)(x).abs().max()) == 0
    assert float(ConvNet((1, 8, 8), 1, channels=8)(x).abs().max()) == 0
    assert float(ConvNet((1, 8, 8), 1, channels=8, zero_output=False)(x).abs().max()) > 0


@torch.no_grad()
def test_the_context_steers():
    for network, (x, c) in [(n, i) for name, n, i in networks() if name != "decoder"]:
        assert float((network(x, c) - network(x, c + 1)).abs().max()) > 1e-3


def test_energies_have_second_derivatives():
    network = randomised(ConvNet((1, 8, 8), 1, channels=8, n_blocks=1))
    x = draw(2, 1, 8, 8)
    assert torch.autograd.gradgradcheck(lambda x: network(x).sum(), x[:1].requires_grad_(), atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_a_bounded_convolution_stretches_no_distance_by_more(training):
    torch.manual_seed(0)
    layer = SpectralConv(3, 4, 3, bound=0.7).double()
    with torch.no_grad():
        layer.weight.mul_(20)
    for _ in range(200 if training else 0):
        layer.train()(draw(1, 3, 6, 6))
    layer.train(training)
    n = 3 * 6 * 6
    columns = layer(torch.eye(n, dtype=torch.float64).reshape(n, 3, 6, 6)) - layer(
        torch.zeros(1, 3, 6, 6, dtype=torch.float64)
    )
    norm = float(torch.linalg.matrix_norm(columns.detach().flatten(1).double(), 2))
    # The bound is conservative by up to the side of the kernel.
    assert 0.7 / 3 - 1e-6 <= norm <= 0.7 + 1e-6


@torch.no_grad()
def test_bounded_networks_stay_bounded():
    network = randomised(ConvNet((1, 8, 8), 1, channels=8, spectral_norm=0.5))
    for p in network.parameters():
        p.data.mul_(50)
    layers = [m for m in network.modules() if hasattr(m, "bound")]
    assert len(layers) == 1 + 1 + 2 * 2 + 1
    x, y = draw(8, 1, 8, 8), draw(8, 1, 8, 8, seed=2)
    # SiLU stretches by 1.1 and an average shrinks: input, two blocks, one widening, and the last layer.
    limit = 0.5**3 * 1.1 * (1 + (0.5 * 1.1) ** 2) ** 2
    ratio = (network(x) - network(y)).abs().flatten() / (x - y).flatten(1).norm(dim=1)
    assert float(ratio.max()) <= limit


# The factory -----------------------------------------------------------------------------------------------


def test_a_shape_chooses_the_network():
    image = (1, 8, 8)
    assert isinstance(make_network(5, 2), ResidualMLP)
    assert isinstance(make_network(image, image), UNet)
    assert isinstance(make_network(image, 2), ConvNet)
    assert isinstance(make_network(2, image), ConvDecoder)
    assert isinstance(make_network(image, image, kind="mlp"), Reshaped)


@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_networks_of_rows_see_pixels(kind):
    image = (1, 8, 8)
    network = make_network(image, image, kind=kind, hidden_features=8, context_features=2, zero_output=False)
    assert network(torch.zeros(3, *image), torch.zeros(3, 2)).shape == (3, *image)
    assert make_network(image, 2, kind=kind)(torch.zeros(3, *image)).shape == (3, 2)


def test_impossible_networks_are_refused():
    with pytest.raises(ValueError, match="'convolutional' is for images"):
        make_network(5, 2, kind="convolutional")
    with pytest.raises(ValueError, match="network='unet' is unknown"):
        make_network(5, 2, kind="unet")


@pytest.mark.parametrize("channels", [8, 25, 33])
def test_any_number_of_channels_is_shared_among_heads(channels):
    network = make_network((1, 28, 28), (1, 28, 28), hidden_features=16 * channels, context_features=2)
    assert network(torch.zeros(2, 1, 28, 28), torch.zeros(2, 2)).shape == (2, 1, 28, 28)
