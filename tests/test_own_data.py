"""Data as people have it: whatever `--data` names gives the same sets as the folder does, kept or
streamed; what is damaged or unclear is refused with the rule, the value and the way out.
"""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from hessian_surgery_nb.app.cli import main
from hessian_surgery_nb.app.data_sources import open_data
from hessian_surgery_nb.app.first_answers import check_labels, describe_inputs, first_answers
from hessian_surgery_nb.app.config_files import read_config, with_config
from hessian_surgery_nb.app.own_network import own_sets
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.datasets import write_toy_images
from hessian_surgery_nb.foundations.images import class_files, read_image
from hessian_surgery_nb.foundations.loading import load_network
from hessian_surgery_nb.foundations.preparation import Preparation
from hessian_surgery_nb.foundations.splits import check_disjoint

SETS = ("hessian", "gradient", "sensitivity", "held_out")
SMALLER = Preparation(resize=14, crop=12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
PLAIN = Preparation()


@pytest.fixture
def toys(tmp_path):
    write_toy_images(tmp_path / "toys", train=9, test=8)
    return tmp_path / "toys"


def with_validation(toys):
    "The same with a validation set of other images."
    write_toy_images(toys.parent / "more", train=1, test=6, seed=1)
    shutil.move(toys.parent / "more" / "test", toys / "val")
    return toys


def sets_of(named, preparation=PLAIN, **options):
    return own_sets(open_data(named), preparation, hessian=7, gradient=5, seed=3, **options)


def same(one, other):
    "Whether two deals hold the same inputs and labels, bit for bit, in the same batches."
    assert one.classes == other.classes and one.training_counts == other.training_counts
    for name in SETS:
        some, others = getattr(one, name), getattr(other, name)
        assert (some is None) == (others is None), name
        if some is None:
            continue
        assert torch.equal(some.y, others.y) and len(some) == len(others), name
        for (x, y), (other_x, other_y) in zip(some, others, strict=True):
            assert torch.equal(x, other_x) and torch.equal(y, other_y), name


def labelled_files(toys):
    "(file, class number, class, part), class by class."
    return [
        (file, label, name, part.name)
        for part in sorted(toys.iterdir())
        for label, (name, files) in enumerate(class_files(part).items())
        for file in files
    ]


# --- every source gives what the folder gives


def as_table(toys, suffix=".csv", shuffle=True):
    import pandas as pd

    rows = labelled_files(toys)
    if shuffle:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    table = pd.DataFrame(
        dict(
            Filename=[str(file.relative_to(toys.parent)) for file, *_ in rows],
            label=[name for _, _, name, _ in rows],
            split=[part for *_, part in rows],
        )
    )
    where = toys.parent / f"table{suffix}"
    if suffix == ".parquet":
        table.to_parquet(where)
    else:
        table.to_csv(where, index=False, sep="\t" if suffix == ".tsv" else ",")
    return where


def as_arrays(toys):
    arrays = {}
    for part in sorted(path.name for path in toys.iterdir()):
        rows = [row for row in labelled_files(toys) if row[3] == part]
        images = torch.stack([read_image(file) for file, *_ in rows])
        arrays[f"{part}_images"] = images.permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_labels"] = np.array([[label] for _, label, *_ in rows], dtype=np.uint8)
    np.savez_compressed(
        toys.parent / "arrays.npz", **arrays, classes=list(class_files(toys / part))
    )
    return toys.parent / "arrays.npz"


FUNCTIONS = """
import torch
from pathlib import Path
from PIL import Image
from torch.utils.data import Dataset
from hessian_surgery_nb.foundations.images import class_files, read_image

TOYS = Path(__file__).parent / "toys"

class Pictures(Dataset):
    def __init__(self, part):
        files = class_files(TOYS / part)
        self.rows = [(f, label) for label, name in enumerate(files) for f in files[name]]
        self.classes = list(files)
    def __len__(self): return len(self.rows)
    def __getitem__(self, row):
        file, label = self.rows[row]
        return Image.open(file), label

class Named(Pictures):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return dict(image=image, label=torch.tensor(label), text="none")

def parts(): return [path.name for path in sorted(TOYS.iterdir())]
def pairs(): return {part: Pictures(part) for part in parts()}
def named(): return {part: Named(part) for part in parts()}
def nothing(): return 5
def fails(): raise RuntimeError("no disk")
def later(): return dict(later=Pictures("test"))
"""


def as_function(toys, name):
    (toys.parent / "mine.py").write_text(FUNCTIONS)
    return f"{toys.parent}/mine.py:{name}"


def as_saved(toys):
    datasets = pytest.importorskip("datasets")
    names = list(class_files(toys / "test"))
    features = datasets.Features(
        dict(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    )
    parts = {}
    for part in sorted(path.name for path in toys.iterdir()):
        rows = [row for row in labelled_files(toys) if row[3] == part]
        columns = dict(image=[str(row[0]) for row in rows], label=[row[1] for row in rows])
        parts[part] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(toys.parent / "saved"))
    return toys.parent / "saved"


def as_parquet(toys):
    pytest.importorskip("pyarrow")
    return as_table(toys, ".parquet")


SOURCES = dict(
    csv=as_table,
    tsv=lambda toys: as_table(toys, ".tsv"),
    parquet=as_parquet,
    arrays=as_arrays,
    pairs=lambda toys: as_function(toys, "pairs"),
    dictionaries=lambda toys: as_function(toys, "named"),
    saved=as_saved,
)


@pytest.mark.parametrize("preparation", [PLAIN, SMALLER], ids=["as it is", "smaller"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_sets_of_the_folder(toys, source, preparation):
    for folder in (toys, with_validation(toys)):
        same(
            sets_of(SOURCES[source](folder), preparation),
            sets_of(folder, preparation),
        )


@pytest.mark.parametrize("source", ["folder", "arrays", "pairs"])
def test_streamed_and_kept_are_the_same_on_every_pass(toys, source, monkeypatch, tmp_path):
    monkeypatch.setenv("HESSIAN_SURGERY_CACHE", str(tmp_path / "cache"))
    named = toys if source == "folder" else SOURCES[source](toys)
    kept = sets_of(named, SMALLER, batch=5)
    streamed = sets_of(named, SMALLER, batch=5, memory=0)
    for _ in range(2):
        same(kept, streamed)
    assert not torch.is_tensor(streamed.held_out.x) and torch.is_tensor(kept.held_out.x)
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name, and no rest
    rows = torch.tensor([3, 0, 8])
    assert torch.equal(streamed.held_out.rows(rows).x, kept.held_out.x[rows])


def test_memory_goes_to_the_small_sets_first(toys):
    one = 3 * 16 * 16
    sets = sets_of(toys, memory=20 * one)
    kinds = [torch.is_tensor(getattr(sets, name).x) for name in SETS]
    assert kinds == [True, True, False, False]  # 7 and 5 fit, 12 do not


def test_a_full_disk_is_said_beforehand(toys, monkeypatch):
    usage = shutil.disk_usage(toys)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="room on the disk.*HESSIAN_SURGERY_CACHE"):
        sets_of(toys, memory=0)


# --- which part serves for what


def test_validation_decides_and_test_reports(toys):
    sets = sets_of(with_validation(toys))
    listed = sets.listing()["sets"]
    assert {name.split("/")[0] for name in listed["sensitivity"]} == {"val"}
    assert {name.split("/")[0] for name in listed["held_out"]} == {"test"}
    assert {name.split("/")[0] for name in listed["hessian"]} == {"train"}
    assert len(listed["held_out"]) == 24 and len(listed["sensitivity"]) == 18


def test_without_training_images_validation_shows_the_curvature(toys):
    shutil.rmtree(with_validation(toys) / "train")
    sets = sets_of(toys)
    listed = sets.listing()["sets"]
    assert {name.split("/")[0] for name in listed["hessian"]} == {"val"}
    assert len(listed["sensitivity"]) == 18 - 7 and len(listed["held_out"]) == 24
    assert sets.training_counts is None and sets.gradient is None


def test_every_row_is_in_one_set_at_most(toys):
    listed = sets_of(toys).listing()
    rows = [name for part in listed["sets"].values() for name in part]
    assert len(rows) == len(set(rows)) == 7 + 5 + 24
    assert json.loads(json.dumps(listed)) == listed


def test_training_images_alone_are_refused(toys):
    shutil.rmtree(toys / "test")
    with pytest.raises(InputError, match="not trained on.*part train only"):
        sets_of(toys)


def test_a_class_may_be_called_train(toys):
    shutil.move(toys / "test" / "colour0", toys / "test" / "train")
    assert sets_of(toys / "test").classes == ("colour1", "colour2", "train")


def test_one_part_has_one_folder(toys):
    shutil.copytree(toys / "test", toys / "val")
    shutil.copytree(toys / "test", toys / "validation")
    with pytest.raises(InputError, match="both are validation"):
        sets_of(toys)


@pytest.mark.parametrize("source", ["csv", "arrays", "pairs"])
def test_a_part_without_a_class_is_refused(toys, source):
    named = SOURCES[source](with_validation(toys))
    if source == "csv":
        lines = named.read_text().splitlines()
        kept = [line for line in lines if not line.endswith("colour1,val")]
        named.write_text("\n".join(kept))
    elif source == "arrays":
        arrays = dict(np.load(named))
        keep = arrays["val_labels"][:, 0] != 1
        arrays |= {key: arrays[key][keep] for key in ("val_images", "val_labels")}
        np.savez(named, **arrays)
    else:
        code = FUNCTIONS.replace(
            "for label, name in enumerate(files)",
            "for label, name in enumerate(files) if part != 'val' or label != 1",
        )
        (toys.parent / "mine.py").write_text(code)
    with pytest.raises(InputError, match="colour1 has no row in part validation of"):
        sets_of(named)


def test_shared_images_are_named(toys):
    shutil.copy(toys / "train" / "colour0" / "000.png", toys / "test" / "colour2" / "again.png")
    sets = own_sets(toys, hessian=27)
    with pytest.raises(
        InputError, match=r"\(train/colour0/000\.png\).*\(test/colour2/again\.png\)"
    ):
        check_disjoint(hessian=sets.hessian, sensitivity=sets.sensitivity, held_out=sets.held_out)


# --- labels


@pytest.mark.parametrize("as_number", [int, str, "{:02d}".format])
def test_labels_may_be_numbers(toys, as_number):
    where = as_table(toys)
    text = where.read_text()
    for number in range(3):
        text = text.replace(f",colour{number},", f",{as_number(number)},")
    where.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sets = sets_of(where)
    assert sets.classes == tuple(str(as_number(number)) for number in range(3))
    assert torch.equal(sets.held_out.y, sets_of(toys).held_out.y)


def test_numbers_of_outputs_need_no_order_and_no_warning(tmp_path):
    np.savez(
        tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(240, 4)), y=[*range(12)] * 20
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sets = own_sets(open_data(tmp_path / "a.npz"), hessian=24)
    assert sets.classes == tuple(map(str, range(12)))
    named = tuple(f"name{number}" for number in range(12))
    of_network = own_sets(open_data(tmp_path / "a.npz"), hessian=24, labels=named)
    assert of_network.classes == named and torch.equal(of_network.held_out.y, sets.held_out.y)


def test_numbers_with_a_gap_are_missing_a_class(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.eye(8), y=[0, 2] * 4)
    with pytest.raises(InputError, match="1 has no row"):
        own_sets(open_data(tmp_path / "a.npz"), hessian=2)


def test_names_that_the_network_knows_are_in_its_order(toys):
    order = ("colour2", "colour0", "colour1")
    for named in (toys, as_table(toys), as_arrays(toys)):
        assert own_sets(open_data(named), hessian=6, labels=order).classes == order


# --- what is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be readable"),
        ("path,label", "must have rows"),
        ("name,label\n{0},a", "column for the image, named path.*has name, label; rename"),
        ("path,kind\n{0},a", "column for its class.*has path, kind; rename"),
        ("path,label,Class\n{0},a,a", "has label and Class; rename"),
        ("path;label\n{0};a", "column for the image"),
        ("path,label\n{0},a\n{1},", "Row 2 of .* has none; fill it"),
        ("path,label\n,a\n{1},b", "Row 1 of .* has none; fill it"),
        ("path,label\n{0},a\ngone.png,b", "Row 2 of .*gone.png, which is not; mend"),
        ("path,label\n{0},a\n{0},b", "Rows 1 and 2 of"),
        ("path,label\n{0},a\n./{0},a", "Rows 1 and 2 of"),
        ("path,label,split\n{0},a,train\n{1},b,later", "Row 2 of .* has 'later'; rename"),
        ("path,label,split\n{0},a,", "Row 1 of .* has none"),
        ('path,label\n"{0},a\n{1},b', "must be readable|column|none"),
    ],
)
def test_bad_tables_are_refused(toys, text, says):
    one, other = (f"toys/test/colour{number}/000.png" for number in (0, 1))
    (toys.parent / "t.csv").write_text(text.format(one, other))
    with pytest.raises(InputError, match=says):
        sets_of(toys.parent / "t.csv")


