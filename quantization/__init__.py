"""bundle → bundle whose large networks compute in int8 or fp8, as ONNX's QuantizeLinear and DequantizeLinear."""
