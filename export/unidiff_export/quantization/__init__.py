"""Static int8 quantization: calibration, choice of the layers, and rewriting to QDQ."""
