"What several tests begin with."

import pytest

from hessian_surgery_nb.foundations import recorded_products
from hessian_surgery_nb.foundations.datasets import load_digits, write_toy_images
from hessian_surgery_nb.foundations.splits import long_tail_splits
from hessian_surgery_nb.foundations.networks import digits_net, resnet20
from hessian_surgery_nb.foundations.weight_files import weights_bytes, write_atomic
from hessian_surgery_nb.foundations.training import train

FACTORY = (
    "from hessian_surgery_nb.foundations.networks import resnet20\ndef net(): return "
    "resnet20(classes=3, width=4, blocks=1)\n"
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")


LONGEST = (  # begin first
    "test_resume",
    "test_sharded",
    "test_reproduce",
    "test_promises",
    "test_distributed",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.module.__name__ not in LONGEST)
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: needs --slow"))


@pytest.fixture(autouse=True)
def early_recordings(monkeypatch):
    "Products are recorded at the second one, so that few of them try graphs and recordings both."
    monkeypatch.setattr(recorded_products, "RECORD_AT", 2)


@pytest.fixture(scope="session")
def lay_out(tmp_path_factory):
    """A function: images in folders, a file with `net` and whatever else, and weights for `net`,
    in a new directory.
    """

    def make(name, factory="", **images):
        d = tmp_path_factory.mktemp(name)
        write_toy_images(d / "toys", **images)
        (d / "mine.py").write_text(FACTORY + factory)
        write_atomic(d / "w.safetensors", weights_bytes(resnet20(classes=3, width=4, blocks=1)))
        return d

    return make


@pytest.fixture(scope="session")
def digits():
    "A network, and the splits that it was trained on."
    splits = long_tail_splits(load_digits(), seed=0)
    net = digits_net(seed=0)
    train(net, splits.train.pair, epochs=20, seed=0)
    return net, splits
