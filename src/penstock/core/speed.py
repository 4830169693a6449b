"""Provisional."""


class SpeedMeter:
    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self.latency_s, self.bytes_per_s, self.measured = latency_s, bytes_per_s, False

    def observe(self, n_bytes: int, seconds: float) -> None:
        self.measured = True

    def estimate(self, n_bytes: int, queued_bytes: int = 0) -> float:
        return self.latency_s + (n_bytes + queued_bytes) / self.bytes_per_s
