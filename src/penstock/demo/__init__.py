"""The main job: two real engine processes share the KV of several conversations through one pool (`penstock demo`)."""
