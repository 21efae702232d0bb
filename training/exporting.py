"""An encoder as one file for another runtime: torch.export, or ONNX. Decoded pixels in, unit vectors out.

The graph holds what comes after decoding: the scale to 0..1, mean and std, the network, the unit length. Decoding,
turning upright, resizing and cropping are Pillow's and stand in no graph: `steps_outside` says them in words. A file is
kept only where its vectors agree with the encoder's own in float32 (cosine of at least 0.9999); how far those of 8-bit
arithmetic agree is measured and stated, and left to whoever reads it.
"""

import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

from graceful.errors import GracefulError
from graceful.training.encoder import embed, normalise, open_network
from graceful.training.generation import GenerationCard, Preprocessing, read_card

Format = Literal["torch", "onnx", "onnx-int8"]
FORMATS: tuple[Format, ...] = ("torch", "onnx", "onnx-int8")
MIN_COSINE = 0.9999
_NUM_COMPARED = 16
_WARM_UPS = 3
_TIMED = 20
_ALTERNATIVE = {
    "torch": "export another backbone, or embed where this package runs ('graceful search', POST /search)",
    "onnx": "take --format torch, or a backbone of plain convolutions",
    "onnx-int8": "take --format onnx",
}

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class ExportError(GracefulError):
    """An encoder cannot be written in a format, or would give other vectors there; nothing was kept."""


class ExportReport(BaseModel):
    """What was written, and how it was measured. Everything is of one image, on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation: str = Field(description="Whose encoder it is.")
    format: Format = Field(
        description="torch: torch.export.load; onnx: onnxruntime; onnx-int8: it too, in 8-bit arithmetic."
    )
    file: str = Field(description="Where it was written.")
    size_bytes: int = Field(description="Size of the file.")
    num_parameters: int = Field(description="Weights of the network.")
    multiply_adds: int = Field(description="Of one image: half the floating-point operations that torch counts.")
    latency_ms: float = Field(description="Median of one image at a time in that runtime, after a warm-up.")
    threads: int = Field(description="Threads that it had.")
    machine: str = Field(description="Processor, as the system names it.")
    min_cosine: float = Field(description="Smallest cosine with the encoder's own float32 vectors of the same pixels.")
    input: str = Field(description="What the graph takes.")
    output: str = Field(description="What it gives.")
    steps_outside: tuple[str, ...] = Field(description="What must be done to an image before, in this order.")


class PixelsToVectors(nn.Module):
    """What is exported: uint8 pixels (n, channels, size, size) to unit vectors (n, d) float32; NaN for no direction."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return unit vectors."""
        vectors = self.network((pixels.to(torch.float32) / 255.0 - self.mean) / self.std).float()
        return vectors / vectors.norm(dim=1, keepdim=True)


def export_encoder(generation_uri: str, file: str, output_format: Format) -> ExportReport:
    """Write the encoder of a stored generation or variant into a local file, and measure it there.

    Raises:
        ExportError: an operator that the format lacks, a missing runtime, or other vectors than the encoder's.
    """
    card = read_card(generation_uri)
    if card.takes == "text":
        raise ExportError(
            f"exporting {card.generation_id}: expected an encoder of images, found a text tower: its weights are not "
            f"kept here, and what it does to a text before them is not known; take it from where {card.backbone.name} "
            "has it"
        )
    card, network = open_network(generation_uri, torch.device("cpu"))
    network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    pixels = _pixels(card, _NUM_COMPARED)
    program = _exported(card, PixelsToVectors(network, card.preprocessing).eval(), pixels[:2])
    run = _WRITERS[output_format](card, program, file)
    expected = embed(network, pixels, card.preprocessing, torch.device("cpu"), None).numpy()
    found = np.concatenate([run(pixels[:1].numpy()), run(pixels[1:].numpy())])  # another number than it was traced with
    cosine = float((expected * found).sum(axis=1).min())
    is_exact = output_format != "onnx-int8"
    if not cosine >= (MIN_COSINE if is_exact else -1.0):  # not a number is no vector
        Path(file).unlink()
        raise ExportError(
            f"exporting {card.generation_id} as {output_format}: expected the vectors of the encoder (cosine at least "
            f"{MIN_COSINE}), found {cosine:.6f}; nothing was kept, {_ALTERNATIVE[output_format]}"
        )
    size = card.preprocessing.image_size
    return ExportReport(
        generation=card.generation_id,
        format=output_format,
        file=file,
        size_bytes=Path(file).stat().st_size,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=multiply_adds(network, card.preprocessing),
        latency_ms=latency_ms(run, pixels[:1].numpy()),
        threads=torch.get_num_threads(),
        machine=platform.processor() or platform.machine(),
        min_cosine=round(cosine, 7),
        input=f"pixels: uint8 (n, {card.preprocessing.channels}, {size}, {size}), n free",
        output=f"embedding: float32 (n, {card.width}), of length 1",
        steps_outside=steps_outside(card.preprocessing),
    )


