"""Wrap networks of torchvision, timm and Hugging Face with random weights, and write what was found: docs/networks.md.

Three checks each: the layer lies on the image (a changed patch changes its own cell most), Grad-CAM's map is finite and
varies, and other shapes than squares work: at once, or where the network is built for them. It takes some ten minutes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sightline.classifier import Classifier, wrap
from sightline.layers import Tokens, Unpatched, channels_last
from sightline.methods import METHODS
from sightline.models import load
from sightline.models._mini_resnet import seeded
from sightline.runs import Choice

PAGE = Path(__file__).with_suffix(".md")
CLASSES = 10
ENDS = ("proj", "projection", "out_proj", "o_proj", "dense")
"""How the last layer of an attention is called."""


@dataclass(frozen=True)
class Network:
    """A network: its library, its name there, and what to build it with; `size` where it does not say its own."""

    library: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    size: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What was found of a network; `error` where it could not be wrapped."""

    network: Network
    layer: str = ""
    grid: str = ""
    oblong: str = ""
    local: bool = False
    varies: bool = False
    error: str = ""

    @property
    def works(self) -> bool:
        """Tell whether it is explained rightly."""
        return self.local and self.varies and not self.error


def torchvision(names: str, size: int = 224, **settings: Any) -> list[Network]:
    """Return networks of torchvision."""
    return [Network("torchvision", name, settings, size) for name in names.split()]


def timm(names: str, **settings: Any) -> list[Network]:
    """Return networks of timm, which say their size."""
    return [Network("timm", name, settings) for name in names.split()]


def huggingface(names: str, size: int | None = None, **settings: Any) -> list[Network]:
    """Return classifiers of Hugging Face, built from their configuration."""
    return [Network("transformers", name, settings, size) for name in names.split()]


NETWORKS = (
    *torchvision("alexnet vgg11_bn resnet18 resnext50_32x4d densenet121 squeezenet1_1"),
    *torchvision("googlenet", init_weights=False),
    *torchvision("inception_v3", size=299, init_weights=False),
    *torchvision("shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small mnasnet0_5 regnet_x_400mf regnet_y_400mf"),
    *torchvision("efficientnet_b0 efficientnet_v2_s convnext_tiny vit_b_32 swin_t maxvit_t"),
    *torchvision("swin_v2_t", size=256),
    *timm("vit_tiny_patch16_224 vit_small_patch32_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224", depth=4),
    *timm("vit_small_patch14_reg4_dinov2", depth=2),
    *timm("vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_224 beit_base_patch16_224", depth=2),
    *timm("eva02_tiny_patch14_224 vit_relpos_small_patch16_224 vit_small_r26_s32_224", depth=4),
    *timm("swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224", depths=(2, 2, 2, 2)),
    *timm("convnext_atto convnextv2_atto efficientnet_b0 tf_efficientnetv2_b0"),
    *timm("mobilenetv4_conv_small mobilenetv4_hybrid_medium resnetv2_50 maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224"),
    *timm("mixer_s32_224 resmlp_12_224 gmlp_ti16_224"),
    *timm("cait_xxs24_224", depth=4),
    *timm("convit_tiny"),
    *timm("tnt_s_patch16_224 xcit_nano_12_p16_224", depth=4),
    *timm("levit_128s pit_ti_224 poolformer_s12 edgenext_xx_small mobilevit_xxs mobilevitv2_050 crossvit_tiny_240"),
    *timm("twins_svt_small pvt_v2_b0 volo_d1_224 visformer_tiny coat_tiny focalnet_tiny_srf davit_tiny"),
    *timm("hrnet_w18_small regnety_002 resnest14d dpn48b ese_vovnet19b_dw ghostnet_100 repvgg_a0 nf_regnet_b0"),
    *timm("inception_next_atto efficientvit_b0 efficientformerv2_s0 fastvit_t8 repvit_m0_9 hiera_tiny_224"),
    *timm("mambaout_femto nest_tiny tiny_vit_5m_224 mvitv2_tiny rexnet_100 res2net50_14w_8s darknet53 cspresnet50"),
    *timm("resnet10t seresnet18 hgnetv2_b0 starnet_s1 botnet26t_256 halonet26t lambda_resnet26t gcvit_xxtiny"),
    *huggingface("ViT DeiT Dinov2 Dinov2WithRegisters Beit Data2VecVision IJepa ViTMSN", num_hidden_layers=2),
    *huggingface("Swin Swinv2", depths=[2, 2, 2, 2]),
    *huggingface("ResNet ConvNext ConvNextV2 FocalNet", depths=[1, 1, 2, 1]),
    *huggingface("RegNet", hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 2, 1]),
    *huggingface("EfficientNet", size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
    *huggingface("MobileNetV1 MobileNetV2 MobileViT MobileViTV2 PoolFormer Segformer Levit Pvt PvtV2 Bit SwiftFormer"),
    *huggingface("HGNetV2 Hiera Cvt"),
)


