"Every stored run is read into records and written again, and nothing is lost."

import copy
import json
from pathlib import Path

import pytest

from hessian_surgery_nb.evidence.experiments import EXPERIMENTS
from hessian_surgery_nb.evidence.results import FineTuningRun, SurgeryRun
from hessian_surgery_nb.evidence.run_experiments import request
from hessian_surgery_nb.evidence.stored_runs import (
    RESULT_TYPES,
    BenchmarkFile,
    StoredRun,
    read_run,
    read_stored,
)
from hessian_surgery_nb.evidence.study import STARTS, Scale, Study
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.runs import RunStore, json_bytes
from hessian_surgery_nb.isic import write_toy_isic

RUNS = Path(__file__).resolve().parents[1] / "nbs" / "runs"
FILES = sorted(RUNS.rglob("*.json"))
SURGERY = RUNS / "cifar10" / "cifar10_resnet20_s3_surgery_gamma_p2.json"


def typed_pairs(value):
    "Equal only where types are, too: 1 is not 1.0, nor true."
    if isinstance(value, dict):
        return {key: typed_pairs(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed_pairs(item) for item in value]
    return type(value), value


def test_there_are_runs():
    assert len(FILES) > 200
    kinds = {type(read_stored(path)) for path in FILES if path.parent == RUNS}
    assert BenchmarkFile in kinds and len(kinds) == 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_lost(path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    record = read_stored(path)
    assert typed_pairs(record.to_dict()) == typed_pairs(stored)
    assert type(record).from_dict(record.to_dict()) == record


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != RUNS], ids=lambda path: path.stem)
def test_an_experiment_is_written_as_it_was(path):
    run = read_run(path)
    assert isinstance(run.results, RESULT_TYPES[run.experiment])
    assert f"_s{run.seed}_{run.experiment}" in path.stem
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert json_bytes(run.to_dict()) == json_bytes(stored)  # keys stand in the same order, too


def changed(change):
    stored = json.loads(SURGERY.read_text(encoding="utf-8"))
    change(stored)
    return stored


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda run: run["results"].pop("after"), "results.after must be there"),
        (lambda run: run["results"].update(colour=1), "results has colour, which no field of"),
        (lambda run: run["results"]["history"][2].update(passes=0.5), r"history\[2\].passes must"),
        (lambda run: run["results"].update(history={}), "results.history must be a list"),
        (lambda run: run["results"].update(before=[]), "results.before must be an object"),
        (lambda run: run["results"]["history"][0].update(accepted=1), "accepted must be of type"),
        (lambda run: run["config"].update(experiment="polish"), "polish, which is no experiment"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    with pytest.raises(InputError, match=says):
        StoredRun.from_dict(changed(change))


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"name": ')
    with pytest.raises(InputError, match="half.json is not"):
        read_run(tmp_path / "half.json")


def test_what_an_older_version_did_not_keep_may_be_missing():
    path = RUNS / "cifar10" / "cifar10_resnet20_s0_focal.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["results"]
    older = copy.deepcopy(stored)
    del older["at_price"]
    assert FineTuningRun.from_dict(older).at_price is None
    assert FineTuningRun.from_dict(older).to_dict() == older


def test_a_record_cannot_be_changed():
    results = read_run(SURGERY).results
    assert isinstance(results, SurgeryRun) and results.held_out == results.after
    with pytest.raises(AttributeError):
        results.returned_iteration = 0


def test_every_experiment_has_its_record():
    assert set(EXPERIMENTS) == set(RESULT_TYPES)


# how the runs of each dataset were asked for
STUDIES = {
    "cifar10": dict(scale=Scale()),
    "pretrained": dict(scale=Scale(epochs=1, seen_pixels=64)),
    "tinyimagenet100": dict(tau=None, held_back=50, reported_back=100),
    "isic": dict(tau=None, scale=Scale(hessian=256, epochs=30)),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    "A folder in which lesions lie, so that their layout is known; nothing else is looked at."
    folder = tmp_path_factory.mktemp("datasets")
    write_toy_isic(folder / "isic", counts=(1,) * 8)
    return folder


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != RUNS], ids=lambda path: path.stem)
def test_what_is_stored_is_asked_for_in_the_same_way(path, datasets):
    "So `reproduce` finds it and does not run it again."
    run = read_run(path)
    network, dataset = run.config["network"], run.config["dataset"]
    start = run.config["start"]
    study = Study(
        store=RunStore(path.parent, datasets),
        start=start if start in STARTS else "annealed",
        seed=run.seed,
        dataset=dataset,
        network=network,
        weights=Path("cifar10_resnet50.safetensors") if network == "resnet50" else None,
        init=Path("efficientnet_lite0_imagenet.safetensors") if start == "pretrained" else None,
        root=datasets,
        **(STUDIES["pretrained"] if start == "pretrained" else STUDIES[dataset]),
    )
    asked = request(study, run.experiment)
    assert study.store.read(path.stem, asked) is not None
    assert json.loads(json_bytes(asked)) == run.config
    assert path.stem == f"{study.label}_{run.experiment}"
