"One interface to every library: how each makes an operator for mean cross-entropy over one batch."

from __future__ import annotations

import torch
from torch import nn


def ours(net, X, y, mode="cached"):
    from hessian_surgery_nb.hvp import HessianOperator

    op = HessianOperator(net, nn.CrossEntropyLoss(), (X, y), mode=mode)
    return lambda v: op @ v


def curvlinops(net, X, y):
    from curvlinops import HessianLinearOperator

    H = HessianLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        [p for p in net.parameters()],
        [(X, y)],
        check_deterministic=False,
    )
    return lambda v: H @ v


def curvlinops_compiled(net, X, y):
    "As `curvlinops`, with its function of one batch compiled."
    from curvlinops import HessianLinearOperator

    params = [p for p in net.parameters()]
    loss = nn.CrossEntropyLoss()
    H = HessianLinearOperator(net, loss, params, [(X, y)], check_deterministic=False)
    H.__dict__["_mp"] = torch.compile(H._mp)
    return lambda v: H @ v


def eigenthings(net, X, y):
    from hessian_eigenthings import HessianOperator, supervised_loss

    op = HessianOperator(net, [(X, y)], supervised_loss(nn.CrossEntropyLoss()))
    return lambda v: op.matvec(v)


def pyhessian(net, X, y):
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    h = hessian(net, nn.CrossEntropyLoss(), data=(X, y), cuda=X.is_cuda)
    shapes = [p.shape for p in h.params]

    def product(v):
        parts = [t.view(s) for t, s in zip(v.split([s.numel() for s in shapes]), shapes)]
        return torch.cat([t.reshape(-1) for t in hessian_vector_product(h.gradsH, h.params, parts)])

    return product


PRODUCTS = {
    "ours, graph kept": ours,
    "ours, from scratch": lambda *a: ours(*a, mode="recomputed"),
    "PyHessian": pyhessian,
    "curvlinops": curvlinops,
    "hessian-eigenthings": eigenthings,
}
