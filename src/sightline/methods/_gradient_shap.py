"""GradientSHAP. Lundberg and Lee, A unified approach to interpreting model predictions, NeurIPS 2017 (expected
gradients: Erion et al. 2021); run by captum (Kokhlikyan et al. 2020).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from sightline.classifier import Classifier, derivative, logit
from sightline.erase import Eraser, resolve
from sightline.hooks import differentiable, frozen
from sightline.methods._lime import captum
from sightline.methods._pyramid import mixed
from sightline.types import Images, Labels, Saliency, Score, Values


def gradient_shap(
    classifier: Classifier,
    x: Images,
    y: Labels | None = None,
    /,
    *,
    samples: int = 20,
    score: Score = logit,
    erase: Eraser = "black",
    baseline_noise: float = 0.15,
    noise: float = 0.0,
    seed: int = 0,
) -> Saliency:
    """Return each pixel's expected share in what the score gains on the way from a random baseline to the image.

    S = sum_channels mean_i (x_i - x'_i) df/dx(x'_i + a_i (x_i - x'_i)) over `samples` draws, a_i uniform in [0, 1].
    x'_i is the filling of `erase` or, in half of the cases, that filling with Gaussian noise of `baseline_noise`; x_i
    is x with Gaussian noise of `noise` (captum's `stdevs`, none by default); neither is clipped to [0, 1]. The sum of S
    is f(x) - mean_i f(x'_i) for a linear f, and on average for any other.

    (b, 1, h, w), signed. Costs 1 forward, and `samples` forwards and backwards, all those of an image at a time.
    *Differs:* captum's estimate of SHAP values, which is that of expected gradients. All images draw the same numbers
    from `seed`; those of `noise` are drawn on the image's device and depend on it.

    Raises:
        ImportError: captum is not installed.
        ValueError: fewer than one sample, negative noise, or an erase that depends on the mask (inpainting).
    """
    attr = captum("gradient_shap")
    if samples < 1 or not baseline_noise >= 0 or not noise >= 0:
        given = f"samples={samples}, baseline_noise={baseline_noise}, noise={noise}"
        raise ValueError(f"expected samples >= 1, baseline_noise and noise >= 0, got {given}")
    with differentiable(), frozen(classifier.model):
        y, x = classifier.labels(x, y), x.detach().clone()
        filled, S = mixed(x, filling=resolve(erase, classifier.mean))[:, 1], torch.empty_like(x[:, :1])
        for i in range(len(x)):

            def f(images: Images, label: Tensor = y[i]) -> Values:
                values = score(classifier(images), label.expand(len(images)))
                return values if values.requires_grad else derivative(values, images, "the image")

            with seeded(seed, x.device):
                shares = attr.GradientShap(f).attribute(
                    x[i : i + 1],
                    baselines=baselines(filled[i], samples, baseline_noise, seed),
                    n_samples=samples,
                    stdevs=noise,
                )
            S[i] = shares.detach().sum(1)
    return S


def baselines(filled: Tensor, samples: int, noise: float, seed: int) -> Images:
    """Return the filling `samples` times, and as often with noise."""
    generator = torch.Generator().manual_seed(seed)
    noises = torch.randn(samples, *filled.shape, generator=generator, dtype=torch.float64).to(filled)
    return torch.cat([filled.expand_as(noises), filled + noise * noises])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators from which captum draws; they come back as they were."""
    before = np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            np.random.set_state(before)
