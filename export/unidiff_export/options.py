"""Options of an export. This module does not import PyTorch, so that `unidiff-export --help` is fast.

`TARGETS` defines the targets; validation, help, lowering and manifest read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from unidiff_sdk.errors import OptionError

PRECISIONS = ("fp32", "fp16", "int8")

STANDARD, CONTRIB = "", "com.microsoft"  # the operator domains of ONNX itself and of ONNX Runtime


@dataclass(frozen=True)
class Target:
    """The operators that a graph may use, and the devices that run it.

    Attributes:
        purpose: description for `--help`.
        opset: version of the standard operators.
        domains: allowed operator domains.
        attention: (domain, operator) of the node of each attention layer.
        precisions: supported precisions.
        devices: the devices of `Bundle.open` that run the graphs.
        rewritten: apply the passes for ONNX Runtime's CPU kernels, see `graphs.passes`.
        channels_last: after the comparison on the CPU, apply the pass for kernels that only a GPU has. Rewritten graphs
            run only on "cuda".
        optional_inputs: whether the runtime takes inputs that have a default, which switchable LoRAs need.
    """

    purpose: str
    opset: int
    domains: tuple[str, ...]
    attention: tuple[str, str]
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    rewritten: bool = False
    channels_last: bool = False
    optional_inputs: bool = False


TARGETS = {
    "cpu": Target(
        purpose="ONNX Runtime on a CPU",
        opset=23,
        domains=(STANDARD, CONTRIB),
        attention=(STANDARD, "Attention"),
        precisions=PRECISIONS,
        devices=("cpu", "cuda"),
        rewritten=True,
        optional_inputs=True,
    ),
    "portable": Target(
        purpose="any runtime that supports opset 23, with standard operators only",
        opset=23,
        domains=(STANDARD,),
        attention=(STANDARD, "Attention"),
        precisions=PRECISIONS,
        devices=("cpu", "cuda"),
        optional_inputs=True,
    ),
    "cuda": Target(
        purpose="ONNX Runtime on an NVIDIA GPU",
        opset=23,
        domains=(STANDARD, CONTRIB),
        attention=(CONTRIB, "MultiHeadAttention"),
        precisions=("fp32", "fp16"),
        devices=("cuda", "cpu"),
        channels_last=True,
    ),
    # TensorRT's parser supports Attention only since recently, and GroupNormalization of opset 21 not at all.
    "tensorrt": Target(
        purpose="TensorRT or any runtime that supports opset 20, with attention in single steps",
        opset=20,
        domains=(STANDARD,),
        attention=(STANDARD, "Softmax"),
        precisions=("fp32", "fp16"),
        devices=("tensorrt", "cuda", "cpu"),
    ),
    # The WebGPU provider of onnxruntime-web 1.30 has no kernels for Attention and GroupNormalization, and none for a
    # causal MultiHeadAttention. With its other MultiHeadAttention, a software adapter returned wrong values.
    "web": Target(
        purpose="onnxruntime-web in a browser, with WebAssembly or WebGPU",
        opset=20,
        domains=(STANDARD,),
        attention=(STANDARD, "Softmax"),
        precisions=PRECISIONS,
        devices=("cpu", "cuda"),
    ),
}


def check_options(precision: str, target: str) -> None:
    """Raise OptionError, with the valid values, for an unknown or an unsupported option."""
    for option, value, known in (("precision", precision, PRECISIONS), ("target", target, TARGETS)):
        if value not in known:
            raise OptionError(f"{option} is {value!r}; use one of {', '.join(known)}")
    if precision not in TARGETS[target].precisions:
        raise OptionError(
            f"target {target} does not support {precision}; use one of {', '.join(TARGETS[target].precisions)}"
        )


def check_switchable(precision: str, target: str) -> None:
    """Raise OptionError if LoRAs cannot be switched in bundles of this kind."""
    able = [name for name, known in TARGETS.items() if known.optional_inputs]
    if target not in able:
        raise OptionError(
            f"target {target} has no optional inputs, so LoRAs cannot be switched; use the target {' or '.join(able)}, "
            "or merge them: leave out --lora-switchable"
        )
    if precision == "int8":
        raise OptionError(
            "int8 is calibrated for one set of weights, so LoRAs cannot be switched; use --fp32 or --fp16, or merge "
            "them: leave out --lora-switchable"
        )
