"""The shared pool: segment, directory, leases, rings, client, and the keeper's side of them."""
