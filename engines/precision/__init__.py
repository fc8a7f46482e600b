"""From the bundle's float32 graph to a strongly typed one: fp16, bf16, int8, fp8."""
