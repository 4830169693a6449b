"""The model runner of the arithmetic engine: pages as the CPU backend keeps them, and the worker's connector, called in
the order in which vLLM's runner does (0.32: v1/worker/gpu_model_runner.py, kv_connector_model_runner_mixin.py).

Covers the configuration that vLLM's classes want, a request's state in the worker, drafts, several ranks in step.
"""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        KVTransferConfig,
        ModelConfig,
        SchedulerConfig,
        SpeculativeConfig,
        VllmConfig,
    )
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from penstock.connectors.vllm.worker import WorkerHalf
from tests.engines.sim.model import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    VOCAB,
    WORDS,
    answer,
    draw,
    part,
    read_state,
    spread,
    value_of,
)
from tests.support import ROOT, until

BLOCK = 16
WEIGHTS = "blake2b-256:" + "c" * 64
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Setup:
    """An engine's settings."""

    pool: str = ""
    """The pool's name; empty for an engine without a connector."""
    pages: int = 96
    budget: int = 512
    """Tokens of a step."""
    n_seqs: int = 16
    overlap: bool = False
    """Asynchronous scheduling: two steps in flight."""
    drafts: int = 0
    ranks: int = 1
    prefix_caching: bool = True
    role: str = "kv_both"
    extra: dict[str, Any] = field(default_factory=dict)


class _Layer:
    """What the connector asks of an attention layer."""

    isa = "arithmetic"

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: "CPU_ATTN")


LAYER_NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]


def _spec() -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32)


def kv_config(pages: int) -> KVCacheConfig:
    spec = _spec()
    page = spec.page_size_bytes
    tensors = [KVCacheTensor(LAYERS * pages * page, LAYER_NAMES, layer_stride=pages * page, block_stride=page)]
    return KVCacheConfig(pages, tensors, [KVCacheGroupSpec(LAYER_NAMES, spec)])


def vllm_config(setup: Setup) -> VllmConfig:
    model = ModelConfig(
        str(ROOT / "src/penstock/assets/model"), tokenizer_mode="auto", skip_tokenizer_init=True, dtype="float32",
        max_model_len=1024,
    )  # fmt: skip
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=setup.prefix_caching)
    cache.num_gpu_blocks = setup.pages
    scheduling = SchedulerConfig(
        max_num_seqs=setup.n_seqs, max_num_batched_tokens=setup.budget, max_model_len=1024, is_encoder_decoder=False,
        enable_chunked_prefill=True, async_scheduling=False,
    )  # fmt: skip
    transfer = None
    if setup.pool:
        transfer = KVTransferConfig(
            kv_connector="PenstockConnector", kv_connector_module_path="penstock.connectors.vllm", kv_role=setup.role,
            kv_connector_extra_config={"pool": setup.pool, "weights": WEIGHTS, **setup.extra},
        )  # fmt: skip
    config = VllmConfig(
        model_config=model, cache_config=cache, scheduler_config=scheduling, device_config=DeviceConfig("cpu"),
        kv_transfer_config=transfer,
    )  # fmt: skip
    if setup.drafts:
        config.speculative_config = SpeculativeConfig(
            method="ngram", num_speculative_tokens=setup.drafts, prompt_lookup_max=3, prompt_lookup_min=1,
            target_model_config=model, target_parallel_config=config.parallel_config,
        )  # fmt: skip
    # Set behind the checks that refuse it for this machine: there is no executor here that could not do it.
    config.scheduler_config.async_scheduling = setup.overlap
    config.parallel_config.tensor_parallel_size = setup.ranks
    config.compilation_config.static_forward_context = {name: _Layer() for name in LAYER_NAMES}
    assert not config.use_v2_model_runner
    return config


