"""Files. Weights as safetensors and, beside them, a manifest in JSON that can be read without a library."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.runs import provenance, write_bytes, write_text

if TYPE_CHECKING:
    from torch import Tensor, nn


def write(network: "nn.Module", path: Path | str, manifest: Mapping[str, Any], *, half: bool = False) -> Path:
    """Write a network's state and its manifest, each atomically; return the path of the weights.

    The manifest also gets the checksum of the weights and the versions. `half` stores floats in 16 bits.

    Raises:
        ValueError: a path that is no .safetensors, or weights that 16 bits cannot hold.
    """
    from safetensors.torch import save as to_bytes

    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"expected a path that ends in .safetensors, got {target}")
    content = to_bytes(state_of(network, half=half))
    full = {**manifest, "sha256": hashlib.sha256(content).hexdigest(), "provenance": provenance()}
    text = json.dumps(full, indent=1, sort_keys=True) + "\n"
    write_bytes(target, content)
    write_text(target.with_suffix(".json"), text)
    return target


def state_of(network: "nn.Module", *, half: bool) -> dict[str, "Tensor"]:
    """Return copies of the state, tied weights twice; floats in 16 bits where asked."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    if not half:
        return state
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if lost := [name for name, value in halves.items() if not value.isfinite().all()]:
        raise ValueError(f"16 bits cannot hold the values of {', '.join(lost[:4])}; save with half=False")
    return halves


def read(path: Path | str, names: Sequence[str], *, kind: str) -> tuple[dict[str, Any], bytes]:
    """Return the manifest, which has to have these names, and the weights' bytes.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: no manifest of this kind, or one of other weights.
    """
    weights = Path(path)
    manifest_path = weights.with_suffix(".json")
    for file, hint in (
        (weights, "give the path of a .safetensors file"),
        (manifest_path, "it says which network the weights belong to; sightline writes both"),
    ):
        if not file.exists():
            raise FileNotFoundError(f"no file {file}; {hint}")
    content = weights.read_bytes()
    manifest = manifest_of(manifest_path, names, kind=kind)
    if manifest["sha256"] != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{manifest_path} describes other weights than {weights}: the checksums differ")
    return manifest, content


def checksums(plain: Any) -> dict[str, str]:
    """Return the checksum of every file of weights that plain data names, by its path, as its manifest has it."""
    if isinstance(plain, Mapping):
        return {path: digest for item in plain.values() for path, digest in checksums(item).items()}
    if isinstance(plain, list | tuple):
        return {path: digest for item in plain for path, digest in checksums(item).items()}
    path = str(plain).partition("?")[0]
    manifest = Path(path).with_suffix(".json")
    if not isinstance(plain, str) or not path.endswith(".safetensors") or not manifest.exists():
        return {}
    return {path: str(manifest_of(manifest, (), kind="file of weights")["sha256"])}


def manifest_of(path: Path, names: Sequence[str], *, kind: str) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        ValueError: not JSON, or not what `write` writes for this kind.
    """
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in (*names, "sha256") if name not in table]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no manifest of a {kind}: {error}; sightline writes one") from error
    if missing:
        raise ValueError(f"{path} is no manifest of a {kind}: it lacks {', '.join(missing)}")
    return table


def fill(network: "nn.Module", content: bytes, path: Path | str) -> None:
    """Copy the weights of a file into a network.

    Raises:
        ValueError: not safetensors, or tensors that are missing, unexpected or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        state = from_bytes(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    own = network.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [name for name in own if name in state and own[name].shape != state[name].shape],
    }
    if any(wrong.values()):
        told = "; ".join(f"{why}: {', '.join(names)}" for why, names in wrong.items() if names)
        raise ValueError(f"{path} does not fit {type(network).__name__}: {told}")
    network.load_state_dict(state)
