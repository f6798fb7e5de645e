"""A certificate counts rounding, at every scale and for every kind of operator; what it cannot
certify it says.
"""

import copy

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as sla
import torch
from torch import nn

from hessian_surgery_nb.foundations.datasets import load_digits
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.weights import vector_norm
from hessian_surgery_nb.hvp import HessianOperator
from hessian_surgery_nb.matrices import as_operator
from hessian_surgery_nb.lanczos import (
    angle_bounds,
    eigen_residuals,
    lanczos_tridiag,
    top_eigenpairs,
)
from hessian_surgery_nb.foundations.networks import digits_net
from hessian_surgery_nb.slq import spectral_density
from hessian_surgery_nb.foundations.testbed import (
    dense_hessian,
    planted_matrix,
    tiny_data,
    tiny_mlp,
)

LOSS = nn.CrossEntropyLoss()


def digits(images, seed=0):
    d, net = load_digits(), digits_net(seed=seed).eval()
    X, y = d.x[:images], d.y[:images]
    return HessianOperator(net, LOSS, (X, y)), HessianOperator(
        copy.deepcopy(net).double(), LOSS, (X.double(), y)
    )


@pytest.mark.parametrize("images, seed", [(64, 0), (128, 1), (500, 2)])
def test_residuals_in_float32_hold_in_float64(images, seed):
    single, double = digits(images, seed)
    for tol in (1e-2, 1e-3, 1e-4):
        pairs = top_eigenpairs(single, 3, tol=tol)
        assert pairs.converged.all()
        assert (
            eigen_residuals(double, pairs) <= 1.01 * pairs.residuals
        ).all()  # 1 %: the claim's own rounding


@pytest.mark.parametrize("tol", [1e-6, 1e-8])
def test_what_float32_cannot_carry_is_not_certified(tol):
    single, _ = digits(64)
    with pytest.warns(UserWarning, match=r"float32 carry.*float64"):
        pairs = top_eigenpairs(single, 3, tol=tol)
    assert not pairs.converged.any() and pairs.num_matvecs < 100  # it does not try for ever


@pytest.mark.parametrize(
    "dtype, n", [(torch.float32, 40), (torch.float32, 200), (torch.float64, 40)]
)
def test_all_pairs_of_a_matrix_have_a_residual(dtype, n):
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = (A @ A.T).to(dtype)
    pairs = top_eigenpairs(A, n, tol=1e-3)
    real = eigen_residuals(A.double(), pairs)
    assert pairs.converged.all() and (real <= pairs.residuals).all() and (pairs.residuals > 0).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-25, 1e-10, 1e10, 1e25, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_changes_nothing(factor, dtype):
    A, _ = planted_matrix(
        torch.cat([torch.tensor([40.0, 30.0, 20.0]), torch.linspace(-1, 2, 100)]).double()
    )
    plain, scaled = top_eigenpairs(A.to(dtype), 3), top_eigenpairs((A * factor).to(dtype), 3)
    assert scaled.converged.all() and scaled.num_matvecs == plain.num_matvecs
    torch.testing.assert_close(
        scaled.values / factor, plain.values, rtol=1e-5, atol=0
    )  # rounding of A * factor
    torch.testing.assert_close(
        eigen_residuals((A * factor).to(dtype), scaled) / factor,
        eigen_residuals(A.to(dtype), plain),
        rtol=1e-2,
        atol=1e-4,
    )
    a, b = (spectral_density(M.to(dtype), num_probes=4, num_matvecs=20) for M in (A, A * factor))
    torch.testing.assert_close(b.nodes / factor, a.nodes, rtol=1e-3, atol=1e-3)
    assert (
        abs(b.trace / factor / a.trace - 1) < 1e-4 and abs(b.edges[1] / factor - a.edges[1]) < 1e-3
    )


@pytest.mark.parametrize("factor", [1e-25, 1e20])
def test_a_scaled_loss_in_float32(factor):
    net, (X, y) = tiny_mlp(), tiny_data()
    truth = torch.linalg.eigvalsh(dense_hessian(net, LOSS, X, y)).flip(0)
    op = HessianOperator(
        net.float(), lambda z, t: factor * nn.functional.cross_entropy(z, t), (X.float(), y)
    )
    pairs = top_eigenpairs(op, 2)
    assert pairs.converged.all() and ((pairs.values / factor / truth[:2] - 1).abs() < 1e-3).all()


