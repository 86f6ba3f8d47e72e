"""ONNX graphs: lowering from PyTorch, passes for a target, attention operators and float precision."""
