"""What runs: the keeper and its control socket."""
