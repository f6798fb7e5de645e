"`operate`, `screen` and `spectrum` on networks and images of somebody's own: what works, and what is refused."
import json

import pytest
import torch
from torch import nn

from hessian_surgery_nb.cli import main
from hessian_surgery_nb.data import class_files, torchvision_part, write_toy_images
from hessian_surgery_nb.models import resnet20, weights_bytes, write_atomic
from hessian_surgery_nb.own import Preparation, load_network, own_sets

FACTORY = """
import torch
from hessian_surgery_nb.models import resnet20
def net(): return resnet20(classes=3, width=4, blocks=1)
def wide(): return resnet20(classes=5, width=4, blocks=1)
def broken(): raise RuntimeError("no")
class Pair(torch.nn.Module):
    def __init__(self): super().__init__(); self.body = net()
    def forward(self, x): return self.body(x), None
def pair(): return Pair()
def stiff(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 3))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    d = tmp_path_factory.mktemp("own")
    write_toy_images(d/"toys", train=30, test=16)
    (d/"mine.py").write_text(FACTORY)
    write_atomic(d/"w.safetensors", weights_bytes(resnet20(classes=3, width=4, blocks=1)))
    return d


def flags(d, model="net", **other):
    given = dict(model=f"{d}/mine.py:{model}", weights=f"{d}/w.safetensors", data=f"{d}/toys", hessian="32") | other
    return [x for k, v in given.items() if v is not None for x in (f"--{k}", v)]


def test_operate_leaves_everything_it_says(place, capsys, tmp_path):
    assert main(["operate", *flags(place), "--iterations", "2", "--scheme", "forward", "--json", "--out", str(tmp_path/"out")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path/"out"/"result.json").read_text()) and said["classes"] == ["colour0", "colour1", "colour2"] and "operate" in said["command"]
    assert load_network(f"{place}/mine.py:net", classes=3, weights=tmp_path/"out"/"weights.safetensors")[0](torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    page = (tmp_path/"out"/"report.html").read_text()
    assert "colour1" in page and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_two_runs_are_the_same(place, tmp_path):
    for name in ("a", "b"): assert main(["operate", *flags(place), "--iterations", "2", "--out", str(tmp_path/name)]) == 0
    a, b = (json.loads((tmp_path/n/"result.json").read_text()) for n in ("a", "b"))
    for r in (a, b): del r["timing"], r["command"]
    assert a == b and (tmp_path/"a"/"weights.safetensors").read_bytes() == (tmp_path/"b"/"weights.safetensors").read_bytes()


def test_a_torchvision_network_by_name(place, tmp_path, capsys):
    net = torchvision_part("models").resnet18(num_classes=3)
    write_atomic(tmp_path/"r18.safetensors", weights_bytes(net))
    assert main(["spectrum", *flags(place, model="net", weights=str(tmp_path/"r18.safetensors")), "--model", "torchvision:resnet18", "--resize", "16", "--crop", "16", "--params", "fc.*", "--spikes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 513 * 3


@pytest.mark.parametrize("change, says", [
    (dict(model="wide", weights=None), "has 5 outputs"), (dict(model="pair", weights=None), "returns tuple"), (dict(model="broken"), "raised RuntimeError: no"), (dict(model="stiff", weights=None), "refuses (2, 3, 16, 16)"), (dict(model="none"), "has no function 'none'"),
    (dict(weights="nowhere.safetensors"), "nowhere.safetensors is not there"), (dict(data="nowhere"), "nowhere is not"), (dict(hessian="0"), "at least 1"), (dict(batch="0"), "at least 1"),
    (dict(p="high"), "--p must be a number or auto"), (dict(iterations="0"), "at least 1"), (dict(spikes="-1"), "at least 1"), (dict(resize="0"), "resize and crop are pixels"), (dict(params="layer9.*"), "layer9"), (dict(eps="-1"), "positive")])
def test_faults_are_named_and_nothing_is_written(place, capsys, tmp_path, change, says):
    assert main(["operate", *flags(place, **change), "--out", str(tmp_path/"out")]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and not (tmp_path/"out").exists()


def test_weights_with_code_are_refused(place, capsys, tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path/"whole.pt") # a pickled module, not a state dict
    assert main(["screen", *flags(place, weights=str(tmp_path/"whole.pt"))]) == 2
    assert "weights_only=True" in capsys.readouterr().err


def test_sets_share_no_image(place):
    sets = own_sets(place/"toys"/"test", Preparation(), hessian=10, seed=3)
    rows = [tuple(x.flatten().tolist()) for s in (sets.hessian, sets.sensitivity, sets.held_out) for x in s.x]
    assert len(rows) == len(set(rows)) == sum(map(len, class_files(place/"toys"/"test").values()))
