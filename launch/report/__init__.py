"""`deepnarrow report`: one page of HTML with the curves of runs, made of their folders alone."""
