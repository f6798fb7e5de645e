"""Whatever is wrong with what a user passes: an InputError that names the rule, the value and the
way out, and nothing on disk.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from hessian_surgery_nb.comparison import compare
from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.effective_rank import screen
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs
from hessian_surgery_nb.sensitivity import sensitivity_matrix
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.foundations.weight_files import write_atomic
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate
from hessian_surgery_nb.foundations.testbed import tiny_data, tiny_mlp
from hessian_surgery_nb.foundations.accuracy import class_report

NAMES = ("cat", "dog", "ship")
loss = nn.CrossEntropyLoss()


def sets(seed=0):
    X, y = tiny_data(90, seed=seed)
    return [(X[i : i + 30], y[i : i + 30]) for i in (0, 30, 60)]


def run(model=None, hessian=None, sensitivity=None, held_out=None, loss_fn=loss, **kw):
    h, s, o = sets()
    given = lambda value, default: default if value is None else value
    return operate(
        given(model, tiny_mlp()),
        loss_fn,
        given(hessian, h),
        given(sensitivity, s),
        held_out=given(held_out, o),
        names=NAMES,
        progress=False,
        config=SurgeryConfig(**{"iterations": 1, **kw}),
    )


def damaged(t, value, at=0):
    t = t.clone()
    t.view(-1)[at] = value
    return t


def net_with(value):
    net = tiny_mlp()
    with torch.no_grad():
        net[0].weight[0, 0] = value
    return net


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny_mlp()

    def forward(self, x):
        return self.net(x), x


H, S, O = sets()
nan, inf = float("nan"), float("inf")
FAULTS = {
    "class missing": (
        dict(sensitivity=(S[0][S[1] != 1], S[1][S[1] != 1])),
        (
            r"every class must have an image in the sensitivity set\. Class 1 \(dog\) has none; "
            r"pass a stratified set"
        ),
    ),
    "class missing, held out": (
        dict(held_out=(O[0][O[1] != 2], O[1][O[1] != 2])),
        r"Class 2 \(ship\) has none",
    ),
    "label too large, hessian": (
        dict(hessian=(H[0], damaged(H[1], 3))),
        r"labels must lie in 0\.\.2.*Got 0\.\.3; relabel",
    ),
    "label too large, sensitivity": (
        dict(sensitivity=(S[0], damaged(S[1], 7))),
        r"labels must lie in 0\.\.2.*Got 0\.\.7",
    ),
    "label too large, held out": (
        dict(held_out=(O[0], damaged(O[1], 3))),
        r"labels must lie in 0\.\.2",
    ),
    "label negative": (dict(sensitivity=(S[0], damaged(S[1], -1))), r"Got -1\.\.2"),
    "label negative, hessian": (dict(hessian=(H[0], damaged(H[1], -1))), r"Got -1\.\.2"),
    "labels as floats": (
        dict(sensitivity=(S[0], S[1].double())),
        r"labels must be one whole number an image.*y\.long\(\)",
    ),
    "labels one-hot": (dict(sensitivity=(S[0], torch.eye(3)[S[1]].long())), r"shape \(30, 3\)"),
    "labels one-hot, hessian": (
        dict(hessian=(H[0], torch.eye(3)[H[1]].long())),
        r"\(30, 3\) for logits of shape \(30, 3\).*y\.argmax\(1\)",
    ),
    "labels in a column, hessian": (dict(hessian=(H[0], H[1][:, None])), r"\(30, 1\)"),
    "labels as floats, hessian": (
        dict(hessian=(H[0], H[1].float())),
        r"the loss must accept logits and labels.*float32 \(30,\)",
    ),
    "fewer labels than images": (
        dict(sensitivity=(S[0], S[1][:-1])),
        r"equally many\. Got 30 and 29",
    ),
    "no images": (dict(held_out=(O[0][:0], O[1][:0])), r"at least one image"),
    "whole-number images": (
        dict(hessian=(H[0].long(), H[1])),
        r"the network must accept the inputs\. Given int64 \(30, 6\)",
    ),
    "wrong shape": (
        dict(sensitivity=(S[0][:, :4], S[1])),
        r"the network must accept the inputs\. Given float64 \(30, 4\)",
    ),
    "arrays": (dict(sensitivity=[(S[0].numpy(), S[1].numpy())]), r"torch\.as_tensor"),
    "shuffling loader": (
        dict(
            sensitivity=torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(*S), batch_size=8, shuffle=True
            )
        ),
        r"shuffle=False",
    ),
    "loss class": (
        dict(loss_fn=nn.CrossEntropyLoss),
        r"pass an instance such as nn\.CrossEntropyLoss\(\)",
    ),
    "no loss": (dict(loss_fn=None), r"loss_fn must be a function"),
    "loss of every image": (
        dict(loss_fn=nn.CrossEntropyLoss(reduction="none")),
        r"a loss must return one number.*Got shape \(30,\)",
    ),
    "loss as a float": (dict(loss_fn=lambda z, t: 1.0), r"Got float"),
    "class weights too short": (
        dict(loss_fn=nn.CrossEntropyLoss(weight=torch.ones(2).double())),
        r"the loss must accept logits and labels.*class weights",
    ),
    "not a network": (dict(model=lambda x: x), r"must be a torch\.nn\.Module\. Got function"),
    "network without parameters": (dict(model=nn.Flatten()), r"must have parameters"),
    "half a spike": (dict(num_spikes=2.5), r"num_spikes must be a whole number\. Got 2\.5"),
    "too many random directions": (
        dict(num_spikes=84, directions="random"),
        r"n = 83 parameters\. Got 84",
    ),
    "percent for a fraction": (
        dict(tau=85.0),
        r"tau must be a fraction in 0\.\.1, not percent\. Got 85",
    ),
    "unknown scheme": (dict(scheme="backward"), r"'central' or 'forward'"),
    "nan weight": (
        dict(model=net_with(nan)),
        r"(weights|logits) must be finite.*load another checkpoint",
    ),
    "infinite weight": (
        dict(model=net_with(inf)),
        r"(weights|logits) must be finite.*load another checkpoint",
    ),
    "nan image, hessian": (
        dict(hessian=(damaged(H[0], nan), H[1])),
        r"inputs must be finite\. Rows \[0\] of a batch.*remove or mend",
    ),
    "infinite image, sensitivity": (
        dict(sensitivity=(damaged(S[0], inf, 13), S[1])),
        r"inputs must be finite\. Rows \[2\]",
    ),
    "nan image, held out": (dict(held_out=(damaged(O[0], nan), O[1])), r"inputs must be finite"),
    "nan loss": (dict(loss_fn=lambda z, t: loss(z, t) * nan), r"the loss must be finite\. Got nan"),
    "nan loss, batches": (
        dict(
            loss_fn=lambda z, t: loss(z, t) * nan,
            hessian=[(H[0][:20], H[1][:20]), (H[0][20:], H[1][20:])],
        ),
        r"the loss must be finite\. Got nan",
    ),
    "infinite class weight": (
        dict(
            loss_fn=nn.CrossEntropyLoss(weight=torch.tensor([1.0, inf, 1.0], dtype=torch.float64))
        ),
        r"the loss must be finite\. Got",
    ),
    "overlap": (
        dict(held_out=S),
        r"sets sensitivity and held_out must be disjoint.*share 30 input\(s\).*remove",
    ),
    "one shared image": (
        dict(hessian=(torch.cat([H[0], O[0][4:5]]), torch.cat([H[1], O[1][4:5]]))),
        (
            r"hessian and held_out must be disjoint.*share 1 input\(s\), the first is row 30 of "
            r"hessian and row 4 of held_out"
        ),
    ),
    "too many spikes": (
        dict(num_spikes=84),
        r"k must lie in 1\.\.n, n = 83 parameters\. Got k = 84; ask for fewer",
    ),
    "eps zero": (dict(eps=0.0), r"eps must be positive\. Got 0\.0"),
    "eps negative": (dict(eps=-1.0), r"eps must be positive\. Got -1\.0"),
    "eps nan": (dict(eps=nan), r"eps must be positive"),
    "unknown schedule": (
        dict(schedule="linear"),
        (
            r"schedule must be 'gamma' or 'adam'\. Got 'linear'|schedule must be 'adam' or "
            r"'gamma'\. Got 'linear'"
        ),
    ),
    "unknown params": (dict(params="layer4.*"), r"'layer4\.\*' matches none of 4"),
    "tuple output": (
        dict(model=Pair().eval()),
        r"must return one tensor of logits\. Got a tuple; pass forward=",
    ),
    "training mode": (
        dict(model=nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()),
        r"active dropout; call model\.eval\(\)",
    ),
    "half precision": (
        dict(
            model=tiny_mlp().half(),
            hessian=(H[0].half(), H[1]),
            sensitivity=(S[0].half(), S[1]),
            held_out=(O[0].half(), O[1]),
        ),
        r"at least single precision.*model\.float\(\)",
    ),
    "another type": (
        dict(sensitivity=(S[0].float(), S[1])),
        r"one type\. Got torch\.float32 inputs for a torch\.float64 network",
    ),
    "raw bytes": (dict(sensitivity=((S[0] * 10).byte(), S[1])), r"raw bytes \(uint8\)"),
    "empty": (dict(sensitivity=[]), r"at least one batch"),
    "empty list of batches, hessian": (dict(hessian=[]), r"at least one batch"),
    "one-shot": (dict(sensitivity=iter([S])), r"one-shot"),
    "not data": (dict(sensitivity={"x": S[0]}), r"data must be a pair"),
    "one output": (
        dict(
            model=nn.Sequential(nn.Linear(6, 1)).double(),
            sensitivity=(S[0], S[1] * 0),
            hessian=(H[0], H[1] * 0),
            held_out=(O[0], O[1] * 0),
        ),
        r"each of the 1 outputs\. Got 3",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_changes(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kwargs, message = FAULTS[fault]
    model = kwargs.get("model")
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(InputError, match=message):
        run(**kwargs)
    for k, v in before.items():
        assert torch.equal(v, model.state_dict()[k]) or v.isnan().any()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: top_eigenpairs(torch.eye(5), 6), r"Got k = 6"),
        (lambda: top_eigenpairs(torch.eye(5), 0), r"Got k = 0"),
        (lambda: top_eigenpairs(torch.ones(2, 3), 1), r"square\. Got shape \(2, 3\)"),
        (lambda: top_eigenpairs(torch.eye(5), 1, tol=0.0), r"tol must be positive"),
        (lambda: top_eigenpairs(torch.eye(5), 1, v0=torch.zeros(5)), r"not zero"),
        (lambda: top_eigenpairs("H", 1), r"Got str"),
        (lambda: spectral_density(torch.eye(5), num_matvecs=0), r"at least 1"),
        (
            lambda: sensitivity_matrix(
                tiny_mlp(), torch.eye(83, 2, dtype=torch.float64), S, eps=-1.0
            ),
            r"eps must be positive and finite",
        ),
        (lambda: HessianOperator(tiny_mlp(), loss, H) @ torch.ones(5), r"83 entries"),
        (
            lambda: sensitivity_matrix(
                tiny_mlp(), 100 * torch.eye(83, 2, dtype=torch.float64), S, eps=0.1
            ),
            r"length 1\. Got 100 to 100",
        ),
        (
            lambda: sensitivity_matrix(
                tiny_mlp(), nan * torch.eye(83, 2, dtype=torch.float64), S, eps=0.1
            ),
            r"length 1\. Got nan",
        ),
        (lambda: top_eigenpairs(torch.eye(5), 2.0), r"k must be a whole number"),
        (
            lambda: top_eigenpairs(torch.eye(5).long(), 1),
            r"floating-point numbers\. Got torch\.int64",
        ),
        (lambda: screen(tiny_mlp(), loss, H, H), r"must be disjoint"),
        (lambda: screen(tiny_mlp(), loss, H, S, eps=0.0), r"eps must be positive"),
        (lambda: screen(tiny_mlp(), loss, H, S, num_spikes=0), r"Got k = 0"),
        (lambda: compare(tiny_mlp(), loss, H, S, S), r"must be disjoint"),
        (
            lambda: compare(tiny_mlp(), loss, H, S, O, counts=[1, 2]),
            r"each of the 3 classes\. Got 2 numbers",
        ),
        (lambda: compare(tiny_mlp(), loss, H, S, O, steps=1), r"steps must be at least 2"),
        (lambda: class_report(tiny_mlp(), S, names=("a", "b")), r"each of the 3 outputs\. Got 2"),
        (lambda: class_report(net_with(nan), S), r"logits must be finite"),
        (
            lambda: operate(
                tiny_mlp(), loss, [([torch.ones(1), torch.ones(3)], torch.tensor([0, 1]))], S
            ),
            r"check_overlap=False",
        ),
        (
            lambda: HessianOperator(tiny_mlp(), loss, H, kind="fisher"),
            r"'hessian' or 'gauss_newton'",
        ),
    ],
)
def test_other_calls(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1. Got 0"),
        (["--iterations", "-3"], "--iterations must be at least 1. Got -3"),
        (["--seed", "-1"], "--seed must lie in"),
    ],
)
def test_command_line_faults(argv, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "new"), *argv]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.startswith("hessian-surgery: ")
        and message in err
        and "Traceback" not in err
    )
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file(tmp_path, capsys):
    taken = tmp_path / "report"
    taken.write_text("mine")
    assert main(["demo", "--out", str(taken)]) == 2
    assert main(["demo", "--out", str(taken / "below")]) == 2
    assert (
        capsys.readouterr().err.count("--out: the output must be a directory") == 2
        and taken.read_text() == "mine"
    )


def test_a_full_disk_is_named_and_leaves_no_part(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        write_atomic(tmp_path / "x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_uncertified_pairs_are_flagged():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = top_eigenpairs(torch.diag(torch.linspace(1, 2, 50)), 5, max_matvecs=7)
    assert not pairs.converged.all() and "not certified" in str(caught[0].message)
