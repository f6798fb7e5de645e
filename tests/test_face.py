"The package's face: what it offers, what it loads, and in which order names may be asked for."

import subprocess
import sys

import pytest

import hessian_surgery_nb as hs

HEAVY = ("torchvision", "matplotlib", "sklearn")


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_name_is_there():
    for name in dir(hs):
        assert getattr(hs, name) is not None


def test_the_package_itself_loads_nothing_and_operate_nothing_heavy():
    code = "import sys, hessian_surgery_nb as hs; print('torch' in sys.modules); hs.operate; "
    code += f"print([h for h in {HEAVY} if h in sys.modules])"
    assert fresh(code) == "False\n[]"


@pytest.mark.parametrize(
    "order", ["hs.screen, hs.effective_rank", "hs.effective_rank, hs.screen", "rank, hs.screen"]
)
def test_modules_and_functions_keep_their_names_in_either_order(order):
    code = f"""
import hessian_surgery_nb as hs
from hessian_surgery_nb import effective_rank as rank
{order}
import hessian_surgery_nb.spectrum_type
assert hs.effective_rank is rank and callable(hs.effective_rank.effective_rank)
assert callable(hs.screen) and callable(hs.spectrum_type.spectrum_type)
"""
    fresh(code)


def test_a_name_that_is_not_there_is_an_ordinary_error():
    with pytest.raises(AttributeError, match="no attribute 'opperate'"):
        hs.opperate
