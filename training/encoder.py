"""From a generation to an encoder: names of images in, unit vectors (n images, d width) float32 out.

Invariants: the weights are those whose sha256 the card names; every image is decoded with the card's preprocessing; a
vector is finite and of unit length, or the image is reported as failed and its row is NaN. 16-bit arithmetic is used
only where the processor has it and the vectors agree with float32 (cosine above 0.999 on the first batch).
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.nn import functional

from graceful.errors import GracefulError, UsageError
from graceful.files import join, read_bytes, write_bytes
from graceful.training.backbones import build_backbone, load_initial_weights
from graceful.training.generation import (
    CLASSIFIER_FILE,
    WEIGHTS_FILE,
    BackboneSpec,
    GenerationCard,
    Preprocessing,
    VariantOf,
    make_generation_id,
    read_card,
    write_card,
)
from graceful.training.images import UnreadableImageError, decode, read_payloads
from graceful.training.libraries import is_of_a_library, library_encoder
from graceful.training.probes import (
    Agreement,
    Encode,
    compare,
    read_probes,
    refuse_changed,
    write_probes,
)
from graceful.training.text_tower import probe_text_tower

Precision = Literal["auto", "float32", "bfloat16", "float16"]
MIN_AGREEMENT = 0.999
NON_FINITE = "non-finite embedding"

_log = logging.getLogger("graceful.encoder")


# By folder and digest of the probes: the libraries that a process has loaded do not change under it.
_AGREEMENTS: dict[tuple[str, str], Agreement] = {}


class TakesTextError(GracefulError):
    """Images were to be encoded with a text tower."""


class CorruptedWeightsError(GracefulError):
    """A stored file of a generation is not the one that its card names."""


class SourceEncoder:
    """Encode images by name. Open one per process with `open_encoder`."""

    def __init__(self, card: GenerationCard, network: nn.Module, batch_size: int, precision: Precision) -> None:
        self.card = card
        self.batch_size = batch_size
        self._network = network
        self._device = next((p.device for p in network.parameters()), torch.device("cpu"))
        self._dtype = arithmetic(precision, self._device)
        self._must_check = precision == "auto" and self._dtype is not None

    def __call__(self, sources: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Return vectors (n, d) and {index: reason} of the images that failed; their rows are NaN."""
        vectors = np.full((len(sources), self.card.width), np.nan, dtype=np.float32)
        failures: dict[int, str] = {}
        with ThreadPoolExecutor(max_workers=1) as decoder:
            for rows, pixels, failed in self._decoded_batches(decoder, sources):
                failures.update(failed)
                if not len(rows):
                    continue
                batch = self.encode_pixels(pixels)
                bad = ~np.isfinite(batch).all(axis=1)
                failures.update({int(row): NON_FINITE for row in rows[bad]})
                vectors[rows[~bad]] = batch[~bad]
        return vectors, dict(sorted(failures.items()))

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit vectors of decoded images (n, channels, size, size); NaN rows where there is no direction."""
        batch = torch.from_numpy(pixels)
        if self._must_check:
            self._must_check = False
            sample = batch[:32]
            exact = embed(self._network, sample, self.card.preprocessing, self._device, None)
            fast = embed(self._network, sample, self.card.preprocessing, self._device, self._dtype)
            if not bool(((exact * fast).sum(dim=1).nan_to_num(1.0) > MIN_AGREEMENT).all()):
                self._dtype = None
        return embed(self._network, batch, self.card.preprocessing, self._device, self._dtype).cpu().numpy()

    def _decoded_batches(
        self, decoder: ThreadPoolExecutor, sources: Sequence[str]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8], dict[int, str]]]:
        """Decode one batch ahead of the network, in another thread."""
        starts = range(0, len(sources), self.batch_size)
        if not len(starts):
            return
        pending = decoder.submit(self._decode, sources, starts[0])
        for following in [*starts[1:], None]:
            ready = pending.result()
            if following is not None:
                pending = decoder.submit(self._decode, sources, following)
            yield ready

    def _decode(
        self, sources: Sequence[str], start: int
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], dict[int, str]]:
        unreadable: dict[int, str] = {}
        payloads = read_payloads(sources[start : start + self.batch_size], unreadable)
        failures = {start + offset: reason for offset, reason in unreadable.items()}
        rows: list[int] = []
        images: list[NDArray[np.uint8]] = []
        for offset, payload in enumerate(payloads):
            if offset in unreadable:
                continue
            try:
                images.append(decode(payload, self.card.preprocessing))
                rows.append(start + offset)
            except UnreadableImageError as error:
                failures[start + offset] = str(error)
        return np.array(rows, dtype=np.int64), np.stack(images) if images else np.empty(0, np.uint8), failures


def usable_gpus() -> int:
    """Return how many GPUs PyTorch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def open_encoder(
    generation_uri: str, batch_size: int = 256, precision: Precision = "auto", device: str = "auto"
) -> SourceEncoder:
    """Open the encoder of a stored generation: `functools.partial(open_encoder, uri)` is the picklable factory.

    Sets torch's threads to OMP_NUM_THREADS when that is set. The first time that this process opens a generation, it
    embeds its probes and compares (see `probes`).

    Raises: GenerationNotFoundError, CorruptedWeightsError, EncoderChangedError, DamagedProbesError.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    probes = read_probes(generation_uri)
    key = (generation_uri, "" if probes is None else probes.digest)
    if key in _AGREEMENTS:  # refused once, refused again without loading anything
        refuse_changed(generation_uri, _AGREEMENTS[key])
    card, network = open_network(generation_uri, torch.device(device))
    if probes is not None and key not in _AGREEMENTS:
        found = _AGREEMENTS[key] = compare(probes, _exact(network, card.preprocessing), card.backbone.name)
        if found.is_noted:
            _log.warning(
                "%s gives almost the vectors that it gave when it was made: cosine %.5f (%s)",
                card.generation_id, found.worst_cosine, found.said,
            )  # fmt: skip
        refuse_changed(generation_uri, found)
    return SourceEncoder(card, network, batch_size, precision)


def probe_encoder(generation_uri: str) -> Agreement | None:
    """Open a stored generation or text tower and embed its probes again; None where it has none. Refuses nothing."""
    if read_card(generation_uri).takes == "text":
        return probe_text_tower(generation_uri)
    probes = read_probes(generation_uri)
    if probes is None:
        return None
    card, network = open_network(generation_uri, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return compare(probes, _exact(network, card.preprocessing), card.backbone.name)


def _exact(network: nn.Module, preprocessing: Preprocessing) -> Encode:
    """How a network embeds encoded pictures in float32: 16-bit arithmetic is compared with that where it is used."""

    def encode(payloads: Sequence[bytes]) -> NDArray[np.float32]:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        pixels = torch.from_numpy(np.stack([decode(payload, preprocessing) for payload in payloads]))
        was_training = network.training
        network.eval()
        vectors = embed(network, pixels, preprocessing, device, None).cpu().numpy()
        network.train(was_training)
        return vectors

    return encode


def open_network(generation_uri: str, device: torch.device) -> tuple[GenerationCard, nn.Module]:
    """Return card and network (evaluation mode, no gradients) of a stored generation, its weights verified.

    Raises: CorruptedWeightsError, TakesTextError, GenerationNotFoundError.
    """
    card = read_card(generation_uri)
    if card.takes == "text":
        raise TakesTextError(
            f"opening {card.generation_id}: expected an encoder of images, found a text tower from {card.backbone.name}"
            f", whose weights are not kept here; name its generation, {card.of}"
        )
    payload = _verified(join(generation_uri, WEIGHTS_FILE), card.digest)
    network = build_backbone(card.backbone, card.width, card.preprocessing.channels, card.preprocessing.image_size)
    network.load_state_dict(load_tensors(payload), strict=True)
    network.requires_grad_(False)
    return card, network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def read_classifier(generation_uri: str) -> tuple[GenerationCard, Tensor, Tensor] | None:
    """Return card, classifier rows (C, d) and class means (C, d); None for a generation without a classifier."""
    card = read_card(generation_uri)
    if not card.has_classifier:
        return None
    tensors = load_tensors(_verified(join(generation_uri, CLASSIFIER_FILE), card.classifier_digest))
    return card, tensors["rows"], tensors["class_means"]


def embed(
    network: nn.Module, pixels: Tensor, preprocessing: Preprocessing, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """Return unit vectors (n, d) float32 of uint8 pixels (n, channels, size, size); NaN rows for no direction."""
    with torch.inference_mode(), autocast(device, dtype):
        outputs = network(normalise(pixels.to(device), preprocessing))
    vectors = outputs.float()
    norms = vectors.norm(dim=1, keepdim=True)
    return torch.where((norms > 1e-12) & norms.isfinite(), vectors / norms, torch.nan)


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the network's input (float32, channels last) of uint8 pixels."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, device=pixels.device).view(1, -1, 1, 1)
    images = pixels.to(torch.float32).div_(255.0).sub_(mean).div_(std)
    return images.contiguous(memory_format=torch.channels_last)


def sixteen_bit_type(device: torch.device) -> torch.dtype | None:
    """Return the 16-bit type that this device computes faster than float32, or None. Decided by capability."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if platform.machine().lower() in (
        "x86_64",
        "amd64",
    ):  # without these, bfloat16 is emulated and 5 to 30 times slower
        has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        has_units = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if has_units else None