def multiply_adds(network: nn.Module, preprocessing: Preprocessing) -> int:
    """Return the multiply-adds of one image: half of what torch.utils.flop_counter counts (convolutions, products)."""
    size = preprocessing.image_size
    image = torch.zeros(1, preprocessing.channels, size, size, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.eval()(normalise(image, preprocessing))
    return int(counter.get_total_flops()) // 2


def steps_outside(preprocessing: Preprocessing) -> tuple[str, ...]:
    """Return what must be done to an image file before the graph, in words; `training.images.decode` does it here.

    >>> steps_outside(Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,)))[-1]
    'bytes as (1, 8, 8), channels first'
    """
    p = preprocessing
    steps = ["decode to 8 bits per channel"]
    if p.decoding == "photo":
        steps += ["turn upright by the EXIF orientation", f"put transparent pixels on grey {p.background}"]
    steps.append("convert to grey" if p.channels == 1 else "convert to RGB")
    resized = {
        "squash": f"resize to {p.resized} x {p.resized}",
        "shorter_side": f"resize the shorter side to {p.resized}, the shape kept",
        "fit": f"resize the longer side to {p.resized}, the shape kept",
    }
    steps.append(f"{resized[p.resize]} ({p.interpolation}, antialiased as Pillow does)")
    if p.resize != "squash" or p.resized != p.image_size:
        steps.append(f"cut the middle {p.image_size} x {p.image_size} out, padded with {list(p.padding)}")
    steps.append(f"bytes as ({p.channels}, {p.image_size}, {p.image_size}), channels first")
    return tuple(steps)


def _pixels(card: GenerationCard, number: int) -> Tensor:
    """Return pixels to compare on: smooth ones, as photos are, and noise."""
    size, channels = card.preprocessing.image_size, card.preprocessing.channels
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, channels, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = torch.rand(number, channels, size, size, generator=generator)
    share = torch.linspace(0, 1, number).view(-1, 1, 1, 1)
    return ((1 - share) * smooth + share * noise).mul(255).to(torch.uint8)


def _exported(card: GenerationCard, module: nn.Module, example: Tensor) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes={"pixels": {0: Dim("images", min=1)}})
    except Exception as error:  # whatever tracing a network of somebody else raises
        raise _refusal(card, "torch", error) from error


def _write_torch(card: GenerationCard, program: ExportedProgram, file: str) -> Run:
    try:
        torch.export.save(program, file)
    except Exception as error:  # an operator of somebody else that cannot be written
        raise _refusal(card, "torch", error) from error
    loaded = torch.export.load(file).module()

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = loaded(torch.from_numpy(pixels)).numpy()
        return found

    return run


def _write_onnx(card: GenerationCard, program: ExportedProgram, file: str) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"exporting {card.generation_id} as onnx: expected onnx, onnxscript and onnxruntime, found none of "
            f"{error.name}; pip install 'graceful[onnx]', or take --format torch"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            written = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["pixels"], output_names=["embedding"]
            )
        assert written is not None
        written.save(file)
        return _onnx_run(onnxruntime, file)
    except Exception as error:  # an operator that ONNX or its runtime lacks, named in the error
        Path(file).unlink(missing_ok=True)
        raise _refusal(card, "onnx", error) from error


def _write_onnx_int8(card: GenerationCard, program: ExportedProgram, file: str) -> Run:
    """Write the ONNX file with weights of 8 bits; the scale of what flows between them is taken as it comes."""
    whole = f"{file}.float32"
    try:
        _write_onnx(card, program, whole)
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.disable(logging.WARNING)  # advice about a step that changes nothing in graphs of this exporter
        try:
            quantize_dynamic(whole, file, weight_type=QuantType.QUInt8)
        finally:
            logging.disable(logging.NOTSET)
        return _onnx_run(onnxruntime, file)
    except ExportError:
        raise
    except Exception as error:  # an operator whose 8-bit form the runtime lacks
        Path(file).unlink(missing_ok=True)
        raise _refusal(card, "onnx-int8", error) from error
    finally:
        Path(whole).unlink(missing_ok=True)


def _onnx_run(onnxruntime: Any, file: str) -> Run:
    session = onnxruntime.InferenceSession(file, _session_options(onnxruntime), providers=["CPUExecutionProvider"])

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(["embedding"], {"pixels": pixels})[0]
        return found

    return run


_WRITERS: dict[Format, Callable[[GenerationCard, ExportedProgram, str], Run]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
    "onnx-int8": _write_onnx_int8,
}


def _session_options(onnxruntime: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return options


def _refusal(card: GenerationCard, output_format: Format, error: Exception) -> ExportError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # the exporter wraps what an operator lacks in what it was doing
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    reason = lines[0] if lines else type(cause).__name__
    return ExportError(
        f"exporting {card.generation_id} as {output_format}: expected a network of operators that the format has, "
        f"found {type(cause).__name__}: {reason[:300]} ({card.backbone.name}); {_ALTERNATIVE[output_format]}"
    )


def latency_ms(run: Run, pixels: NDArray[np.uint8]) -> float:
    seconds = []
    for number in range(_WARM_UPS + _TIMED):
        started = time.perf_counter()
        run(pixels)
        if number >= _WARM_UPS:
            seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds), 3)
