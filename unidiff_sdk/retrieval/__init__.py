"""Search: from a checked query to a ranked page of hits."""
