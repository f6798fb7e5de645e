"Same seed, same result; the caller's model is left as it was; the demo does what the README says."

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hessian_surgery_nb.comparison import compare
from hessian_surgery_nb.effective_rank import screen
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.lanczos import top_eigenpairs
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.sensitivity import sensitivity_matrix
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.spike_validation import bulk_walk, count_spikes
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate

loss = nn.CrossEntropyLoss()


def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 3


H, S, O = images(24, 0), images(30, 1), images(30, 2)
QUICK = SurgeryConfig(iterations=2, num_spikes=2)


def model():
    """Some parameters frozen, some with gradients, batch norm with history, one module left in
    training mode on purpose.
    """
    net = digits_net(classes=3, width=2, seed=0)
    net(images(8, 3)[0])
    net.eval()
    net[2].train()
    net[0].weight.requires_grad_(False)
    net[8].bias.grad = torch.ones(3)
    return net


def state(net):
    return (
        [
            (
                k,
                p.detach().clone(),
                p.requires_grad,
                None if p.grad is None else p.grad.clone(),
                p.data_ptr(),
            )
            for k, p in net.named_parameters()
        ],
        [(k, b.clone()) for k, b in net.named_buffers()],
        [m.training for m in net.modules()],
    )


def same(a, b):
    eq = lambda x, y: torch.equal(x, y) if torch.is_tensor(x) else x == y
    return a[2] == b[2] and all(all(map(eq, x, y)) for x, y in zip(a[0] + a[1], b[0] + b[1]))


CALLS = {
    "product": lambda m, f: [
        HessianOperator(m, f, H, mode=mode, reduction="mean")
        @ torch.ones(HessianOperator(m, f, H).shape[0])
        for mode in ("cached", "recomputed", "forward")
    ],
    "gauss-newton": lambda m, f: (
        HessianOperator(m, f, H, kind="gauss_newton", reduction="mean")
        @ torch.ones(HessianOperator(m, f, H).shape[0])
    ),
    "check": lambda m, f: HessianOperator(m, f, H, reduction="mean").check(),
    "eigenpairs": lambda m, f: top_eigenpairs(HessianOperator(m, f, H), 2),
    "density": lambda m, f: spectral_density(HessianOperator(m, f, H), num_probes=2, num_matvecs=3),
    "sensitivity": lambda m, f: sensitivity_matrix(
        m, top_eigenpairs(HessianOperator(m, f, H), 2), S, eps=0.1
    ),
    "count": lambda m, f: count_spikes(m, f, H, candidates=3, resamples=2),
    "walk": lambda m, f: bulk_walk(m, f, H, O, num_spikes=2, steps=2),
    "operate": lambda m, f: operate(m, f, H, S, held_out=O, config=QUICK, progress=False),
    "compare": lambda m, f: compare(
        m, f, H, S, O, config=QUICK, progress=False, steps=3, controls=True, draws=1
    ),
    "screen": lambda m, f: screen(m, f, H, S, num_spikes=2),
}


class Boom(Exception):
    pass


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fails", [False, True], ids=["runs", "loss raises"])
def test_the_callers_model_is_left_as_it_was(name, fails):
    net, calls = model(), []

    def loss_fn(z, y):
        calls.append(1)
        if fails and len(calls) > 5:
            raise Boom  # past the first look at the loss
        return loss(z, y)

    before, rng = state(net), torch.get_rng_state()
    try:
        CALLS[name](net, loss_fn)
    except Boom:
        assert fails
    assert same(before, state(net)) and torch.equal(rng, torch.get_rng_state())
    assert calls


def test_same_seed_same_result_in_one_process():
    net = model()
    a, b = (
        compare(net, loss, H, S, O, config=QUICK, progress=False, steps=3, controls=True, draws=1)
        for _ in range(2)
    )
    assert a.to_dict() == b.to_dict()
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            a.surgery.model.state_dict().values(), b.surgery.model.state_dict().values()
        )
    )


def test_another_seed_moves_the_random_control():
    net = model()
    first, second = (
        operate(
            net,
            loss,
            H,
            S,
            config=SurgeryConfig(
                iterations=1,
                num_spikes=2,
                directions="random",
                eps=0.3,
                rollback_sigma=1.0,
                rollback_drop=1.0,
                seed=s,
            ),
            progress=False,
        )
        for s in (0, 1)
    )
    assert first.history[0].alpha != second.history[0].alpha


