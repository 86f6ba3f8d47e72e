"""What an export can be asked for. Apart from the rest, so that --help need not import PyTorch.

`TARGETS` is the one place that says what a target means: validation, help, lowering and manifest all read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from unidiff_sdk.errors import OptionError

PRECISIONS = ("fp32", "fp16", "int8")

STANDARD, CONTRIB = "", "com.microsoft"  # the operator domains of ONNX itself and of ONNX Runtime


@dataclass(frozen=True)
class Target:
    """What a graph may consist of, and where it then runs.

    Attributes:
        purpose: for the help, after the target's name.
        opset: version of the standard operators.
        domains: where its operators may come from.
        attention: (domain, operator) of the one node that each attention layer has.
        precisions: those that make sense on it.
        devices: the devices of `Bundle.open` that run it.
        rewritten: whether its graphs are rewritten for ONNX Runtime's CPU kernels, see `passes`.
        channels_last: whether they are, once compared on the CPU, rewritten for kernels that only a GPU has; those that
            were run on "cuda" alone.
    """

    purpose: str
    opset: int
    domains: tuple[str, ...]
    attention: tuple[str, str]
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    rewritten: bool = False
    channels_last: bool = False


TARGETS = {
    "cpu": Target(
        purpose="ONNX Runtime on a CPU",
        opset=23,
        domains=(STANDARD, CONTRIB),
        attention=(STANDARD, "Attention"),
        precisions=PRECISIONS,
        devices=("cpu", "cuda"),
        rewritten=True,
    ),
    "portable": Target(
        purpose="standard operators only, for any runtime that knows opset 23",
        opset=23,
        domains=(STANDARD,),
        attention=(STANDARD, "Attention"),
        precisions=PRECISIONS,
        devices=("cpu", "cuda"),
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
    # Its parser has known Attention only lately, and GroupNormalization of opset 21 not at all.
    "tensorrt": Target(
        purpose="TensorRT, or any runtime of opset 20: attention in single steps",
        opset=20,
        domains=(STANDARD,),
        attention=(STANDARD, "Softmax"),
        precisions=("fp32", "fp16"),
        devices=("tensorrt", "cuda", "cpu"),
    ),
}


def check_options(precision: str, target: str) -> None:
    """Raise OptionError, naming the valid values, if either is not known or the target does not have the precision."""
    for option, value, known in (("precision", precision, PRECISIONS), ("target", target, TARGETS)):
        if value not in known:
            raise OptionError(f"{option} is {value!r}; use one of {', '.join(known)}")
    if precision not in TARGETS[target].precisions:
        raise OptionError(f"target {target} has no {precision}; use one of {', '.join(TARGETS[target].precisions)}")