def test_a_table_in_another_encoding_is_refused(toys):
    (toys.parent / "t.csv").write_bytes("path,label\nä.png,größer".encode("utf-16"))
    with pytest.raises(InputError, match="must be readable.*UTF-8"):
        sets_of(toys.parent / "t.csv")


def test_a_table_with_a_byte_order_mark_and_odd_names_is_read(toys):
    table = as_table(toys)
    odd = toys / "test" / "colour0" / "ä b, c.png"
    shutil.move(toys / "test" / "colour0" / "000.png", odd)
    text = table.read_text().replace("toys/test/colour0/000.png", '"toys/test/colour0/ä b, c.png"')
    table.write_text(text.replace("colour0,", "NA,"), encoding="utf-8-sig")
    sets = sets_of(table)
    assert "NA" in sets.classes
    assert "toys/test/colour0/ä b, c.png" in [
        name for part in sets.listing()["sets"].values() for name in part
    ]


@pytest.mark.parametrize("source", ["folder", "csv", "pairs"])
def test_corrupt_images_are_named(toys, source):
    named = toys if source == "folder" else SOURCES[source](toys)
    for name in ("colour0", "colour1", "colour2"):  # of either half
        for number in range(8):
            (toys / "test" / name / f"{number:03d}.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    says = r"test\[\d+\]" if source == "pairs" else r"00\d\.png is not"
    with pytest.raises(InputError, match=f"must be readable.*{says}"):
        sets_of(named)


def test_images_of_two_sizes_are_named(toys):
    small = toys / "train" / "colour0"
    for file in small.iterdir():
        Image.open(file).resize((8, 8)).save(file)
    with pytest.raises(InputError, match="of one size.*png is.*png is.*give resize and crop"):
        sets_of(toys)


ITEMS = np.eye(8)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (dict(x=ITEMS), "inputs and labels, as x and y"),
        (dict(y=[0] * 8), "inputs and labels, as x and y"),
        (dict(x_train=ITEMS, y_test=[0] * 8), "inputs and labels, as x and y"),
        (dict(x=ITEMS, X=ITEMS, y=[0, 1] * 4), "one array for each purpose"),
        (dict(x=ITEMS, y=[0, 1] * 3), "8 rows for 6 labels"),
        (dict(x=ITEMS, y=np.eye(8)), r"argmax\(1\)"),
        (dict(x=ITEMS, y=[0.5] * 8), "number of an output"),
        (dict(x=ITEMS, y=[-1] * 8), "row 0 has -1"),
        (dict(x=ITEMS, y=[0, 1] * 4, split=["never"] * 8), "Row 0 of split has never"),
        (dict(x=np.zeros((8, 5, 4, 4), np.uint8), y=[0, 1] * 4), "one or three colours"),
        (dict(x=np.array([None] * 8), y=[0, 1] * 4), "must be numbers|no Python objects"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=says):
        own_sets(open_data(tmp_path / "a.npz"), hessian=2)


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"\x93NUMPY"])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"\.npz must be readable"):
        open_data(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "a length and items"),
        ("fails", "It raised RuntimeError: no disk"),
        ("later", "datasets come by part"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_bad_functions_are_refused(toys, name, says):
    with pytest.raises(InputError, match=says):
        sets_of(as_function(toys, name))


@pytest.mark.parametrize("named", ["gone", "gone.csv", "gone.npz", "gone.py", "notes.txt"])
def test_what_is_no_data_is_refused(tmp_path, named):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(InputError, match="data must be a directory of images.*file.py:function"):
        open_data(tmp_path / named)


def test_packages_that_are_missing_are_named(toys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (toys.parent / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="pip install pyarrow, or save t.parquet as CSV"):
        open_data(toys.parent / "t.parquet")
    (toys / "state.json").write_text("{}")
    with pytest.raises(InputError, match="pip install datasets"):
        open_data(toys)


def test_a_config_names_no_code(tmp_path):
    import argparse

    from hessian_surgery_nb.app.options import add_common_flags

    parser = argparse.ArgumentParser()
    add_common_flags(parser)
    (tmp_path / "c.yaml").write_text("data: mine.py:pairs")
    assert read_config(tmp_path / "c.yaml") == dict(data="mine.py:pairs")
    with pytest.raises(InputError, match="imported only where you name it.*give --data"):
        with_config(["screen", "--config", str(tmp_path / "c.yaml")], dict(screen=parser))


# --- datasets of one's own


class Items(list):
    "A list with labels beside it."


def test_items_count_where_stored_labels_disagree():
    items = Items([(np.ones(3) * row, row % 2) for row in range(12)])
    items.targets = [0] * 12
    sets = own_sets(open_items(items), hessian=2)
    assert sets.classes == ("0", "1")
    items.targets = [1 - row % 2 if row in (1, 2, 3, 4) else row % 2 for row in range(12)]
    with pytest.raises(InputError, match="must keep its labels.*and had [01] before"):
        own_sets(open_items(items), hessian=2)


def open_items(items):
    from hessian_surgery_nb.app.given_datasets import dataset_data

    return dataset_data(items, "items")


def test_random_items_are_refused():
    class Random(list):
        def __getitem__(self, row):
            return torch.rand(3), row % 2

    with pytest.raises(InputError, match="random augmentation"):
        own_sets(open_items(Random(range(12))), hessian=2)


def test_texts_are_filled_up_alike_in_all_sets():
    rng = np.random.default_rng(0)
    texts = [
        dict(input_ids=rng.integers(5, 99, 3 + row % 4).tolist(), labels=row % 2, text="none")
        for row in range(40)
    ]
    sets = own_sets(open_items(texts), hessian=6, pad=1)
    for part in (sets.hessian, sets.sensitivity, sets.held_out):
        (inputs, _) = next(iter(part))
        assert sorted(inputs) == ["attention_mask", "input_ids"]
        assert inputs["input_ids"].shape[1] == 6
        assert ((inputs["input_ids"] == 1) == (inputs["attention_mask"] == 0)).all()
    check_disjoint(hessian=sets.hessian, sensitivity=sets.sensitivity, held_out=sets.held_out)
    streamed = own_sets(open_items(texts), hessian=6, pad=1, memory=0)
    for (kept, _), (read, _) in zip(sets.held_out, streamed.held_out, strict=True):
        assert all(torch.equal(kept[name], read[name]) for name in kept)


def test_saved_texts_are_inputs(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = dict(
        text=["none"] * 40,
        input_ids=[[7 + row] * (1 + row % 3) for row in range(40)],
        label=[("good", "bad")[row % 2] for row in range(40)],
    )
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    sets = own_sets(open_data(tmp_path / "saved"), hessian=6)
    assert sets.classes == ("bad", "good")
    inputs, _ = next(iter(sets.held_out))
    assert inputs["input_ids"].shape[1] == 3 and inputs["attention_mask"].shape[1] == 3
    datasets.Dataset.from_dict(dict(text=["a"], label=[0])).save_to_disk(str(tmp_path / "raw"))
    with pytest.raises(InputError, match=r"column of images or input_ids.*dataset\.map"):
        open_data(tmp_path / "raw")


# --- commands


@pytest.fixture
def place(lay_out):
    return lay_out("data", "", train=9, test=8)


@pytest.mark.parametrize("source", ["folder", "csv", "arrays", "pairs"])
def test_commands_take_every_source(place, capsys, source):
    toys = place / "toys"
    shutil.copy(place / "mine.py", place / "nets.py")
    named = toys if source == "folder" else SOURCES[source](toys)
    flags = ["--model", f"{place}/nets.py:net", "--data", str(named), "--hessian", "12"]
    assert main(["spectrum", *flags, "--spikes", "2"]) == 0
    out, err = capsys.readouterr()
    assert "curvature 12, decide 12, report 12" in err and "0 colour0, 1 colour1" in err
    assert main(["spectrum", *flags, "--spikes", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert "accuracy  " not in said.err and json.loads(said.out)


def test_rows_of_a_table_are_operated_on(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = rng.normal(size=(300, 5)) + 2 * np.eye(5)[labels]
    splits = ["train"] * 100 + ["val"] * 100 + ["test"] * 100
    np.savez(tmp_path / "rows.npz", features=features, labels=labels, split=splits)
    (tmp_path / "net.py").write_text(
        "import torch\ndef net():\n    net = torch.nn.Linear(5, 3)\n"
        "    net.weight.data = torch.eye(5)[:3]\n    net.bias.data.zero_()\n    return net\n"
    )
    flags = ["--model", f"{tmp_path}/net.py:net", "--data", str(tmp_path / "rows.npz")]
    more = ["--hessian", "60", "--iterations", "1", "--json", "--out", str(tmp_path / "out")]
    assert main(["operate", *flags, *more]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(row["images"] for row in said["before"]["classes"]) == 100
    assert said["classes"] == ["0", "1", "2"]


def test_chance_and_training_images_that_are_worse_are_said(place):
    toys = place / "toys"
    net, _ = load_network(f"{place}/mine.py:net", classes=3)
    sets = own_sets(toys, hessian=12)
    with pytest.warns(UserWarning, match="guessing gives 33.3%"):
        check_labels(net, sets)
    answers = first_answers(net, sets)
    text = describe_inputs(sets, answers)
    assert text.count("\n") == 3 and f"{answers.right.double().mean():.1%} of 12" in text
