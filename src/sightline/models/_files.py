"""Files. Weights as safetensors and, beside them, a manifest in JSON that can be read without a library."""

import hashlib
import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.runs import provenance, write_bytes, write_text

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth")
"""How files of weights end."""

NESTED = ("state_dict", "model_state_dict", "model")
"""Under which of its names a checkpoint holds the weights."""

ABOUT = ("extra", "provenance", "sha256")
"""What a manifest says about how the weights came to be; the rest says what they mean."""

USES = {
    "casm": "a CASM mask; use it as --method {}",
    "calm": "a CALM network; use it as --model {} --method calm_attribution",
    "segmenter": "a segmenter; use it as --method {}",
    "classifier": "a classifier; use it as --model {}",
}
"""What a file may hold -> how it is called and used."""


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


def in_32_bits(network: "nn.Module") -> bool:
    """Tell whether all floats of a network have 32 bits."""
    import torch

    return all(v.dtype == torch.float32 for v in network.state_dict().values() if v.is_floating_point())


def read(path: Path | str, names: Sequence[str], *, kind: str) -> tuple[dict[str, Any], bytes]:
    """Return the manifest, which has to have these names, and the weights' bytes.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: no manifest of this kind, or one of other weights.
    """
    weights = Path(path)
    manifest_path = weights.with_suffix(".json")
    for file, hint in (
        (weights, f"give the path of a file of weights ({', '.join(SUFFIXES)})"),
        (
            manifest_path,
            'it says which network the weights belong to: {"model": "torchvision:resnet18"}; or name the network and '
            f"its weights: torchvision:resnet18?weights={weights}",
        ),
    ):
        if not file.exists():
            raise FileNotFoundError(f"no file {file}; {hint}")
    content = weights.read_bytes()
    manifest = manifest_of(manifest_path, kind=kind)
    if missing := [name for name in names if name not in manifest]:
        lacks = f"it lacks {', '.join(missing)}"
        raise ValueError(f"{manifest_path} is no manifest of a {kind}: {use(manifest, weights) or lacks}")
    if manifest.get("sha256", digest := hashlib.sha256(content).hexdigest()) != digest:
        raise ValueError(f"{manifest_path} describes other weights than {weights}: the checksums differ")
    return manifest, content


def use(manifest: Mapping[str, Any], weights: Path) -> str:
    """Say what weights are by their manifest, and how they are used; nothing where it does not tell."""
    from sightline.models import held

    kind = held(manifest)
    return f"it is that of {USES[kind].format(weights)}" if kind else ""


def checksums(plain: Any) -> dict[str, str]:
    """Return the checksum of every file of weights that plain data names, by its path, or by that of its manifest."""
    return {path: checksum(Path(path)) for path in files_in(plain)}


def meanings(plain: Any) -> dict[str, str]:
    """Return a digest of what the manifest of every file of weights says, by the file's path, where there is one.

    Network, layer, normalization, size and classes count; how the weights came to be, and what was measured, do not.
    """
    return {path: digest for path in files_in(plain) if (digest := meaning(Path(path)))}


def files_in(plain: Any) -> Iterator[str]:
    """Yield the files of weights that plain data names and that are there."""
    if isinstance(plain, Mapping | list | tuple):
        for item in plain.values() if isinstance(plain, Mapping) else plain:
            yield from files_in(item)
    elif isinstance(plain, str):
        yield from (part for part in re.split("[?&=]", plain) if is_weights(part) and Path(part).exists())


def checksum(path: Path) -> str:
    """Return the checksum of a file of weights, as its manifest has it where there is one."""
    manifest = path.with_suffix(".json")
    said = manifest_of(manifest, kind="file of weights").get("sha256") if manifest.exists() else None
    return str(said or hashlib.sha256(path.read_bytes()).hexdigest())


def meaning(path: Path) -> str:
    """Return a digest of what the manifest of a file of weights says about the network; nothing without a manifest."""
    manifest = path.with_suffix(".json")
    if not manifest.exists():
        return ""
    told = {k: v for k, v in manifest_of(manifest, kind="file of weights").items() if k not in ABOUT}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def manifest_of(path: Path, *, kind: str) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        ValueError: not JSON, or not a table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no manifest of a {kind}: {error}; sightline writes one") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is no manifest of a {kind}: it holds no table")
    return table


def is_weights(text: str) -> bool:
    """Tell whether a text is the name of a file of weights."""
    return text.endswith(SUFFIXES)


def pour(network: "nn.Module", path: Path | str) -> "nn.Module":
    """Copy the weights of a file without a manifest into a network; return it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that does not fit.
    """
    put(network, opened(path), path)
    return network


def opened(path: Path | str) -> dict[str, "Tensor"]:
    """Return the tensors of a file without a manifest.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of weights.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}; weights= takes the path of a state dict ({', '.join(SUFFIXES)})")
    return tensors(Path(path).read_bytes(), path)


def fill(network: "nn.Module", content: bytes, path: Path | str, *, as_stored: bool = False) -> None:
    """Copy the weights of a file into a network, whose floats then have as many bits as those stored, if asked.

    Raises:
        ValueError: no file of weights, or tensors that are missing, unexpected or of another shape.
    """
    state = tensors(content, path)
    for name, value in (*network.named_parameters(), *network.named_buffers()) if as_stored else ():
        if name in state and value.is_floating_point() and state[name].is_floating_point():
            value.data = value.data.to(state[name].dtype)
    put(network, state, path)


def put(network: "nn.Module", state: Mapping[str, "Tensor"], path: Path | str) -> None:
    """Copy tensors into a network; counts of batches, which old files lack, may be missing.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape.
    """
    own = network.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [name for name in own if name in state and own[name].shape != state[name].shape],
    }
    check_fit(network, path, wrong)
    network.load_state_dict({**own, **state})


def check_fit(network: "nn.Module", path: Path | str, wrong: Mapping[str, Sequence[str]]) -> None:
    """Check that nothing is wrong with the tensors of a file.

    Raises:
        ValueError: something is.
    """
    if any(wrong.values()):
        told = "; ".join(f"{why}: {', '.join(names)}" for why, names in wrong.items() if names)
        raise ValueError(f"{path} does not fit {type(network).__name__}: {told}")


def tensors(content: bytes, path: Path | str) -> dict[str, "Tensor"]:
    """Read a state dict from the bytes of a file; no code of a file is run.

    Raises:
        ValueError: no safetensors, or a pickle of more than tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    if str(path).endswith(".safetensors"):
        try:
            return from_bytes(content)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        read = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no file of weights alone; write torch.save(network.state_dict(), ...)") from error
    return plain_names(read, path)


def plain_names(read: Any, path: Path | str) -> dict[str, "Tensor"]:
    """Return the tensors of a checkpoint by the network's own names, without those of training around it.

    Raises:
        ValueError: it holds something else.
    """
    import torch

    inner = next((read[name] for name in NESTED if name in read), read) if isinstance(read, Mapping) else None
    inner = inner if isinstance(inner, Mapping) else read
    if not isinstance(inner, Mapping) or not all(isinstance(value, torch.Tensor) for value in inner.values()):
        raise ValueError(f"{path} holds no state dict; write torch.save(network.state_dict(), ...)")
    parallel = bool(inner) and all(name.startswith("module.") for name in inner)
    return {name.removeprefix("module.") if parallel else name: value for name, value in inner.items()}
