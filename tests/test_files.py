"""Images, folders and weights that come from elsewhere: read rightly, or refused with the file's
name.
"""

import json
import os
import shutil
import threading
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.foundations.datasets import (
    image_folder,
    torchvision_part,
    write_toy_images,
)
from hessian_surgery_nb.foundations.images import class_files, read_image
from hessian_surgery_nb.foundations.splits import check_disjoint
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.isic import is_isic, read_isic, write_toy_isic
from hessian_surgery_nb.foundations.networks import copy_model
from hessian_surgery_nb.foundations.weight_files import (
    check_storable,
    load_weights,
    weights_bytes,
    write_atomic,
)
from hessian_surgery_nb.app.first_answers import check_labels
from hessian_surgery_nb.app.own_network import network_labels, own_sets
from hessian_surgery_nb.foundations.loading import load_network
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate

RAMP = np.linspace(0, 65535, 1024).reshape(32, 32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HESSIAN_SURGERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toys(tmp_path):
    write_toy_images(tmp_path / "toys", train=6, test=8)
    return tmp_path / "toys"


# --- images


@pytest.mark.parametrize(
    "name, values",
    [
        ("a.png", RAMP.astype(np.uint16)),
        ("a.tif", RAMP.astype(np.uint16)),
        ("a.tiff", RAMP.astype(">u2")),
        ("a.pgm", RAMP.astype(np.uint16)),
        ("b.tif", (RAMP / 65535).astype(np.float32)),
        ("c.png", (RAMP / 257).astype(np.uint8)),
    ],
)
def test_grey_levels_keep_their_place(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert read.shape == (3, 32, 32) and torch.equal(read[0], read[2])
    assert (
        read[0].double() - torch.tensor(RAMP / 257)
    ).abs().max() <= 1  # eight bits: a level up or down


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.int32),
        -RAMP.astype(np.int32),
        (RAMP / 257).astype(np.float32),
        np.full((4, 4), np.nan, np.float32),
    ],
)
def test_grey_levels_without_a_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "wide.tif")
    with pytest.raises(InputError, match=r"wide\.tif is not.*scale them yourself"):
        read_image(tmp_path / "wide.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_kinds_of_images_become_rgb(tmp_path, mode):
    picture = (
        Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).convert("LA").convert("PA")
        if mode == "PA"
        else Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).convert(mode)
    )
    picture.save(tmp_path / "white.tif")
    assert (read_image(tmp_path / "white.tif") >= 254).all()  # white is white in each of them


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.png", b""),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(50)),
        ("a.webp", b"RIFF\x10\x00\x00\x00WEBPVP8 " + bytes(9)),
        ("a.tif", b"II*\x00\x08\x00\x00\x00\xff\xff" + bytes(30)),
        ("a.pgm", b"P5\n9 x\n"),
    ],
)
def test_damaged_images_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_image(tmp_path / name)


# --- folders


def test_what_systems_leave_behind_is_no_image(toys):
    want = class_files(toys / "train")
    one = toys / "train" / "colour0"
    for junk in (
        one / ".ipynb_checkpoints" / "000.png",
        one / "__MACOSX" / "000.png",
        one / "._000.png",
        one / ".hidden.png",
        toys / "train" / ".git" / "a.png",
        toys / "train" / "__MACOSX" / "a.png",
    ):
        junk.parent.mkdir(exist_ok=True)
        shutil.copy(one / "000.png", junk)
    for junk in ("Thumbs.db", ".DS_Store", "labels.csv"):
        (one / junk).write_bytes(b"x")
    assert class_files(toys / "train") == want


