"""Networks as people have them: adjusted logits in a head or around it, folders of transformers,
adapters, tied and half-precision weights, losses by name.
"""

import importlib
import importlib.util
import json
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.app.delivery import files_of_network
from hessian_surgery_nb.foundations.accuracy import predict
from hessian_surgery_nb.foundations.adjusted import Adjusted, fold_into_head, load_adjusted
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.datasets import mend_torchvision, write_toy_images
from hessian_surgery_nb.foundations.loading import as_stored, load_network
from hessian_surgery_nb.foundations.named_networks import make_network
from hessian_surgery_nb.foundations.networks import find_head
from hessian_surgery_nb.foundations.weight_files import (
    load_weights,
    set_tensors,
    weights_bytes,
    write_atomic,
)
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import operate

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


# --- folders of transformers


def there(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    mend_torchvision()
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def transformers():
    return there("transformers")


@pytest.fixture(scope="session")
def peft(transformers):
    return there("peft")


COLOURS = {0: "colour0", 1: "colour1", 2: "colour2"}


@pytest.fixture(scope="session")
def vit(transformers, tmp_path_factory):
    "A tiny image classifier in a folder, trained to tell the colours of discs."
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        id2label=COLOURS,
        label2id={name: number for number, name in COLOURS.items()},
    )
    folder = tmp_path_factory.mktemp("vit")
    network = transformers.ViTForImageClassification(config)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    network.save_pretrained(folder)
    write_toy_images(folder / "toys", train=40, test=24)
    _, preparation = load_network(f"hf:{folder}", classes=3)
    files = sorted((folder / "toys" / "train").rglob("*.png"))
    X = preparation.inputs(torch.stack([preparation.image(file) for file in files]))
    y = torch.tensor([int(file.parent.name[-1]) for file in files])
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(X).logits, y).backward()
        optimiser.step()
    network.eval().save_pretrained(folder)
    return folder


