"""`operate`, `screen` and `spectrum` on networks and images of somebody's own: what works, and
what is refused.
"""

import json

import jsonschema
import pytest
import torch
from torch import nn

from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.foundations.datasets import torchvision_part
from hessian_surgery_nb.foundations.images import class_files
from hessian_surgery_nb.foundations.weight_files import weights_bytes, write_atomic
from hessian_surgery_nb.app.own_network import own_sets
from hessian_surgery_nb.foundations.preparation import Preparation
from hessian_surgery_nb.foundations.loading import load_network

FACTORY = """
import torch
def wide(): return resnet20(classes=5, width=4, blocks=1)
def broken(): raise RuntimeError("no")
class Pair(torch.nn.Module):
    def __init__(self): super().__init__(); self.body = net()
    def forward(self, x): return self.body(x), None
def pair(): return Pair()
def stiff(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 3))
"""


@pytest.fixture(scope="module")
def place(lay_out):
    return lay_out("own", FACTORY, train=30, test=16)


def flags(d, model="net", **other):
    given = (
        dict(
            model=f"{d}/mine.py:{model}",
            weights=f"{d}/w.safetensors",
            data=f"{d}/toys",
            hessian="32",
        )
        | other
    )
    return [x for k, v in given.items() if v is not None for x in (f"--{k}", v)]