def test_too_small_for_the_type_is_not_certified():
    A, _ = planted_matrix(torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(0, 1, 50)]).double())
    with pytest.warns(UserWarning, match="not certified"):
        pairs = top_eigenpairs((A * 1e-38).float(), 2)
    assert not pairs.converged.any()


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("n", [3, 70_000])
def test_lengths_at_every_scale(factor, n):
    v = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
    exact = (v * factor).float().double().div(factor).norm().item()
    assert abs(vector_norm((v * factor).float()).item() / factor / exact - 1) < 1e-5
    assert vector_norm(torch.zeros(n)) == 0


def test_products_of_sixteen_bits_do_not_certify_a_thousandth():
    d, net = load_digits(), digits_net(seed=0).eval()
    op = HessianOperator(net, LOSS, (d.x[:64], d.y[:64]), precision="bf16")
    with pytest.warns(UserWarning, match="not certified"):
        pairs = top_eigenpairs(op, 3, tol=1e-3, max_matvecs=60)
    assert not pairs.converged.any()


TRIDIAGONAL = np.diag([2] * 9) + np.diag([-1] * 8, 1) + np.diag([-1] * 8, -1)
KINDS = {
    "sparse of integers": lambda: sp.csr_matrix(TRIDIAGONAL),
    "sparse of bytes": lambda: sp.coo_matrix(TRIDIAGONAL.astype(np.int8)),
    "sparse array": lambda: sp.csc_array(TRIDIAGONAL.astype(np.float32)),
    "operator of integers": lambda: sla.aslinearoperator(TRIDIAGONAL),
    "operator of bytes": lambda: sla.aslinearoperator(TRIDIAGONAL.astype(np.int8)),
    "long doubles": lambda: TRIDIAGONAL.astype(np.longdouble),
    "operator of long doubles": lambda: sla.aslinearoperator(TRIDIAGONAL.astype(np.longdouble)),
    "big-endian": lambda: TRIDIAGONAL.astype(">f8"),
    "big-endian operator": lambda: sla.aslinearoperator(TRIDIAGONAL.astype(">f4")),
    "torch sparse": lambda: torch.tensor(TRIDIAGONAL).double().to_sparse(),
    "torch sparse rows": lambda: torch.tensor(TRIDIAGONAL).double().to_sparse_csr(),
    "requires a gradient": lambda: torch.tensor(TRIDIAGONAL).double().requires_grad_(),
    "parameter": lambda: nn.Parameter(torch.tensor(TRIDIAGONAL).double()),
    "NumPy": lambda: TRIDIAGONAL.astype(float),
    "no type": lambda: sla.LinearOperator((9, 9), matvec=lambda v: TRIDIAGONAL @ v, dtype=None),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_real_operator(kind):
    truth = np.linalg.eigvalsh(TRIDIAGONAL)[::-1]
    pairs = top_eigenpairs(KINDS[kind](), 2, tol=1e-4)
    assert pairs.converged.all() and np.abs(pairs.values.numpy() - truth[:2]).max() < 1e-4
    assert not pairs.vectors.requires_grad
    assert (
        abs(spectral_density(KINDS[kind](), num_probes=2, num_matvecs=9).edges[1] - truth[0]) < 1e-3
    )


H = TRIDIAGONAL + 1j * (np.diag(np.ones(8), 1) - np.diag(np.ones(8), -1))


class Counted:
    num_matvecs, shape, device = 0, (9, 9), torch.device("cpu")

    def __init__(self, dtype):
        self.dtype = dtype

    def __matmul__(self, v):
        return v


REFUSED = {
    "complex": (lambda: H, "complex128.*A"),
    "complex operator": (lambda: sla.aslinearoperator(H), "complex128"),
    "complex sparse": (lambda: sp.csr_matrix(H), "complex128"),
    "complex tensor": (lambda: torch.tensor(H), "complex128"),
    "complex products": (
        lambda: sla.LinearOperator((9, 9), matvec=lambda v: H @ v, dtype=np.float64),
        "complex128",
    ),
    "complex by its own word": (lambda: Counted(torch.complex64), "complex64"),
    "integer by its own word": (lambda: Counted(torch.int64), "int64"),
    "objects": (lambda: TRIDIAGONAL.astype(object), "object"),
    "not symmetric": (lambda: sp.csr_matrix(np.triu(TRIDIAGONAL)), "symmetric"),
    "not symmetric, torch": (
        lambda: torch.tensor(np.triu(TRIDIAGONAL)).double().to_sparse(),
        "symmetric",
    ),
    "not finite": (lambda: sp.csr_matrix(np.diag([1.0, np.nan])), "finite"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_real_and_symmetric_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        top_eigenpairs(make(), 1)
    with pytest.raises(InputError, match=message):
        spectral_density(make(), num_probes=1, num_matvecs=2)


def test_a_hermitian_matrix_by_the_way_out():
    A, B = H.real, H.imag
    pairs = top_eigenpairs(np.block([[A, -B], [B, A]]), 4, tol=1e-6)
    assert np.abs(pairs.values.numpy() - np.repeat(np.linalg.eigvalsh(H)[::-1][:2], 2)).max() < 1e-5


A = torch.diag(torch.arange(1.0, 10.0))
REQUESTS = [
    (lambda: top_eigenpairs(A, True), "k must be a whole number"),
    (lambda: top_eigenpairs(A, 1, seed=1.5), "seed must be a whole number"),
    (lambda: top_eigenpairs(A, 1, seed=True), "seed must be a whole number"),
    (lambda: top_eigenpairs(A, 1, seed=2**70), "seed must be at least"),
    (lambda: lanczos_tridiag(A, 2, seed=2**70), "seed must be at least"),
    (lambda: lanczos_tridiag(A, 2.5), "num_steps must be a whole number"),
    (lambda: spectral_density(A, seed=0.5), "seed must be a whole number"),
    (lambda: spectral_density(A, num_probes=2.0), "num_probes must be a whole number"),
    (lambda: top_eigenpairs(A, 1, max_matvecs=9.5), "max_matvecs must be a whole number"),
    (lambda: top_eigenpairs(A, 1, max_basis=7.5), "max_basis must be a whole number"),
    (lambda: top_eigenpairs(A, 1, max_basis=0), "max_basis must be at least 1"),
    (lambda: top_eigenpairs(A, 1, max_basis=-3), "max_basis must be at least 1"),
    (lambda: top_eigenpairs(A, 4, max_basis=5), "must hold k \\+ 3"),
    (lambda: top_eigenpairs(A, 1, tol="small"), "tol must be"),
    (lambda: top_eigenpairs(A, 1, tol=float("nan")), "tol must be"),
    (lambda: top_eigenpairs(A, 1, tol=2.0), "tol must be"),
    (lambda: top_eigenpairs(A, 1, which=["LA"]), "which must be"),
    (lambda: top_eigenpairs(A, 1, v0=np.ones(9) * 1j), "real numbers"),
    (lambda: top_eigenpairs(A, 1, v0=["a"] * 9), "real numbers"),
]


@pytest.mark.parametrize("request_, message", REQUESTS, ids=[m for _, m in REQUESTS])
def test_requests_that_make_no_sense(request_, message):
    with pytest.raises(InputError, match=message):
        request_()


@pytest.mark.parametrize(
    "v0",
    [
        torch.ones(9, dtype=torch.int64),
        np.ones(9, dtype=">i4"),
        [1] * 9,
        torch.ones(9) * 1e-30,
        torch.ones(9) * 1e30,
        torch.ones(9, requires_grad=True),
        np.ones((9, 2)),
    ],
    ids=str,
)
def test_start_vectors_of_any_real_type(v0):
    pairs = top_eigenpairs(
        A, np.int64(2), v0=v0, seed=np.int32(3), max_matvecs=np.int64(50), max_basis=np.int16(9)
    )
    assert pairs.converged.all() and (pairs.values - torch.tensor([9.0, 8.0])).abs().max() < 1e-2


def test_angles_follow_the_residuals():
    S, V = planted_matrix(
        torch.cat([torch.tensor([40.0, 30.0, 20.0]), torch.linspace(0, 2, 60)]).double()
    )
    pairs = top_eigenpairs(S.float(), 3, tol=1e-3)
    angle = torch.acos((V[:, :3] * pairs.vectors.double()).sum(0).abs().clamp(max=1.0))
    assert (angle <= angle_bounds(pairs, rest=2.0) + 1e-7).all()  # acos near 1
    assert as_operator(S).dtype == torch.float64