class Rank:
    """One worker: its pages and its connector."""

    def __init__(self, config: VllmConfig, kv_config: KVCacheConfig, rank: int) -> None:
        pages = kv_config.num_blocks
        garbage = torch.randint(-(2**31), 2**31 - 1, (LAYERS, pages, KV_HEADS, BLOCK, 2 * HEAD_DIM), dtype=torch.int32)
        self.tensors = {name: garbage[i].view(torch.float32) for i, name in enumerate(LAYER_NAMES)}
        self.layers = [t.numpy().view(np.uint64).reshape(pages, BLOCK, WORDS) for t in self.tensors.values()]
        self.rank = rank
        self.connector: Any = None
        if config.kv_transfer_config is not None:
            self.connector = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_config)

    @property
    def half(self) -> WorkerHalf:
        half: WorkerHalf = self.connector._worker
        return half

    def read(self, pages: Sequence[int], n: int) -> Any:
        """What is kept of the first n tokens of a request with these pages: (n, LAYERS, WORDS)."""
        index = np.asarray(pages[: -(-n // BLOCK)], np.int64)
        return np.stack([layer[index].reshape(-1, WORDS)[:n] for layer in self.layers], axis=1)

    def write(self, pages: Sequence[int], first: int, values: Sequence[int]) -> None:
        """Keep tokens from position `first` on."""
        at = np.arange(first, first + len(values))
        page = np.asarray(pages, np.int64)[at // BLOCK]
        words = spread(np.array(values, np.uint64), self.rank)
        for i, layer in enumerate(self.layers):
            layer[page, at % BLOCK] = words[:, i]


@dataclass
class _State:
    """A request as the runner knows it."""

    tokens: list[int]
    n_prompt: int
    pages: list[int]
    extras: list[int]
    """What else each token depends on; the last one holds for all that follow."""
    n_computed: int = 0
    n_drafts: int = 0
    drafts: list[int] = field(default_factory=list)

    def extra(self, at: int) -> int:
        return self.extras[min(at, len(self.extras) - 1)] if self.extras else 0


class Runner:
    """All ranks in step, as vLLM's model runner drives them."""

    def __init__(self, setup: Setup, config: VllmConfig, kv_config: KVCacheConfig, rng: random.Random) -> None:
        self.setup, self.rng = setup, rng
        self.ranks = [Rank(config, kv_config, rank) for rank in range(setup.ranks)]
        self.states: dict[str, _State] = {}
        self.before: set[str] = set()
        self.aggregator = KVOutputAggregator(setup.ranks)
        self.accept = 0.6
        self.prompt_saves = False
        """Whether what a step orders to be stored is stored before its output is told: the earliest that can be."""
        self.between: Callable[[], None] = lambda: None
        """Called in the middle of every step, after its loads and before its forward pass."""
        self.extras_of: Callable[[Any], list[int]] = lambda data: []

    def execute(self, output: Any) -> ModelRunnerOutput:
        for rank in self.ranks:
            if rank.connector is not None:
                rank.connector.handle_preemptions(output.kv_connector_metadata)
        self._update_states(output)
        has_connector = self.ranks[0].connector is not None
        if has_connector:
            # What the executor sends is pickled; every rank has its own copy.
            metadata = [pickle.loads(pickle.dumps(output.kv_connector_metadata)) for _ in self.ranks]
            for rank, own in zip(self.ranks, metadata):
                rank.connector.bind_connector_metadata(own)
        forward = SimpleNamespace(attn_metadata={} if output.total_num_scheduled_tokens else None)
        if has_connector and output.has_sync_kv_loads:
            self._start_loads(forward)
        self.between()
        sampled = [self._forward(name, output) for name in output.num_scheduled_tokens]
        self.before = set(output.num_scheduled_tokens)
        if has_connector and not output.has_sync_kv_loads:
            self._start_loads(forward)
        outputs = [pickle.loads(pickle.dumps(self._output(rank, output, sampled))) for rank in self.ranks]
        if not has_connector:
            return outputs[0]
        merged = outputs[0] if len(outputs) == 1 else self.aggregator.aggregate(outputs)
        assert merged is not None
        return merged

    def _start_loads(self, forward: Any) -> None:
        for rank in self.ranks:
            rank.connector.start_load_kv(forward)

    def _output(self, rank: Rank, output: Any, sampled: list[list[int]]) -> ModelRunnerOutput:
        told = None
        if (connector := rank.connector) is not None:
            connector.wait_for_save()
            if self.prompt_saves:
                until(lambda: not rank.half._saver._open, "stored")
            results = connector.get_transfer_results(output.finished_req_ids)
            told = KVConnectorOutput(
                finished_sending=results.finished_sending,
                finished_recving=results.finished_recving,
                failed_recving=results.failed_recving,
                invalid_block_ids=connector.get_block_ids_with_load_errors(),
                kv_connector_stats=connector.get_kv_connector_stats(),
                kv_cache_events=connector.get_kv_connector_kv_cache_events(),
                kv_connector_worker_meta=connector.build_connector_worker_meta(),
            )
            connector.clear_connector_metadata()
        if not output.total_num_scheduled_tokens:
            return ModelRunnerOutput.with_kv_conn_output_only(told)
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[list(tokens) for tokens in sampled],
            kv_connector_output=told,
        )

    def _update_states(self, output: Any) -> None:
        for name in output.finished_req_ids:
            self.states.pop(name, None)
            self.before.discard(name)
        for new in output.scheduled_new_reqs:
            tokens = list(new.prompt_token_ids or [0] * new.prompt_len)
            state = _State(tokens, len(tokens), list(new.block_ids[0]), self.extras_of(new))
            state.n_computed = new.num_computed_tokens
            self.states[new.req_id] = state
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            state = self.states[name]
            resumed, n_computed = name in cached.resumed_req_ids, cached.num_computed_tokens[i]
            if resumed or name not in self.before:
                state.tokens, state.n_drafts = list(cached.all_token_ids[name]), 0
            if self.setup.overlap and state.n_drafts:
                # The scheduler counts every draft of the step before as accepted; what was is known here.
                assert state.n_computed <= n_computed <= state.n_computed + state.n_drafts
                n_computed = state.n_computed
            elif not self.setup.overlap:
                # What was drawn in a step whose load failed is not kept.
                del state.tokens[state.n_prompt + cached.num_output_tokens[i] :]
            state.n_computed = n_computed
            new_pages = cached.new_block_ids[i]
            if resumed:
                state.pages = list(new_pages[0])
            elif new_pages is not None:
                state.pages.extend(new_pages[0])

    def _forward(self, name: str, output: Any) -> list[int]:
        """One request's part of a step: keep its tokens, and draw the next ones if its prompt is complete."""
        state = self.states[name]
        n, first = output.num_scheduled_tokens[name], state.n_computed
        drafts = list(output.scheduled_spec_decode_tokens.get(name, ()))
        n_plain = n - len(drafts)
        if self.setup.overlap and drafts:
            drafts = (state.drafts + [-1] * len(drafts))[: len(drafts)]
        inputs = [*state.tokens[first : first + n_plain], *drafts]
        assert len(inputs) == n, f"{name}: the scheduler counts on tokens that were not drawn"
        kept = [rank.read(state.pages, first) for rank in self.ranks]
        total = read_state(kept)
        values, after = [], []
        for at, token in enumerate(inputs, first):
            values.append(value_of(total, max(0, token), state.extra(at)))
            total = (total + part(values[-1], at)) & _MASK
            after.append(total)
        for rank in self.ranks:
            rank.write(state.pages, first, values)
        state.n_computed, state.n_drafts = first + n, len(drafts)
        if first + n_plain < len(state.tokens):
            return []
        drawn = [draw(after[n_plain - 1])]
        for i, draft in enumerate(drafts):
            if draft != drawn[-1]:
                break
            drawn.append(draw(after[n_plain + i]))
        state.n_computed -= len(drafts) - (len(drawn) - 1)
        state.tokens.extend(drawn)
        state.drafts = self._propose(state)
        return drawn

    def _propose(self, state: _State) -> list[int]:
        """Drafts, each right with the probability `accept`."""
        if not self.setup.drafts:
            return []
        extras = [state.extra(at) for at in range(len(state.tokens))]
        right = answer(state.tokens, self.setup.drafts, extras if any(extras) else [])
        return [token if self.rng.random() < self.accept else (token + 1) % VOCAB for token in right]

    def take_drafts(self, names: Sequence[str]) -> Any:
        return SimpleNamespace(
            req_ids=list(names), draft_token_ids=[self.states[n].drafts if n in self.states else [] for n in names]
        )

    def close(self) -> None:
        for rank in self.ranks:
            if rank.connector is not None:
                rank.connector.shutdown()
