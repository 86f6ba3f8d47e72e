"""Calls on a GPU: fixed buffers for the usual shapes, and calls cut to the shapes that an engine was built for.

Both stand in for an `onnxruntime.InferenceSession`: they have its `run`, and its other methods.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import OptionError

from .manifest import Profile

__all__ = ["BoundSession", "ProfiledSession"]

Arrays = Mapping[str, NDArray[Any]]


class _Session:
    """A session whose `run` a subclass replaces."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class BoundSession(_Session):
    """Calls of the usual shapes reuse one set of buffers on the device; others are ordinary calls.

    Args:
        session: runs the graph.
        onnxruntime: the module that made it.
        shapes: the usual shape of each input.
        device: where the buffers are, in ONNX Runtime's words: "cuda", or "cpu".
        capture: whether the session was made to capture a CUDA graph, which the calls at the usual shapes then replay.

    Attributes:
        captured: that.
    """

    def __init__(
        self, session: Any, onnxruntime: Any, shapes: Mapping[str, Sequence[int]], *, device: str, capture: bool
    ) -> None:
        super().__init__(session)
        self._onnxruntime = onnxruntime
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._device = device
        self.captured = capture
        self._lock = threading.Lock()
        self._buffers: tuple[Any, dict[str, Any], dict[str, Any]] | None = None

    def run(self, outputs: Sequence[str] | None, inputs: Arrays) -> list[NDArray[Any]]:
        if {name: array.shape for name, array in inputs.items()} != self._shapes:
            results: list[NDArray[Any]] = self._session.run(outputs, inputs, self._options(capture=False))
            return results
        with self._lock:
            if self._buffers is None:
                self._buffers = self._bind(inputs)
            binding, bound_inputs, bound_outputs = self._buffers
            for name, array in inputs.items():
                bound_inputs[name].update_inplace(np.ascontiguousarray(array))
            self._session.run_with_iobinding(binding, self._options(capture=True))
            # Copied, as the next call writes into the same buffers.
            return [np.array(bound_outputs[name].numpy()) for name in outputs or bound_outputs]

    def _bind(self, inputs: Arrays) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Buffers for inputs and outputs. The shapes of the outputs are learnt from one ordinary call."""
        names = [value.name for value in self._session.get_outputs()]
        results = self._session.run(names, inputs, self._options(capture=False))
        on_device = self._onnxruntime.OrtValue.ortvalue_from_numpy
        bound_inputs = {name: on_device(np.ascontiguousarray(array), self._device, 0) for name, array in inputs.items()}
        bound_outputs = {name: on_device(array, self._device, 0) for name, array in zip(names, results, strict=True)}
        binding = self._session.io_binding()
        for name, value in bound_inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in bound_outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding, bound_inputs, bound_outputs

    def _options(self, *, capture: bool) -> Any:
        """For a session made to capture: whether this call is the one that does. -1 is ONNX Runtime's "leave it"."""
        if not self.captured:
            return None
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "1" if capture else "-1")
        return options


class ProfiledSession(_Session):
    """Keeps calls within the shapes that an engine was built for: larger batches are cut, other axes are checked."""

    def __init__(self, session: Any, profile: Profile) -> None:
        super().__init__(session)
        self._profile = profile

    def run(self, outputs: Sequence[str] | None, inputs: Arrays) -> list[NDArray[Any]]:
        self._check(inputs)
        batch = max(len(array) for array in inputs.values())
        most = min(bounds["max"][0] for bounds in self._profile.values())
        parts = []
        for start in range(0, batch, most):
            part = {
                name: array[start : start + most] if len(array) == batch else array for name, array in inputs.items()
            }
            parts.append(self._session.run(outputs, part))
        return [np.concatenate(results) for results in zip(*parts, strict=True)]

    def _check(self, inputs: Arrays) -> None:
        for name, array in inputs.items():
            bounds = self._profile[name]
            for least, size, most in zip(bounds["min"][1:], array.shape[1:], bounds["max"][1:], strict=True):
                if not least <= size <= most:
                    raise OptionError(
                        f"{name} has the shape {list(array.shape)}, but the TensorRT engine takes {bounds['min']} to "
                        f"{bounds['max']}; ask for another size, or open the bundle with device='cuda'"
                    )
