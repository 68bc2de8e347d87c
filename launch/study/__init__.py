"""The study of grouped-query attention: it measures the trade-off of arXiv 2305.13245, the quality that fewer key/value
heads cost against the inference time that they save."""
