"""What fewer key/value heads cost in quality and buy at inference: the trade of arXiv 2305.13245, measured."""