def test_links_are_followed_as_torchvision_does(toys, tmp_path):
    shutil.copytree(toys / "train" / "colour0", tmp_path / "more" / "deep")
    (toys / "train" / "colour0" / "more").symlink_to(tmp_path / "more")
    shutil.move(toys / "train" / "colour1", tmp_path / "elsewhere")
    (toys / "train" / "colour1").symlink_to(tmp_path / "elsewhere")
    (toys / "train" / "colour2" / "again.PNG").symlink_to(toys / "train" / "colour2" / "000.png")
    Image.open(toys / "train" / "colour2" / "001.png").convert("L").save(
        toys / "train" / "colour2" / "grey.pgm"
    )
    theirs = torchvision_part("datasets").ImageFolder(toys / "train")
    ours = [
        (str(f), i) for i, files in enumerate(class_files(toys / "train").values()) for f in files
    ]
    assert sorted(ours) == sorted(theirs.samples) and len(ours) == 12 + 6 + 8
    (toys / "train" / "colour0" / "round").symlink_to(
        toys / "train"
    )  # torchvision goes round until paths are too long
    assert len(class_files(toys / "train")["colour0"]) > 12  # the other classes, once


@pytest.mark.parametrize("place", ["test/colour1/gone.png", "test/colour1/gone", "test/gone"])
def test_links_to_nowhere_are_named(toys, place):
    (toys / place).symlink_to("/nowhere")
    with pytest.raises(InputError, match=r"gone.* leads to /nowhere"):
        own_sets(toys)


@pytest.mark.parametrize(
    "tear", [lambda b: b[:500], lambda b: b[:4], lambda b: b"", lambda b: b[:-100]]
)
def test_a_torn_cache_is_made_anew(toys, cache, tear):
    whole = image_folder(toys / "train")
    kept = next(cache.glob("*.safetensors"))
    good = kept.read_bytes()
    kept.write_bytes(tear(good))
    assert torch.equal(image_folder(toys / "train").x, whole.x) and kept.read_bytes() == good


def test_a_cache_of_other_images_is_not_taken(toys, cache):
    whole = image_folder(toys / "train")
    kept = next(cache.glob("*.safetensors"))
    save_file(dict(x=load_file(kept)["x"][:5].clone()), kept)
    assert torch.equal(image_folder(toys / "train").x, whole.x)


def test_tables_that_macos_hides_are_not_read(tmp_path):
    write_toy_isic(tmp_path / "isic")
    images = len(read_isic(tmp_path / "isic"))
    for name in ("._ISIC_2019_Training_GroundTruth.csv", "._ISIC_2019_Training_Metadata.csv"):
        (tmp_path / "isic" / name).write_bytes(b"\0\5\26\7")
    assert len(read_isic(tmp_path / "isic")) == images
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "._GroundTruth.csv").write_bytes(b"")
    assert not is_isic(tmp_path / "none")


def test_offsets_beside_words_cannot_be_compared():
    bags = dict(input=torch.arange(12), offsets=torch.tensor([0, 4, 8]))
    with pytest.raises(
        InputError, match=r"one of shape \(12,\) for 3 labels; pass check_overlap=False"
    ):
        check_disjoint(a=[(bags, torch.arange(3))])


# --- the order of classes


def numbered(toys, n=12, test=8):
    shutil.rmtree(toys)
    write_toy_images(toys, classes=n, train=2, test=test)
    for part in ("train", "test"):
        for i in range(n):
            (toys / part / f"colour{i}").rename(toys / part / str(i + 1))
    return toys


