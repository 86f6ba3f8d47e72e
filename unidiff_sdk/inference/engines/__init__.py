"""The engines that run graphs: ONNX Runtime and OpenVINO."""