def cli(*argv, cwd):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from hessian_surgery_nb.app.cli import main; sys.exit(main())",
            *argv,
        ],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
    )


def without(d, *keys):
    if isinstance(d, dict):
        return {k: without(v, *keys) for k, v in d.items() if k not in keys}
    return [without(v, *keys) for v in d] if isinstance(d, list) else d


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.alts, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.links += [a[k] for k in ("src", "href") if k in a]
        if tag == "img":
            self.alts.append(a.get("alt", ""))
        if tag not in ("img", "meta", "link", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_demo_in_two_processes(tmp_path):
    runs = [
        cli("demo", "--out", name, "--iterations", "3", *extra, cwd=tmp_path)
        for name, extra in (("a", []), ("b", ["--json"]))
    ]
    assert [r.returncode for r in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    for r in ("a", "b"):
        assert sorted(p.name for p in (tmp_path / r).iterdir()) == [
            "report.html",
            "result.json",
            "weights.safetensors",
        ]
    a, b = (json.loads((tmp_path / r / "result.json").read_text()) for r in ("a", "b"))
    assert without(a, "timing", "command") == without(b, "timing", "command")
    assert json.loads(runs[1].stdout) == b
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (
        tmp_path / "b/weights.safetensors"
    ).read_bytes()
    strip = lambda p: p.read_text().replace("--out a", "").replace("--out b", "")
    assert strip(tmp_path / "a/report.html") == strip(tmp_path / "b/report.html")

    # the terminal, the page and the JSON tell one story
    surgery = a["runs"][0]["surgery"]
    assert (
        surgery["after"]["sigma_pp"] < surgery["before"]["sigma_pp"]
        and surgery["after"]["measured_on"] == "held_out"
    )
    for text in (runs[0].stdout, (tmp_path / "a/report.html").read_text()):
        assert (
            f"from {surgery['before']['sigma_pp']:.1f} to {surgery['after']['sigma_pp']:.1f} pp"
            in text
        )
        for m in a["summary"]:
            assert re.search(
                re.escape(m["method"]) + r"\D+" + re.escape(f"{m['sigma_pp']['mean']:.1f}"), text
            )
    assert len(load_file(tmp_path / "a/weights.safetensors")) == len(digits_net().state_dict())

    page = Page()
    page.feed((tmp_path / "a/report.html").read_text())
    assert (
        all(link.startswith("data:") for link in page.links)
        and len(page.alts) == 6
        and all(page.alts)
        and page.open == ["html"] * page.open.count("html")
    )


def test_seeds_give_intervals(tmp_path):
    r = cli("demo", "--out", "s", "--iterations", "1", "--seeds", "2", "--json", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    result = json.loads(r.stdout)
    assert [x["seed"] for x in result["runs"]] == [0, 1]
    row = next(m for m in result["summary"] if m["method"] == "surgery")
    sigmas = [x["surgery"]["after"]["sigma_pp"] for x in result["runs"]]
    assert (
        row["sigma_pp"]["mean"] == pytest.approx(sum(sigmas) / 2)
        and row["sigma_pp"]["low95"] < min(sigmas) < max(sigmas) < row["sigma_pp"]["high95"]
    )


def test_help_names_units_and_defaults(tmp_path):
    r = cli("demo", "--help", cwd=tmp_path)
    assert r.returncode == 0 and "percentage points" in r.stdout and "default: 15" in r.stdout
    bare = cli(cwd=tmp_path)
    assert bare.returncode == 0 and "Exit codes: 0 done" in bare.stdout
    assert cli("--version", cwd=tmp_path).stdout.startswith("hessian_surgery_nb 0.1.0")


def test_result_round_trip(tmp_path):
    net = model()
    result = operate(net, loss, H, S, held_out=O, config=QUICK, progress=False)
    result.save(tmp_path / "out")
    loaded = load_file(tmp_path / "out/weights.safetensors")
    assert {k: v.dtype for k, v in loaded.items()} == {
        k: v.dtype for k, v in net.state_dict().items()
    }
    fresh = copy.deepcopy(net)
    fresh.load_state_dict(loaded)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), result.model.state_dict().values())
    )
    assert (tmp_path / "out/history.csv").read_text().count("\n") == 1 + QUICK.iterations
    assert torch.equal(loaded["0.weight"], net[0].weight)  # frozen: surgery may not move it
