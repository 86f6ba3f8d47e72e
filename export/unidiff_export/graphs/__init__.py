"""Graphs: from PyTorch modules to the ONNX operators that a target runs fastest."""