def arithmetic(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of a precision's name on a device; None for float32. auto: 16 bit where it is faster."""
    if precision == "auto":
        return sixteen_bit_type(device)
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return the context in which a network runs: 16-bit, or nothing for float32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def save_generation(
    root_uri: str,
    network: nn.Module,
    *,
    ordinal: int,
    backbone: BackboneSpec,
    preprocessing: Preprocessing,
    width: int,
    origin: Literal["trained", "adopted"] = "trained",
    classifier: tuple[Sequence[str], Tensor, Tensor] | None = None,
    variant: VariantOf | None = None,
    **card_fields: Any,
) -> tuple[str, GenerationCard]:
    """Store a generation below `root_uri`; return its folder and card.

    classifier: class names, rows (C, d) and class means (C, d); both are stored with unit length. `variant`: it is one,
    and only queries. The same network with the same description gives the same id; writing it again changes nothing.
    """
    # One metadata entry only: safetensors writes several in an arbitrary order, and the digest would change.
    description = json.dumps([backbone.model_dump(), preprocessing.model_dump()], sort_keys=True)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    payload = dump_tensors(state, metadata={"description": description})
    digest = hashlib.sha256(payload).hexdigest()
    generation_id = make_generation_id(ordinal, digest, None if variant is None else variant.name)
    if variant is not None:
        card_fields |= {"role": "query_only", "of": variant.of}
    uri = join(root_uri, generation_id)
    classifier_digest: str | None = None
    write_bytes(join(uri, WEIGHTS_FILE), payload)
    if classifier is not None:
        names, rows, means = classifier
        tensors = {"rows": _unit_rows(rows, len(names), width), "class_means": _unit_rows(means, len(names), width)}
        payload = dump_tensors(tensors)
        classifier_digest = hashlib.sha256(payload).hexdigest()
        write_bytes(join(uri, CLASSIFIER_FILE), payload)
    write_probes(uri, _exact(network, preprocessing), backbone.name)
    card = GenerationCard(
        generation_id=generation_id,
        ordinal=ordinal,
        origin=origin,
        backbone=backbone,
        preprocessing=preprocessing,
        preprocessing_fingerprint=preprocessing.fingerprint(),
        width=width,
        classes=tuple(classifier[0]) if classifier is not None else (),
        digest=digest,
        has_classifier=classifier is not None,
        classifier_digest=classifier_digest,
        **card_fields,
    )
    write_card(uri, card)
    return uri, card


def adopt(
    factory: str,
    *,
    preprocessing: Preprocessing,
    out_uri: str,
    ordinal: int,
    kwargs: dict[str, Any] | None = None,
    weights: str | None = None,
    prefix_widths: Sequence[int] = (),
) -> GenerationCard:
    """Store an encoder that came from elsewhere as a generation below `out_uri`; return its card.

    factory: "package.module:factory" returning a module (n, channels, size, size) -> (n, d), or a name of `libraries`,
    "timm/NAME" or "torchvision/NAME"; kwargs are JSON values; weights: a file to load into it, for a library's network
    also a name, by default its pretrained weights. It has no classifier: constraints against it use class means.
    """
    spec = BackboneSpec(name=factory, kwargs=kwargs or {})
    if is_of_a_library(factory):
        encoder = library_encoder(factory, spec.kwargs)
        spec, weights = encoder.spec, weights or encoder.weights
    elif ":" not in factory:
        raise UsageError(
            f"adopting an encoder: expected timm/NAME, torchvision/NAME or package.module:factory, found {factory!r}"
        )
    channels, size = preprocessing.channels, preprocessing.image_size
    network = build_backbone(spec, 0, channels, size, offer_width=False)
    if weights is not None:
        load_initial_weights(network, spec, weights, channels, size)
    with torch.inference_mode():
        output = network.eval()(normalise(torch.zeros(2, channels, size, size, dtype=torch.uint8), preprocessing))
    if output.ndim != 2:
        raise UsageError(f"adopting {factory}: expected an output of shape (n, d), found {tuple(output.shape)}")
    width = int(output.shape[1])
    if any(not 0 < prefix < width for prefix in prefix_widths):
        raise UsageError(f"adopting {factory}: expected prefix widths below {width}, found {list(prefix_widths)}")
    _, card = save_generation(
        out_uri,
        network,
        ordinal=ordinal,
        backbone=spec,
        preprocessing=preprocessing,
        width=width,
        origin="adopted",
        prefix_widths=tuple(prefix_widths),
    )
    return card


def _unit_rows(rows: Tensor, num_classes: int, width: int) -> Tensor:
    if rows.shape != (num_classes, width):
        raise UsageError(f"storing classifier rows: expected {(num_classes, width)}, found {tuple(rows.shape)}")
    return functional.normalize(rows.detach().float().cpu(), dim=1).contiguous()


def _verified(uri: str, digest: str | None) -> bytes:
    try:
        payload = read_bytes(uri)
    except FileNotFoundError:
        raise CorruptedWeightsError(
            f"opening a generation: expected a file, found none (at {uri}); restore the generation's folder"
        ) from None
    found = hashlib.sha256(payload).hexdigest()
    if found != digest:
        raise CorruptedWeightsError(
            f"opening a generation: expected sha256 {digest}, found {found} (at {uri}); restore the file from a copy"
        )
    return payload
