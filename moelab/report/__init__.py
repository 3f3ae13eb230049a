"""What was found? Publications, the claims ledger, views of a run, and the results pages."""