PROCESSORS = {
    "ViTImageProcessor": dict(size={"height": 16, "width": 16}),
    "ConvNextImageProcessor": dict(size={"shortest_edge": 16}),
    "BitImageProcessor": dict(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
    "MobileNetV2ImageProcessor": dict(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ),
    "LevitImageProcessor": dict(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_the_processor_does(name, vit, transformers, tmp_path):
    network = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    network.save_pretrained(tmp_path)
    getattr(transformers, name)(**PROCESSORS[name]).save_pretrained(tmp_path)
    found, preparation = load_network(f"hf:{tmp_path}", classes=3)
    assert str(preparation.processor) == name
    preparation = pickle.loads(pickle.dumps(preparation))  # as workers get it
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((40, 31, 3), (16, 16, 3), (130, 260, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        ours = preparation.inputs(preparation.image(tmp_path / "a.png")[None])
        theirs = processor(Image.open(tmp_path / "a.png"), return_tensors="pt").pixel_values
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        with torch.no_grad():
            torch.testing.assert_close(
                found(ours).logits, network(theirs).logits, atol=1e-5, rtol=0
            )


def test_a_processor_that_does_more_is_refused(vit, transformers, tmp_path):
    network = transformers.AutoModelForImageClassification.from_pretrained(vit)
    network.save_pretrained(tmp_path)
    odd = transformers.EfficientNetImageProcessor(
        size={"height": 16, "width": 16}, include_top=False, rescale_offset=True
    )
    odd.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="nothing else.*prepare images there"):
        load_network(f"hf:{tmp_path}", classes=3)


def operated(out, model, data, *flags):
    argv = ["operate", "--model", model, "--data", str(data), "--hessian", "32", "--eps", "0.2"]
    argv += ["--iterations", "1", "--spikes", "2", "--scheme", "forward", "--out", str(out)]
    assert main([*argv, *flags]) == 0
    return json.loads((out / "result.json").read_text())


def test_a_folder_of_transformers_serves_a_command(vit, transformers, tmp_path):
    result = operated(tmp_path / "out", f"hf:{vit}", vit / "toys")
    assert result["classes"] == list(COLOURS.values())
    twin = transformers.AutoModelForImageClassification.from_pretrained(vit)
    load_weights(twin, tmp_path / "out" / "weights.safetensors")
    assert result["before"]["global_percent"] > 50


def test_a_function_that_returns_one_serves_a_command_too(vit, transformers, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from transformers import AutoModelForImageClassification\n"
        f"def net(): return AutoModelForImageClassification.from_pretrained({str(vit)!r})\n"
    )
    model = f"{tmp_path}/mine.py:net"
    colours = ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
    by_function = operated(tmp_path / "a", model, vit / "toys", "--resize", "16", *colours)
    by_folder = operated(tmp_path / "b", f"hf:{vit}", vit / "toys")
    assert by_function["before"] == by_folder["before"]


def text_classifier(transformers, folder, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
    )
    network = transformers.BertForSequenceClassification(config).eval()
    network.to(options.get("dtype", torch.float32)).save_pretrained(folder)
    return network


def texts(count=40, seed=0):
    ids = torch.randint(0, 60, (count, 9), generator=generator(seed))
    mask = torch.ones_like(ids)
    mask[::2, 6:] = 0
    return dict(input_ids=ids, attention_mask=mask), torch.arange(count) % CLASSES


CONFIG = SurgeryConfig(iterations=1, num_spikes=2, eps=0.05, scheme="forward")


def test_a_classifier_of_texts_takes_dictionaries(transformers, tmp_path):
    network = text_classifier(transformers, tmp_path)
    found, _ = load_network(f"hf:{tmp_path}", classes=CLASSES)
    with torch.no_grad():
        logits = network(**texts()[0]).logits
    torch.testing.assert_close(predict(found, texts())[0], logits)
    around = Adjusted(found, bias=torch.arange(CLASSES))
    torch.testing.assert_close(predict(around, texts())[0], logits + torch.arange(CLASSES))
    result = operate(
        found, nn.CrossEntropyLoss(), texts(), texts(seed=1), config=CONFIG, progress=False
    )
    assert type(result.model) is type(found)


def test_a_folder_is_refused_that_would_leave_weights_random_or_run_code(transformers, tmp_path):
    text_classifier(transformers, tmp_path)
    place = tmp_path / "config.json"
    config = json.loads(place.read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a folder was run')")
    code = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Net"}
    place.write_text(json.dumps(config | {"model_type": "unheard-of", "auto_map": code}))
    with pytest.raises(InputError, match="loads by itself"):
        load_network(f"hf:{tmp_path}", classes=CLASSES)
    transformers.BertModel(transformers.BertConfig(**config)).save_pretrained(tmp_path)
    place.write_text(json.dumps(config))
    with pytest.raises(InputError, match="would be random"):
        load_network(f"hf:{tmp_path}", classes=CLASSES)


# --- adapters


@pytest.fixture
def adapted(peft, transformers, tmp_path):
    "A folder of adapters, and the network whose they are."
    text_classifier(transformers, tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    network = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator(1))
    network.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", network


def test_only_adapters_move_and_are_saved_as_adapters(adapted, peft, transformers, tmp_path):
    folder, network = adapted
    found, _ = load_network(f"hf:{folder}", classes=CLASSES)
    torch.testing.assert_close(predict(found, texts())[0], predict(network, texts())[0])
    result = operate(
        found, nn.CrossEntropyLoss(), texts(), texts(seed=1), config=CONFIG, progress=False
    )
    before = dict(found.named_parameters())
    moving = CONFIG.eps / 10 * torch.randn(1, generator=generator())
    with torch.no_grad():
        for name, parameter in result.model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name)
            if not parameter.requires_grad:
                assert torch.equal(parameter, before[name])
            else:
                parameter.add_(moving)  # surgery may have turned every step down
    files = files_of_network(result.model, texts())
    out = tmp_path / "out"
    out.mkdir()
    for name, content in files.items():
        (out / name).write_bytes(content)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, out).eval()
    expected = predict(result.model, texts())[0]
    assert torch.equal(predict(again, texts())[0], expected)
    assert not torch.equal(expected, predict(found, texts())[0])
    assert torch.equal(predict(load_network(f"hf:{out}", classes=CLASSES)[0], texts())[0], expected)


def test_a_head_is_folded_only_where_it_is_stored_with_the_adapters(adapted, peft, transformers):
    folder, _ = adapted
    found, _ = load_network(f"hf:{folder}", classes=CLASSES)
    name, _ = find_head(found, CLASSES, texts())
    bias = torch.arange(CLASSES) / 4
    folded = fold_into_head(found, name, None, bias, data=texts())
    torch.testing.assert_close(
        predict(found, texts(), state=folded)[0], predict(Adjusted(found, bias=bias), texts())[0]
    )
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder.parent / "base")
    config = peft.LoraConfig(r=2, target_modules=["query", "classifier"])
    whole = peft.get_peft_model(base, config).eval()
    name = "base_model.model.classifier.base_layer"  # as made, its adapters add nothing
    with pytest.raises(InputError, match=f"{name} is frozen"):
        find_head(whole, CLASSES, texts())
    assert fold_into_head(whole, name, None, bias, data=texts()) is None


def test_adapters_serve_a_command(vit, peft, transformers, tmp_path):
    base = transformers.AutoModelForImageClassification.from_pretrained(vit)
    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapters")
    operated(tmp_path / "out", f"hf:{tmp_path / 'adapters'}", vit / "toys")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    operated(tmp_path / "again", f"hf:{tmp_path / 'out'}", vit / "toys")


def test_adapters_without_their_network_are_refused(adapted):
    folder, _ = adapted
    place = folder / "adapter_config.json"
    config = json.loads(place.read_text()) | {"base_model_name_or_path": "somebody/network"}
    place.write_text(json.dumps(config))
    with pytest.raises(InputError, match="'somebody/network', which is none"):
        load_network(f"hf:{folder}", classes=CLASSES)


# --- types


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single_and_stored_as_it_came(kind, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from hessian_surgery_nb.foundations.networks import resnet20\n"
        "def net(): return resnet20(classes=3, width=4, blocks=1)\n"
    )
    spec = f"{tmp_path}/mine.py:net"
    net, _ = load_network(spec, classes=3)
    state = net.half().to(kind).state_dict()
    torch.save(state, tmp_path / "half.pt")
    found, _ = load_network(spec, classes=3, weights=tmp_path / "half.pt")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    file = write_atomic(tmp_path / "again.safetensors", weights_bytes(found))
    again, _ = load_network(spec, classes=3, weights=file)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.stored_types == found.stored_types != {}
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters()))
    assert as_stored(found) == {}