def built(network: Network, size: tuple[int, int] | None = None) -> Classifier:
    """Return a network as a classifier, with random weights; for images of `size`, where it has to know."""
    if network.library == "transformers":
        return from_configuration(network, size)
    settings = {"weights": "none", "num_classes": CLASSES, **network.settings}
    said = {"img_size": size} if size and network.library == "timm" else {}
    wanted = size or network.size
    shape = {"size": list(wanted) if isinstance(wanted, tuple) else wanted} if wanted else {}
    return load(Choice(f"{network.library}:{network.name}", {**settings, **said, **shape}))


def from_configuration(network: Network, size: tuple[int, int] | None) -> Classifier:
    """Return a classifier of Hugging Face."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    said = {"image_size": list(size)} if size else {}
    config = getattr(transformers, f"{network.name}Config")(**{"num_labels": CLASSES, **network.settings, **said})
    with seeded(0):
        model = getattr(transformers, f"{network.name}ForImageClassification")(config)
    return wrap(model, normalization="imagenet", size=size or network.size)


def damped(model: nn.Module) -> None:
    """Let each cell read its own place most, and give a head of zeros weights; layers, strides and grids stay.

    Else the answer of a random network to a patch is nearly the same everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride != module.kernel_size:
            taps = torch.full(module.kernel_size, 0.3)
            taps[module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
            module.weight.data *= taps
        if isinstance(module, nn.Linear) and not module.weight.any():
            module.weight.data = 0.02 * torch.randn(module.weight.shape, generator=generator)
        biases = getattr(module, "attention_biases", None)
        if isinstance(biases, nn.Parameter):  # one an offset, first that of no offset
            biases.data[:, 0] += 20
        if "attention" in type(module).__name__.lower():
            last = [inner for name, inner in module.named_children() if name in ENDS]
            for inner in (part for one in last for part in one.modules()):
                if isinstance(inner, nn.Linear | nn.Conv2d):
                    inner.weight.data *= 0.1
    model.train().eval()


def settled(classifier: Classifier) -> None:
    """Give the batch norms the statistics of noise: else what a random network says may fade on its way."""
    generator, model = torch.Generator().manual_seed(0), classifier.model
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.track_running_stats]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.rand(4, classifier.channels, *classifier.size, generator=generator))
    for norm, momentum in zip(norms, before, strict=True):
        norm.eval()
        norm.momentum = momentum


