"""A contestant of `unet.py` in a separate process: `python unet_peer.py ENGINE CALL CHECKPOINT CACHE THREADS`.

CALL is the name of a graph, a batch size and the side of the latents: "unet 2 64". The folder CACHE holds the graphs of
UniDiff, and what another engine exports or converts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import _worker
from _worker import serve

_worker.PACKAGES = ("torch", "diffusers", "transformers", "optimum-onnx", "onnxruntime", "openvino")
PIXELS, TOKENS = 224, 77


def inputs(graph: str, batch: int, side: int, width: int = 768) -> dict[str, Any]:
    """Return random inputs of one call as NumPy arrays, in the order of the module's arguments.

    side: side of the latents; ignored for the encoders.
    """
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    if graph == "unet":
        return {
            "sample": normal(batch, 4, side, side),
            "timestep": np.full(batch, 500, np.float32),
            "encoder_hidden_states": normal(batch, TOKENS, width),
        }
    if graph == "vae_decoder":
        return {"latent_sample": normal(batch, 4, side, side)}
    if graph == "image_encoder":
        return {"pixel_values": normal(batch, 3, PIXELS, PIXELS)}
    return {"input_ids": rng.integers(1000, 40000, (batch, TOKENS), dtype=np.int64)}


def module(graph: str, checkpoint: Path, dtype: str = "float32") -> Any:
    """Return the PyTorch module behind a graph: tensors in, one tensor out."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    kind: Any
    kind, folder, call = {
        "unet": (UNet2DConditionModel, "unet", lambda m, z, t, states: m(z, t, states, return_dict=False)[0]),
        "vae_decoder": (AutoencoderKL, "vae", lambda m, z: m.decode(z, return_dict=False)[0]),
        "image_encoder": (CLIPVisionModelWithProjection, "clip", lambda m, x: m(x, return_dict=False)[0]),
        "text_encoder": (CLIPTextModelWithProjection, "clip", lambda m, ids: m(ids, return_dict=False)[0]),
    }[graph]

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = kind.from_pretrained(checkpoint / folder, torch_dtype=getattr(torch, dtype))

        def forward(self, *args: Any) -> Any:
            return call(self.model, *args)

    return Call().eval()


def eager(graph: str, feed: dict[str, Any], checkpoint: Path, cache: Path, threads: int) -> Callable[[], object]:
    """Run diffusers or transformers without changes, in float32."""
    import torch

    act, tensors = module(graph, checkpoint), [torch.from_numpy(array) for array in feed.values()]

    def run() -> object:
        with torch.inference_mode():
            return act(*tensors)

    return run


def compiled(graph: str, feed: dict[str, Any], checkpoint: Path, cache: Path, threads: int) -> Callable[[], object]:
    """Run the same module through torch.compile in bfloat16 with channels last."""
    import torch

    act = module(graph, checkpoint, "bfloat16").to(memory_format=torch.channels_last)
    tensors = [torch.from_numpy(array) for array in feed.values()]
    tensors = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in tensors]
    act = torch.compile(act)

    def run() -> object:
        with torch.inference_mode():
            return act(*tensors)

    run()  # compiles
    return run


def unidiff(
    graph: str, feed: dict[str, Any], checkpoint: Path, cache: Path, threads: int, **engine: str
) -> Callable[[], object]:
    """Run UniDiff's graph in the cache folder."""
    from unidiff_sdk.inference.sessions import create_session

    session = create_session(cache / graph / "model.onnx", threads=threads, **engine)
    return lambda: session.run(feed)


def in_separate_process(act: Callable[..., None], *args: Any) -> None:
    """Call a function in another process, which releases its memory: seven engines hold weights at the same time."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(act, *args).result()


def export_by_optimum(checkpoint: Path, folder: Path) -> None:
    from optimum.exporters.onnx import main_export

    main_export(str(checkpoint), folder, task="text-to-image", do_validation=False)


def convert_by_openvino(graph: str, feed: dict[str, Any], checkpoint: Path, file: Path) -> None:
    import openvino as ov
    import torch

    example = tuple(torch.from_numpy(array) for array in feed.values())
    with torch.no_grad():
        ov.save_model(ov.convert_model(module(graph, checkpoint), example_input=example), file, False)


def optimum(graph: str, feed: dict[str, Any], checkpoint: Path, cache: Path, threads: int) -> Callable[[], object]:
    """Run the export of optimum-onnx in ONNX Runtime."""
    import onnxruntime

    file = cache / "optimum" / graph / "model.onnx"
    if not file.is_file():
        in_separate_process(export_by_optimum, checkpoint, cache / "optimum")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    types = {value.name: value.type for value in session.get_inputs()}
    if types.get("timestep") == "tensor(int64)":
        feed["timestep"] = feed["timestep"].astype("int64")
    if graph == "unet":
        feed["timestep"] = feed["timestep"][:1].reshape(
            ()
        )  # its graph has one timestep for all samples, without an axis
    return lambda: session.run(None, feed)


def openvino(
    graph: str, feed: dict[str, Any], checkpoint: Path, cache: Path, threads: int, precision: str
) -> Callable[[], object]:
    """Run OpenVINO's conversion of the PyTorch module, in precision "f32" or "bf16"."""
    import openvino as ov

    file = cache / "openvino" / f"{graph}.xml"
    if not file.is_file():
        in_separate_process(convert_by_openvino, graph, feed, checkpoint, file)
    core = ov.Core()
    model = core.read_model(file)
    model.reshape({port.get_any_name(): list(a.shape) for port, a in zip(model.inputs, feed.values(), strict=True)})
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    arrays = list(feed.values())
    return lambda: request.infer(arrays)


ENGINES: dict[str, Callable[..., Callable[[], object]]] = {
    "unidiff": unidiff,
    "unidiff-openvino-f32": lambda *args: unidiff(*args, device="openvino", precision="f32"),
    "unidiff-openvino-bf16": lambda *args: unidiff(*args, device="openvino", precision="bf16"),
    "eager": eager,
    "compiled": compiled,
    "optimum": optimum,
    "openvino-f32": lambda *args: openvino(*args, precision="f32"),
    "openvino-bf16": lambda *args: openvino(*args, precision="bf16"),
}

if __name__ == "__main__":
    engine, call, checkpoint, cache, threads = sys.argv[1:]
    name, batch, side = call.split()
    if engine in ("eager", "compiled"):
        import torch

        torch.set_num_threads(int(threads))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    feed = inputs(name, int(batch), int(side))
    serve(ENGINES[engine](name, feed, Path(checkpoint), Path(cache), int(threads)))
