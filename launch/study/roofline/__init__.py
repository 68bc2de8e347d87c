"""What key/value heads cost at inference: prefill and decoding under the roofline of a device, counted and measured."""