def is_local(classifier: Classifier, count: int = 2) -> bool:
    """Tell whether a patch of the image changes its own cells most: in three places, for several images.

    The square has a side of one and a half cells: it holds the middle of two by two cells, wherever in a cell the
    strides put it. What changes everywhere alike (attention, gates) does not count: the median is taken off.
    """
    h, w = classifier.size
    x = torch.rand(count, classifier.channels, h, w, generator=torch.Generator().manual_seed(5))
    before = classifier.features(x)
    i, j = before.shape[2:]
    places = ((0, j - 2), (i - 2, 0), (i // 2, j // 3))
    return all(strongest_inside(classifier, x, before, place) for place in places)


def strongest_inside(classifier: Classifier, x: Tensor, before: Tensor, place: tuple[int, int]) -> bool:
    """Tell whether the features change most in two by two cells at (row, column) when the image does there."""
    (row, column), (h, w), (i, j) = place, x.shape[2:], before.shape[2:]
    rows = slice(round(row * h / i), round((row + 1.5) * h / i))
    columns = slice(round(column * w / j), round((column + 1.5) * w / j))
    changed = x.clone()
    changed[:, :, rows, columns] = 1 - changed[:, :, rows, columns]
    change = classifier.features(changed) - before
    change = change - change.flatten(2).median(2).values[:, :, None, None]
    strength = change.abs().sum((0, 1))
    inside = torch.zeros(i, j, dtype=torch.bool)
    inside[row : row + 2, column : column + 2] = True
    outside = strength[~inside].mean() if not inside.all() else torch.tensor(0.0)
    return bool(inside.flatten()[strength.argmax()]) and bool(strength[inside].mean() > 1.2 * outside)


def varies(classifier: Classifier) -> bool:
    """Tell whether Grad-CAM's map of some class is finite and varies: the ReLU of a random network may leave none."""
    x = torch.rand(1, classifier.channels, *classifier.size, generator=torch.Generator().manual_seed(1))
    maps = (METHODS["grad_cam"](classifier, x, torch.tensor([y])) for y in range(CLASSES))
    return any(bool(one.isfinite().all()) and float(one.max() - one.min()) > 0 for one in maps)


def oblong(network: Network, classifier: Classifier) -> str:
    """Say which other shapes than its own the network takes, with the same layer and patches in their places."""
    h, w = classifier.size
    columns = classifier.features(torch.zeros(1, classifier.channels, h, w)).shape[3]
    wide = h, round(w / columns * (columns + columns // 2 if columns < 30 else columns * 3 // 4))
    mean, std = classifier.mean, classifier.std
    try:
        found = wrap(classifier.model, normalization=(mean, std), size=wide)
        return "any" if found.layer == classifier.layer and (is_local(found) or is_local(found, 4)) else "no"
    except ValueError:
        pass
    try:
        found = built(network, wide)
        damped(found.model)
        return "built for it" if is_local(found) else "no"
    except (ValueError, TypeError, RuntimeError, AssertionError):
        return "no"


def outcome(network: Network) -> Outcome:
    """Wrap a network and check it."""
    try:
        classifier = built(network)
        damped(classifier.model)
        i, j = classifier.features(torch.rand(1, classifier.channels, *classifier.size)).shape[2:]
        told = f"{i} x {j} {grid(classifier)}"
        seen = is_local(classifier), varies(classifier)
        if not all(seen):
            settled(classifier)
            seen = seen[0] or is_local(classifier, 4), seen[1] or varies(classifier)
        return Outcome(network, classifier.layer, told, oblong(network, classifier), *seen)
    except (ValueError, LookupError) as error:
        return Outcome(network, error=" ".join(str(error).split()))


def grid(classifier: Classifier) -> str:
    """Say how the layer's output lies on the image."""
    if isinstance(found := classifier.to_grid, Tokens | Unpatched):
        return "tokens" if found.prefix == 0 else f"tokens behind {found.prefix}"
    return "map, channels last" if found is channels_last else "map"


def page(outcomes: list[Outcome]) -> str:
    """Return the page."""
    working = sum(one.works for one in outcomes)
    rows = [
        f"| {one.network.library} | `{one.network.name}` | " + (f"{one.error} | | | | |" if one.error else cells(one))
        for one in outcomes
    ]
    return "\n".join(
        [
            "# Networks",
            "",
            f"What `wrap` finds in {len(outcomes)} networks with random weights, by `docs/networks.py`: "
            f"{working} work ({working / len(outcomes):.0%}).",
            "",
            "- **cells** of the layer that is explained, and how they lie in its output: a map, or tokens (behind so "
            "many others)",
            "- **oblong**: images of another shape than the square: `any`, `built for it` (timm's `img_size=`, "
            "transformers' `image_size=`), or no",
            "- **local**: when a patch of the image changes, the layer changes most in the cells where the patch lies",
            "- **Grad-CAM**: the map of at least one of ten classes is finite and varies",
            "",
            "A network without a head (`num_classes=0`, `...Model`) is an error that says so. One that reads tokens in "
            "an order of its own is wrapped by hand: `Classifier(model, layer, to_grid=...)`.",
            "",
            "Two of transformers' networks are not local with the random weights that they start from, which says "
            "nothing of trained ones: in `EfficientNet` what is left of an image at the last layer is of the order of "
            "1e-33 (its largest change lies in the right place or one cell beside it), and the attention of "
            "`MobileViT` shares every change with all cells alike, so that only the border differs.",
            "",
            "| library | network | layer | cells | oblong | local | Grad-CAM |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def cells(one: Outcome) -> str:
    """Return what was found as the rest of a row."""
    said = [f"`{one.layer}`", one.grid, one.oblong, *("yes" if good else "no" for good in (one.local, one.varies))]
    return f"{' | '.join(said)} |"


def main(names: list[str]) -> None:
    """Write the page; with names, print what is found of these alone."""
    torch.set_num_threads(1)
    chosen = [one for one in NETWORKS if not names or one.name in names]
    outcomes = []
    for network in chosen:
        outcomes.append(outcome(network))
        print(network.library, network.name, outcomes[-1].error or cells(outcomes[-1]), flush=True)
    if not names:
        PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