def test_numbers_have_two_orders_and_a_warning_says_so(toys):
    with pytest.warns(
        UserWarning,
        match=r"output 1 is '2'; by name, as torchvision's ImageFolder, it is '10'.*--class-order",
    ):
        assert own_sets(numbered(toys), hessian=6).classes == tuple(str(i + 1) for i in range(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sets = own_sets(toys, order="name", hessian=6)
        assert list(sets.classes) == torchvision_part("datasets").ImageFolder(toys / "test").classes
        assert own_sets(toys, order="natural").classes == tuple(str(i + 1) for i in range(12))


def test_names_with_one_order_need_no_warning(toys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert own_sets(toys).classes == ("colour0", "colour1", "colour2")


FACTORY = """
import torch
class Blind(torch.nn.Module):
    def __init__(self): super().__init__(); self.net = resnet20(classes=3, width=4, blocks=1)
    def forward(self, x): return self.net(x)
def labelled():
    net = Blind()
    net.label_names = ["colour2", "colour0", "colour1"]
    return net
def strange():
    net = Blind()
    net.pretrained_cfg = dict(label_names=["tench", "shark", "hen"])
    return net
"""


def test_a_network_that_knows_its_classes_decides(toys, lay_out, capsys, tmp_path):
    place = lay_out("labels", FACTORY, train=6, test=8)
    flags = [
        "--model",
        f"{place}/mine.py:labelled",
        "--data",
        str(place / "toys"),
        "--hessian",
        "12",
        "--iterations",
        "1",
        "--eps",
        "0.1",
    ]
    for given, classes in (
        ([], ["colour2", "colour0", "colour1"]),
        (["--class-order", "network"], ["colour2", "colour0", "colour1"]),
        (["--class-order", "name"], ["colour0", "colour1", "colour2"]),
    ):
        assert (
            main(
                [
                    "operate",
                    *flags,
                    *given,
                    "--json",
                    "--out",
                    str(tmp_path / f"out{len(given)}{given[-1:]}"),
                ]
            )
            == 0
        )
        out, err = capsys.readouterr()
        assert json.loads(out)["classes"] == classes and ("another order" in err) == (
            given[-1:] == ["name"]
        )
    flags[1] = f"{place}/mine.py:strange"
    assert (
        main(["operate", *flags, "--class-order", "network", "--out", str(tmp_path / "no")]) == 2
        and "It has tench, shark, hen" in capsys.readouterr().err
    )
    assert network_labels(load_network(flags[1], classes=3)[0]) == ("tench", "shark", "hen")


class Knows(nn.Module):
    "Tells the class by the colour of the image's middle, in an order of its own."

    def __init__(self, means, order):
        super().__init__()
        self.means, self.scale = nn.Parameter(means[order]), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return -self.scale * torch.cdist(x[:, :, 6:10, 6:10].mean((2, 3)), self.means)


def test_an_order_that_is_not_the_networks_is_refused(toys):
    rng = np.random.default_rng(0)
    for folder in numbered(toys, test=20).glob("*/*"):
        for f in folder.iterdir():  # a colour a class, easily told
            colour = (
                20 * int(folder.name) * np.array([1, -1, 0])
                + np.array([0, 250, 128])
                + rng.integers(-3, 4, (16, 16, 3))
            )
            Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(f)
    sets = own_sets(toys, order="natural", hessian=6)
    x = sets.sensitivity.preparation.inputs(sets.sensitivity.x)[:, :, 6:10, 6:10].mean((2, 3))
    means = torch.stack([x[sets.sensitivity.y == c].mean(0) for c in range(12)])
    by_name = [int(n) - 1 for n in sorted(sets.classes)]
    check_labels(Knows(means, list(range(12))).eval(), sets)
    with pytest.raises(InputError, match="give --class-order name"):
        check_labels(Knows(means, by_name).eval(), sets)
    with pytest.warns(UserWarning, match="see --class-order"):
        check_labels(Knows(means, by_name).eval(), sets, chosen=True)
    with pytest.warns(UserWarning, match="below chance"):
        check_labels(Knows(means, [11, *range(11)]).eval(), sets)


# --- weights


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()


def stored(tmp_path, what):
    torch.save(what, tmp_path / "w.pt")
    return tmp_path / "w.pt"


STATE = {
    k: torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    if v.is_floating_point()
    else v
    for k, v in net().state_dict().items()
}


def changed(**values):
    return STATE | {k.replace("_", ".", 1): v for k, v in values.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        dict(state_dict=STATE, epoch=3),
        dict(model=STATE, optimizer={}),
        dict(model_state_dict=STATE),
        dict(state_dict_ema=STATE),
        dict(model=dict(state_dict=STATE)),
        OrderedDict(STATE),
        {f"module.{k}": v for k, v in STATE.items()},
        {f"_orig_mod.{k}": v for k, v in STATE.items()},
        {f"module._orig_mod.{k}": v for k, v in STATE.items()},
        dict(state_dict={f"_orig_mod.module.{k}": v for k, v in STATE.items()}),
        {k: v.double() for k, v in STATE.items()},
    ],
    ids=lambda w: "/".join(list(w)[:2]),
)
def test_weights_are_found_in_what_training_programs_write(tmp_path, wrapped):
    got = load_weights(net(), stored(tmp_path, wrapped)).state_dict()
    assert all(torch.equal(got[k], v) for k, v in STATE.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floating_point_numbers_are_cast(tmp_path, dtype):
    got = load_weights(
        net().double(),
        stored(
            tmp_path, {k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}
        ),
    ).state_dict()
    assert (
        torch.equal(got["0.weight"], STATE["0.weight"].to(dtype).double())
        and got["0.weight"].dtype == torch.float64
    )


@pytest.mark.parametrize(
    "what, says",
    [
        (torch.ones(3), "holds a Tensor"),
        ([torch.ones(3)], "holds a list"),
        (None, "holds a NoneType"),
        (3, "holds a int"),
        ({0: torch.ones(3)}, "has 0 for a name"),
        ({}, "differs in"),
        (dict(state_dict=STATE, state_dict_ema=STATE), "holds several: state_dict, state_dict_ema"),
        (changed(**{"0_weight": 1.0}), "0.weight .*is 1.0"),
        (changed(**{"0_weight": None}), "is None"),
        (changed(**{"0_weight": [1.0, 2.0]}), "is a list"),
        (changed(**{"0_bias": True}), "is True"),
        (changed(**{"0_weight": STATE["0.weight"].round().long()}), "is int64"),
        (changed(**{"0_weight": STATE["0.weight"] > 0}), "is bool"),
        (changed(**{"0_weight": STATE["0.weight"].char()}), "is int8"),
        (changed(**{"0_weight": STATE["0.weight"].to_sparse()}), "sparse"),
        (changed(**{"0_weight": STATE["0.weight"].cfloat()}), "is complex64"),
        (changed(**{"1_num_batches_tracked": torch.tensor(2.5)}), "do not fit"),
        (changed(**{"3_weight": torch.ones(7, 5)}), r"3.weight: \(7, 5\) for \(3, 5\)"),
        ({f"module.{k}": v for k, v in list(STATE.items())[:2]}, "differs in"),
    ],
)
def test_what_is_no_weight_is_refused(tmp_path, what, says):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=says):
        load_weights(model, stored(tmp_path, what))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_whole_number_buffers_stay_whole(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("index", torch.tensor([[3000, 4097], [1, 2]]))
    write_atomic(tmp_path / "w.safetensors", weights_bytes(model, half=True))
    assert torch.equal(load_file(tmp_path / "w.safetensors")["index"], model.index)
    assert (
        load_weights(
            model, stored(tmp_path, model.state_dict() | dict(index=model.index.int()))
        ).index.dtype
        == torch.int64
    )


def test_only_heads_may_differ(tmp_path):
    models = torchvision_part("models")
    path = stored(tmp_path, models.googlenet(num_classes=7, init_weights=False).state_dict())
    ten = models.googlenet(num_classes=10, init_weights=False)
    load_weights(ten, path, head=False)  # the head and two auxiliary ones
    assert ten.fc.out_features == ten.aux1.fc2.out_features == 10 and torch.equal(
        ten.conv1.conv.weight, torch.load(path)["conv1.conv.weight"]
    )
    other = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(InputError, match="differs in"):
        load_weights(
            net(), stored(tmp_path, other.state_dict()), head=False
        )  # a hidden layer is no head


class Stepped(nn.Linear):
    step = 3

    def get_extra_state(self):
        return self.step if isinstance(self.step, torch.Tensor) else dict(step=self.step)

    def set_extra_state(self, state):
        self.step = state if isinstance(state, torch.Tensor) else state["step"]


@pytest.mark.parametrize("step", [3, "three", [1, None, 0.5], torch.tensor([1.0, 2.0])], ids=str)
def test_extra_state_is_kept(tmp_path, step):
    model, again = Stepped(2, 2), Stepped(2, 2)
    model.step = step
    write_atomic(tmp_path / "w.safetensors", weights_bytes(model, seed=0))
    load_weights(again, tmp_path / "w.safetensors")
    assert torch.equal(again.weight, model.weight) and (
        torch.equal(again.step, step) if isinstance(step, torch.Tensor) else again.step == step
    )


@pytest.mark.parametrize(
    "step",
    [{1}, (1, 2), {1: 2}, b"raw", lambda: 0],
    ids=["set", "tuple", "int keys", "bytes", "function"],
)
def test_extra_state_that_cannot_be_kept_is_refused_before_the_work(tmp_path, step):
    model = Stepped(6, 3).double().eval()
    model.step = step
    with pytest.raises(InputError, match="what JSON can hold"):
        check_storable(model)
    X = torch.randn(60, 6, dtype=torch.float64)
    with pytest.raises(InputError, match="what JSON can hold"):
        operate(
            model,
            nn.CrossEntropyLoss(),
            (X[:20], torch.arange(20) % 3),
            (X[20:], torch.arange(40) % 3),
            run_dir=tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_a_file_without_the_extra_state_leaves_it_with_a_warning(tmp_path):
    save_file(
        {k: v for k, v in Stepped(2, 2).state_dict().items() if torch.is_tensor(v)},
        tmp_path / "w.safetensors",
    )
    with pytest.warns(UserWarning, match="_extra_state"):
        assert load_weights(Stepped(2, 2), tmp_path / "w.safetensors").step == 3


# --- copies

HOOKED = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned twice": lambda m: prune.random_unstructured(
        prune.l1_unstructured(m, "bias", 0.5), "weight", 0.3
    ),
    "structured": lambda m: prune.ln_structured(m, "weight", 0.4, n=2, dim=0),
    "weight norm": nn.utils.weight_norm,
    "new weight norm": parametrizations.weight_norm,
    "spectral": nn.utils.spectral_norm,
    "new spectral": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "remembers": lambda m: m.register_forward_hook(lambda m, x, z: setattr(m, "seen", [z])) and m,
}


@pytest.mark.parametrize("how", HOOKED)
def test_networks_whose_weights_are_computed_can_be_operated_on(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    HOOKED[how](model[0])
    X, y = torch.randn(90, 6, dtype=torch.float64), torch.arange(90) % 3
    model(X).sum().backward()
    model.eval()
    before, z = {k: v.clone() for k, v in model.state_dict().items()}, model(X).detach()
    twin = copy_model(model)
    assert torch.equal(twin(X), z) and not {p.data_ptr() for p in twin.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }
    r = operate(
        model,
        nn.CrossEntropyLoss(),
        (X[:30], y[:30]),
        (X[30:], y[30:]),
        config=SurgeryConfig(iterations=2, eps=0.3),
        progress=False,
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(
        model(X), z
    )
    hits = (r.model(X[30:]).argmax(1) == y[30:]).double()
    assert torch.allclose(
        torch.stack([hits[y[30:] == c].mean() for c in range(3)]), r.after.accuracy
    )  # what was reported is what was returned


def test_a_network_that_allows_no_copy_is_refused():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(InputError, match="must allow a copy.*Copying Linear failed"):
        copy_model(model)


def test_unreadable_folders_are_named(toys):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (toys / "test" / "colour1").chmod(0)
    try:
        with pytest.raises(InputError, match="colour1"):
            own_sets(toys)
    finally:
        (toys / "test" / "colour1").chmod(0o700)
