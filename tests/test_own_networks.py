"""Networks as people have them: adjusted logits in a head or around it, folders of transformers,
adapters, tied and half-precision weights, losses by name.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from hessian_surgery_nb.foundations.accuracy import predict
from hessian_surgery_nb.foundations.adjusted import Adjusted, fold_into_head, load_adjusted
from hessian_surgery_nb.foundations.networks import find_head
from hessian_surgery_nb.foundations.weight_files import set_tensors, weights_bytes, write_atomic

CLASSES = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=40, seed=0):
    X = torch.randn(count, 6, generator=generator(seed))
    return X, torch.arange(count) % CLASSES


class Small(nn.Module):
    def __init__(self, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, CLASSES)
        self.after = nn.Identity() if after is None else after

    def forward(self, x):
        return self.after(self.head(torch.tanh(self.body(x))))


# --- adjusted logits

NUMBERS = [
    (None, torch.tensor([0.5, -0.25, 0.0, 1.0])),
    (torch.tensor([0.5, 2.0, 1.0, 1.5]), None),
    (torch.tensor([0.5, 2.0, 1.0, 1.5]), torch.tensor([0.5, -0.25, 0.0, 1.0])),
]


@pytest.mark.parametrize("scale, bias", NUMBERS, ids=["bias", "scale", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_and_around_are_the_same_function(scale, bias, dtype):
    data = images()[0].to(dtype), images()[1]
    net = Small().eval().to(dtype)
    around, labels = predict(Adjusted(net, scale, bias), data)
    name, _ = find_head(net, CLASSES, data)
    folded = fold_into_head(net, name, scale, bias, data=data)
    within, _ = predict(net, data, state=folded)
    error = 40 * torch.finfo(dtype).eps  # a few roundings of numbers of order one
    torch.testing.assert_close(within, around, rtol=error, atol=error)
    assert torch.equal(within.argmax(1), around.argmax(1))
    plain, _ = predict(net, data)
    expected = plain * (1 if scale is None else scale) + (0 if bias is None else bias)
    torch.testing.assert_close(around, expected.to(dtype), rtol=error, atol=error)


@pytest.mark.parametrize("scale, bias", NUMBERS, ids=["bias", "scale", "both"])
def test_a_log_softmax_takes_biases_and_no_scales(scale, bias):
    net = Small(nn.LogSoftmax(1)).eval()
    folded = fold_into_head(net, "head", scale, bias, data=images())
    if scale is not None:
        assert folded is None
        return
    within, _ = predict(net, images(), state=folded)
    around, _ = predict(Adjusted(net, scale, bias), images())
    torch.testing.assert_close(within, around.log_softmax(1))


def test_one_call_loads_either_file_and_a_plain_one_is_needed_for_neither(tmp_path):
    data = images()
    net = Small().eval()
    _, bias = NUMBERS[0]
    around = Adjusted(net, bias=bias)
    file = write_atomic(tmp_path / "around.safetensors", weights_bytes(around))
    twin = load_adjusted(Small().eval(), file)
    assert isinstance(twin, Adjusted)
    assert torch.equal(predict(twin, data)[0], predict(around, data)[0])

    folded = fold_into_head(net, "head", None, bias)
    moved = Small().eval()
    set_tensors(moved, folded)
    file = write_atomic(tmp_path / "within.safetensors", weights_bytes(moved))
    twin = load_adjusted(Small().eval(), file)
    assert type(twin) is Small
    assert torch.equal(predict(twin, data)[0].argmax(1), predict(around, data)[0].argmax(1))


PLAIN_PYTORCH = """
import sys, torch
from safetensors.torch import load_file
from torch import nn
class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
    def forward(self, x): return self.head(torch.tanh(self.body(x)))
state = load_file(sys.argv[1])
x = torch.load(sys.argv[2])
net = Small()
scale, bias = state.pop("scale", None), state.pop("bias", None)
net.load_state_dict({name.removeprefix("model."): t for name, t in state.items()})
z = net(x) if bias is None else scale * net(x) + bias
assert "hessian_surgery_nb" not in sys.modules
print(*z.argmax(1).tolist())
"""


def test_the_files_serve_a_process_without_this_package(tmp_path):
    X, y = images()
    net = Small().eval()
    scale, bias = NUMBERS[2]
    around = Adjusted(net, scale, bias)
    expected = predict(around, (X, y))[0].argmax(1).tolist()
    torch.save(X, tmp_path / "x.pt")
    moved = Small().eval()
    set_tensors(moved, fold_into_head(net, "head", scale, bias, data=(X, y)))
    for model in (around, moved):
        file = write_atomic(tmp_path / "w.safetensors", weights_bytes(model))
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_PYTORCH, str(file), str(tmp_path / "x.pt")],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert list(map(int, done.stdout.split())) == expected
