"""What a model is worth: its loss on held-out text by source, and tasks that it answers by likelihood."""
