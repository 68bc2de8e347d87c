"""The command `deepnarrow rerun`: a step is computed again, on several devices, and compared to the last bit."""