def test_operate_leaves_everything_it_says(place, capsys, tmp_path):
    assert (
        main(
            [
                "operate",
                *flags(place),
                "--iterations",
                "2",
                "--scheme",
                "forward",
                "--json",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert (
        said == json.loads((tmp_path / "out" / "result.json").read_text())
        and said["classes"] == ["colour0", "colour1", "colour2"]
        and "operate" in said["command"]
    )
    assert load_network(
        f"{place}/mine.py:net", classes=3, weights=tmp_path / "out" / "weights.safetensors"
    )[0](torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "colour1" in page
        and "<script" not in page
        and "://" not in page.replace("http://www.w3.org", "")
    )


def test_the_result_keeps_to_its_schema(place, tmp_path, capsys):
    assert (
        main(
            [
                "operate",
                *flags(place),
                "--iterations",
                "2",
                "--eps",
                "0.2",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
        and main(["schema"]) == 0
    )
    said, result = (
        capsys.readouterr().out,
        json.loads((tmp_path / "out" / "result.json").read_text()),
    )
    schema = json.loads(said[said.index("{") :])
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(result, schema)
    for change in (dict(change=None), dict(history=[{}]), dict(more=1)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(result | change, schema)


def test_compare_puts_every_method_on_the_same_images(place, tmp_path, capsys):
    assert (
        main(
            [
                "compare",
                *flags(place),
                "--iterations",
                "1",
                "--eps",
                "0.2",
                "--controls",
                "--draws",
                "1",
                "--json",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out" / "result.json").read_text())
    assert [m["method"] for m in said["methods"]] == [
        "no change",
        "surgery",
        "linearised surgery",
        "biases at that price",
        "tuned biases",
        "tuned biases and scales",
        "tau-norm",
        "logit adjustment",
        "class means",
        "gradients of classes",
        "head alone",
        "random subspace, same norm",
        "random subspace, own amplitude",
    ]
    assert {c["images"] for m in said["methods"] for c in m["held_out"]["classes"]} == {8}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tuned biases" in page and "<script" not in page
    flat = flags(place, data=f"{place}/toys/test")  # no training images to count
    assert (
        main(
            [
                "compare",
                *flat,
                "--iterations",
                "1",
                "--no-controls",
                "--json",
                "--out",
                str(tmp_path / "flat"),
            ]
        )
        == 0
    )
    assert [m["method"] for m in json.loads(capsys.readouterr().out)["methods"]] == [
        "no change",
        "surgery",
        "linearised surgery",
        "biases at that price",
        "tuned biases",
        "tuned biases and scales",
        "tau-norm",
    ]


def test_flags_from_a_file_do_what_flags_do(place, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        (
            f"weights: {place}/w.safetensors\ndata: {place}/toys\nhessian: 32\niterations: "
            "9\neps: 0.2\nmean: [0.4, 0.5, 0.6]\n"
        )
    )
    model = ["--model", f"{place}/mine.py:net"]
    assert (
        main(
            [
                "operate",
                *model,
                "--config",
                str(config),
                "--iterations",
                "2",
                "--out",
                str(tmp_path / "file"),
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "operate",
                *model,
                *flags(place)[2:],
                "--iterations",
                "2",
                "--eps",
                "0.2",
                "--mean",
                ".4",
                ".5",
                ".6",
                "--out",
                str(tmp_path / "flags"),
            ]
        )
        == 0
    )
    a, b = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("file", "flags"))
    assert {k: v for k, v in a.items() if k not in ("timing", "command")} == {
        k: v for k, v in b.items() if k not in ("timing", "command")
    }
    assert "--config" not in a["command"] and "--hessian=32" in a["command"]


def test_nothing_is_replaced_unasked(place, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("somebody's")
    again = ["operate", *flags(place), "--iterations", "1", "--eps", "0.2", "--out", str(out)]
    assert (
        main(again) == 2
        and "--force" in capsys.readouterr().err
        and [p.name for p in out.iterdir()] == ["report.html"]
        and (out / "report.html").read_text() == "somebody's"
    )
    assert main([*again, "--force"]) == 0 and "colour1" in (out / "report.html").read_text()


def test_verbose_logs_each_step(place, tmp_path, capsys):
    assert (
        main(
            [
                "operate",
                *flags(place),
                "--iterations",
                "2",
                "--eps",
                "0.2",
                "--verbose",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert capsys.readouterr().err.count(": sigma ") == 2
    assert (
        main(
            [
                "operate",
                *flags(place),
                "--iterations",
                "2",
                "--eps",
                "0.2",
                "--out",
                str(tmp_path / "quiet"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert ": sigma " not in said and said.count("accuracy  ") == 1


def test_products_in_small_pieces_are_the_same(place, capsys):
    def values(*more):
        assert main(["spectrum", *flags(place), "--spikes", "2", "--json", *more]) == 0
        return torch.tensor(json.loads(capsys.readouterr().out)["values"])

    torch.testing.assert_close(values("--micro-batch", "5"), values(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values("--precision", "bf16"), values(), rtol=0.1, atol=1e-2)


def test_two_runs_are_the_same(place, tmp_path):
    for name in ("a", "b"):
        assert (
            main(["operate", *flags(place), "--iterations", "2", "--out", str(tmp_path / name)])
            == 0
        )
    a, b = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("a", "b"))
    for r in (a, b):
        del r["timing"], r["command"]
    assert (
        a == b
        and (tmp_path / "a" / "weights.safetensors").read_bytes()
        == (tmp_path / "b" / "weights.safetensors").read_bytes()
    )


def test_a_torchvision_network_by_name(place, tmp_path, capsys):
    net = torchvision_part("models").resnet18(num_classes=3)
    write_atomic(tmp_path / "r18.safetensors", weights_bytes(net))
    assert (
        main(
            [
                "spectrum",
                *flags(place, model="net", weights=str(tmp_path / "r18.safetensors")),
                "--model",
                "torchvision:resnet18",
                "--resize",
                "16",
                "--crop",
                "16",
                "--params",
                "fc.*",
                "--spikes",
                "2",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["parameters"] == 513 * 3


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(model="wide", weights=None), "has 5 outputs"),
        (dict(model="pair", weights=None), "returns tuple"),
        (dict(model="broken"), "raised RuntimeError: no"),
        (dict(model="stiff", weights=None), "refuses (2, 3, 16, 16)"),
        (dict(model="none"), "has no function 'none'"),
        (dict(weights="nowhere.safetensors"), "nowhere.safetensors is not there"),
        (dict(data="nowhere"), "nowhere is not"),
        (dict(hessian="0"), "at least 1"),
        (dict(batch="0"), "at least 1"),
        (dict(p="auto"), "the rule behind 'auto' is gone"),
        (dict(iterations="0"), "at least 1"),
        (dict(spikes="-1"), "at least 1"),
        (dict(resize="0"), "resize and crop are pixels"),
        (dict(params="layer9.*"), "layer9"),
        (dict(eps="-1"), "positive"),
    ],
)
def test_faults_are_named_and_nothing_is_written(place, capsys, tmp_path, change, says):
    assert main(["operate", *flags(place, **change), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_weights_with_code_are_refused(place, capsys, tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")  # a pickled module, not a state dict
    assert main(["screen", *flags(place, weights=str(tmp_path / "whole.pt"))]) == 2
    assert "weights_only=True" in capsys.readouterr().err


def test_sets_share_no_image(place):
    sets = own_sets(place / "toys" / "test", Preparation(), hessian=10, seed=3)
    rows = [
        tuple(x.flatten().tolist())
        for s in (sets.hessian, sets.sensitivity, sets.held_out)
        for x in s.x
    ]
    assert (
        len(rows) == len(set(rows)) == sum(map(len, class_files(place / "toys" / "test").values()))
    )


def test_a_dry_run_plans_the_directions_that_were_asked_for(place, capsys, tmp_path):
    for directions, searched in (("spikes", True), ("class_means", False), ("random", False)):
        assert (
            main(
                [
                    "operate",
                    *flags(place),
                    "--directions",
                    directions,
                    "--iterations",
                    "2",
                    "--dry-run",
                    "--json",
                    "--out",
                    str(tmp_path / "no"),
                ]
            )
            == 0
        )
        p = json.loads(capsys.readouterr().out)
        assert (
            (p["products"] > 0) == searched
            and p["spikes"] == 2
            and p["seconds"] > 0
            and not (tmp_path / "no").exists()
        )


def test_spectrum_compares_training_with_test_images(place, capsys):
    f = flags(place)
    net, rest, data = f[: f.index("--data")], f[f.index("--data") + 2 :], f[f.index("--data") + 1]
    both = ["--train", f"{data}/train", "--test", f"{data}/test"]
    assert main(["spectrum", *net, *rest, *both, "--spikes", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["generalisation"]
    assert told["verdict"] in ("plausible", "doubtful", "open", "not applicable") and [
        c["limit"] for c in told["checks"]
    ] == ["> -0.6", "< 1.5", "< 1.2"]
    assert (
        main(["spectrum", *net, *rest, *both, "--spikes", "2"]) == 0
        and told["text"] in capsys.readouterr().out
    )
    for wrong in (both[:2], both[2:], [*both, "--data", data], []):
        assert (
            main(["spectrum", *net, *rest, *wrong]) == 2
            and "give --data, or both of the others" in capsys.readouterr().err
        )
    assert (
        main(["spectrum", *net, *rest, *both[:3], f"{data}/nowhere"]) == 2
        and "nowhere is not" in capsys.readouterr().err
    )
