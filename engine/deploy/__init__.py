"""A quantized network in integers: simulation, ONNX, packed weights."""
