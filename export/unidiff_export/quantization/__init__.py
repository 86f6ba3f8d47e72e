"""Static int8 quantization: calibration, policy and the QDQ rewrite."""
