"""Linear maps of few rows: the same numbers as torch's, on the path that is meant for them."""

import pytest
import torch
from torch import nn

import zoo
from zoo import linear
from zoo.linear import Linear


def test_few_rows_give_what_torch_gives():
    for bias in (True, False):
        ours, theirs = Linear(96, 512, bias=bias), nn.Linear(96, 512, bias=bias)
        theirs.load_state_dict(ours.state_dict())
        for shape in ((96,), (1, 96), (1, 1, 96), (3, 1, 96), (2, 2, 96), (4, 96), (5, 96), (2, 7, 96), (0, 96)):
            x = torch.randn(96, *shape[:-1]).permute(*range(1, len(shape)), 0)  # not contiguous
            with torch.no_grad():
                y = ours(x)
            assert y.shape == (*shape[:-1], 512)
            torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-6)


def test_the_fast_path_is_for_inference_in_float32_with_few_rows_and_large_matrices(monkeypatch):
    taken = []
    monkeypatch.setattr(linear, "matvec", lambda x, w, b: taken.append(x) or torch.zeros(()))
    layer, x = Linear(256, 256), torch.randn(1, 4, 256)

    def takes(layer, x):
        taken.clear()
        layer(x)
        return bool(taken)

    if not torch.backends.mkl.is_available():
        pytest.skip("torch was built without MKL: the usual product stays")
    assert not takes(layer, x)  # gradients
    with torch.no_grad():
        assert takes(layer, x)
        assert not takes(layer, torch.randn(5, 256))
        assert not takes(Linear(256, 255), x)
        assert not takes(Linear(32, 32), torch.randn(1, 32))
        assert not takes(Linear(256, 256).bfloat16(), x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not takes(layer, x)


def test_compiles_without_graph_breaks():
    layer, x = Linear(256, 256), torch.randn(1, 1, 256)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("name", zoo.list_models("*-tiny"))
def test_every_large_projection_of_a_model_is_one(name):
    with torch.device("meta"):
        model = zoo.create_model(name)
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Linear)]
    assert not plain