def test_a_transformer_in_half_precision_keeps_its_type(transformers, tmp_path):
    text_classifier(transformers, tmp_path, dtype=torch.bfloat16)
    found, _ = load_network(f"hf:{tmp_path}", classes=CLASSES)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    file = write_atomic(tmp_path / "out.safetensors", weights_bytes(found))
    twin = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    twin.load_state_dict(load_file(file))
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


# --- losses by name


@pytest.mark.parametrize("loss", ["focal:1", "label-smoothing:0.2", "own.py:weighted"])
def test_commands_take_a_loss_by_name(loss, lay_out, tmp_path, monkeypatch):
    d = lay_out("losses", train=20, test=12)
    (d / "own.py").write_text(
        "import torch\n"
        "def weighted(): return torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))\n"
    )
    monkeypatch.chdir(d)
    flags = ["--weights", "w.safetensors"]
    named = operated(tmp_path / "a", "mine.py:net", "toys", *flags, "--loss", loss)
    plain = operated(tmp_path / "b", "mine.py:net", "toys", *flags)
    assert named["before"] == plain["before"]
    assert named["history"] != plain["history"]


# --- networks of timm


def test_images_are_prepared_as_timm_does(tmp_path):
    timm = there("timm")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 270, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"):
        network, preparation = make_network(f"timm:{name}", 3)
        config = timm.data.resolve_model_data_config(network)
        theirs = timm.data.create_transform(**config, is_training=False)(
            Image.open(tmp_path / "a.png")
        )
        ours = preparation.inputs(preparation.image(tmp_path / "a.png")[None])[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --- small things that practice found


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def test_a_wrapper_around_a_network_in_evaluation_is_taken_as_it_is():
    net = Small().eval()
    wrapped = Wrapper(net)
    assert wrapped.training
    assert torch.equal(predict(wrapped, images())[0], predict(net, images())[0])
    net.body = nn.Sequential(net.body, nn.Dropout())
    with pytest.raises(InputError, match="active dropout"):
        predict(Wrapper(net.train()), images())


NAMES = ("ant", "bee", "cat", "dog")
FORMS = {
    "array": np.array(NAMES),
    "index": pd.Index(NAMES),
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: str(number) for number, name in enumerate(NAMES)},
}


@pytest.mark.parametrize("form", FORMS)
def test_names_come_in_any_form(form):
    sets = [images(seed=seed) for seed in range(3)]
    result = operate(
        Small().eval(),
        nn.CrossEntropyLoss(),
        *sets[:2],
        held_out=sets[2],
        config=CONFIG,
        names=FORMS[form],
        progress=False,
    )
    assert result.before.names == NAMES
    assert [c["name"] for c in result.to_dict()["before"]["classes"]] == list(NAMES)


def test_colours_in_bytes_are_refused_with_the_numbers_that_are_meant(lay_out, tmp_path, capsys):
    d = lay_out("bytes", train=4, test=4)
    argv = ["operate", "--model", f"{d}/mine.py:net", "--data", str(d / "toys")]
    argv += ["--out", str(tmp_path / "out"), "--mean", "127", "127", "127"]
    assert main(argv) == 2
    assert "0.498" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["loss: own.py:weighted", "model: own.py:net"])
def test_a_config_imports_no_code(line, lay_out, tmp_path, capsys):
    d = lay_out("config", train=4, test=4)
    (tmp_path / "c.yaml").write_text(line)
    argv = ["operate", "--config", str(tmp_path / "c.yaml"), "--data", str(d / "toys")]
    assert main([*argv, "--model", f"{d}/mine.py:net", "--out", str(tmp_path / "out")]) == 2
    assert "imported only where you name it" in capsys.readouterr().err
