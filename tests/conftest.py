"What several tests begin with."
import pytest

from hessian_surgery_nb.data import write_toy_images
from hessian_surgery_nb.models import resnet20, weights_bytes, write_atomic

FACTORY = "from hessian_surgery_nb.models import resnet20\ndef net(): return resnet20(classes=3, width=4, blocks=1)\n"


@pytest.fixture(scope="session")
def lay_out(tmp_path_factory):
    "A function: images in folders, a file with `net` and whatever else, and weights for `net`, in a new directory."
    def make(name, factory="", **images):
        d = tmp_path_factory.mktemp(name)
        write_toy_images(d/"toys", **images)
        (d/"mine.py").write_text(FACTORY + factory)
        write_atomic(d/"w.safetensors", weights_bytes(resnet20(classes=3, width=4, blocks=1)))
        return d
    return make
