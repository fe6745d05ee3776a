"""Eigen-CAM. Muhammad and Yeasin, Eigen-CAM: class activation map using principal components, IJCNN 2020."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, check_labels
from sightline.types import Images, Labels, Saliency


def eigen_cam(classifier: Classifier, x: Images, y: Labels | None = None, /, *, center: bool = False) -> Saliency:
    """Return the features projected on their first principal component.

    S = ReLU(X v), X = U D V^T the (i j, c) features of one image and v the first column of V; (b, 1, i, j),
    non-negative, at the layer's resolution. The class does not matter. `center` takes the mean of each channel off X
    first, as pytorch-grad-cam does. A singular vector has no sign: here the cell of the largest magnitude is positive,
    so for features behind a ReLU (without `center`) all of X v is. One forward, one singular value decomposition.

    *Differs:* the ReLU of the CAM family is ours; the paper has none and says nothing of the sign.
    """
    A, logits = classifier.features_and_logits(x)
    check_labels(logits, y)
    X = A.flatten(2).transpose(1, 2).to(torch.promote_types(A.dtype, torch.float32))
    X = X - X.mean(1, keepdim=True) if center else X
    v: Tensor = torch.linalg.svd(X, full_matrices=False).Vh[:, :1]
    projection = (X @ v.transpose(1, 2))[..., 0]
    S = (projection * sign(projection)).relu()
    return S.view(len(A), 1, *A.shape[2:]).to(A.dtype)


def sign(projection: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
    """Return the sign of the number of the largest magnitude in each row."""
    return projection.gather(1, projection.abs().argmax(1, keepdim=True)).sign()
