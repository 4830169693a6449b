"""What vLLM's OffloadingConnector lacks to run on CPU: a worker that copies between two places in host memory.

vLLM's own refuses every platform without streams. All else is vLLM's: the shared region, the tiers, their policies.
Copies run in order on a thread of their own, as they run on a stream of their own on a GPU.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

__all__ = ["CpuTieringSpec"]


class CpuTieringSpec(TieringOffloadingSpec):
    """vLLM's spec with tiers, for CPU. One KV cache group and one worker."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = _CopyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker


class _CopyWorker(OffloadingWorker):
    """Copies blocks, in the order of submission, on one thread."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: Any) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._pairs = []
        for cache in kv_caches.tensors:
            pages = cache.tensor.numpy()
            size = cache.page_size_bytes
            chunks = region.create_next_worker_view(size * blocks_per_chunk).numpy()
            self._pairs.append((pages, chunks, size))
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open: set[int] = set()
        self._ended: list[TransferResult] = []
        self._thread = threading.Thread(target=self._run, name="bench-offload-copy", daemon=True)
        self._thread.start()

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, dst_spec, src_spec, is_store=False)

    def _submit(self, job_id: int, paged: Any, chunked: Any, *, is_store: bool) -> bool:
        with self._changed:
            self._open.add(job_id)
        self._jobs.put((job_id, paged, chunked, is_store))
        return True

    def get_finished(self) -> list[TransferResult]:
        with self._changed:
            ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: set[int]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not (job_ids & self._open))

    def shutdown(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        self._pairs.clear()
        self._region.cleanup()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job_id, paged, chunked, is_store = job
            started = time.perf_counter()
            n_bytes = self._copy(paged, chunked, is_store)
            seconds = time.perf_counter() - started
            with self._changed:
                self._open.discard(job_id)
                self._ended.append(TransferResult(job_id, True, n_bytes, seconds))
                self._changed.notify_all()

    def _copy(self, paged: Any, chunked: Any, is_store: bool) -> int:
        pages = paged.block_ids.tolist()
        skipped = paged.block_indices[0] % self._blocks_per_chunk
        places = [(chunk, part) for chunk in chunked.block_ids.tolist() for part in range(self._blocks_per_chunk)]
        places = places[skipped : skipped + len(pages)]
        n_bytes = 0
        for paged_rows, chunk_rows, size in self._pairs:
            for page, (chunk, part) in zip(pages, places):
                place = chunk_rows[chunk, part * size : (part + 1) * size]
                if is_store:
                    np.copyto(place, paged_rows[page])
                else:
                    np.copyto(paged_rows[page], place)
            n_bytes += size * len(pages)
        return n_bytes
