"""`deepnarrow refine`: deduplication over the whole corpus, filters, and shares, through datatrove's blocks."""
