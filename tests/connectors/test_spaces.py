"""Which models share blocks: those that compute the same keys and values, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from penstock.connectors.transformers import Connector
from penstock.connectors.transformers.spaces import effective_config
from penstock.errors import Refused
from penstock.identity import Space
from tests.connectors.models import make_model, make_prompt

Connect = Callable[..., Connector]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def hits(connect: Connect, saver: PreTrainedModel, loader: PreTrainedModel, **kwargs: Any) -> int:
    """Tokens that the second model is given of what the first one saved."""
    prompt = make_prompt(50)
    writer, reader = connect(saver), connect(loader, **kwargs)
    writer.generate(prompt, 2, do_sample=False)
    assert writer.flush()
    return reader.load(prompt).hit_tokens


def test_equal_models_share(connect: Connect) -> None:
    assert hits(connect, make_model("llama"), make_model("llama")) == 48


@pytest.mark.parametrize(
    ("difference", "fields"),
    [
        ({"seed": 1}, ("weights",)),
        ({"dtype": torch.bfloat16}, ("weights", "dtype", "segment_bytes")),
        ({"rope_parameters": YARN}, ("weights", "config")),
        ({"rope_parameters": LINEAR}, ("weights", "config")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}, ("weights", "config")),
        ({"rms_norm_eps": 1e-5}, ("config",)),
        ({"attn_implementation": "eager"}, ("config",)),
    ],
    ids=["weights", "dtype", "yarn", "linear", "theta", "norm", "attention"],
)
def test_different_models_do_not(
    connect: Connect, llama: PreTrainedModel, difference: dict[str, Any], fields: tuple[str, ...]
) -> None:
    other = make_model("llama", **difference)
    assert connect(llama).space.differences(connect(other).space) == fields
    assert hits(connect, llama, other) == 0


@pytest.mark.parametrize("kwargs", [{"tenant": b"b"}, {"epoch": 1}], ids=["tenant", "epoch"])
def test_different_owners_do_not(connect: Connect, llama: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    assert hits(connect, llama, llama, **kwargs) == 0


def test_a_rope_that_only_the_configuration_shows_counts(connect: Connect, llama: PreTrainedModel) -> None:
    # The frequencies of this model were made before; only the configuration says that they are scaled.
    other = make_model("llama")
    other.config.rope_parameters = LINEAR
    assert connect(llama).space.differences(connect(other).space) == ("config",)


def test_names_and_sampling_do_not_count(connect: Connect, llama: PreTrainedModel) -> None:
    other = make_model("llama")
    other.config._name_or_path = "elsewhere"
    other.config.eos_token_id = 7
    other.config.architectures = ["Renamed"]
    assert connect(other).space == connect(llama).space


def test_a_weight_written_in_place_gives_another_space(connect: Connect) -> None:
    model = make_model("llama")
    connector = connect(model)
    before = connector.space
    assert connector.space is before
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    after = connector.space
    assert before.differences(after) == ("weights",)
    model.load_state_dict(make_model("llama").state_dict())
    assert connector.space == before


def test_a_replaced_weight_gives_another_space(connect: Connect) -> None:
    model = make_model("llama")
    connector = connect(model)
    before = connector.space
    old = model.model.layers[1].self_attn.k_proj.weight
    model.model.layers[1].self_attn.k_proj.weight = torch.nn.Parameter(old.detach() + 1.0)
    assert before.differences(connector.space) == ("weights",)


def test_a_write_through_data_needs_a_word(connect: Connect) -> None:
    model = make_model("llama")
    connector = connect(model)
    before = connector.space
    model.lm_head.weight.data.mul_(2.0)
    assert connector.space == before
    connector.weights_changed()
    assert before.differences(connector.space) == ("weights",)


def test_a_checkpoint_stands_for_the_weights_until_they_change(connect: Connect, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "a")
    make_model("llama").save_pretrained(tmp_path / "b")
    spaces: list[Space] = []
    for folder in ("a", "b"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        connector = connect(model, checkpoint=tmp_path / folder)
        spaces.append(connector.space)
    assert spaces[0] == spaces[1]
    assert spaces[0].weights.startswith("files-")
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert connector.space.weights.startswith("tensors-")


def test_configurations_become_plain_values() -> None:
    model = make_model("llama")
    model.config.odd = {1: float("inf"), "shape": (1, 2)}
    plain = effective_config(model)
    assert plain["odd"] == {"1": "inf", "shape": [1, 2]}
    assert plain["attn_implementation"] == "sdpa"


class Lora(torch.nn.Module):
    """A layer with adapters, as PEFT's `BaseTunerLayer` shows itself."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: torch.nn.Linear, **seeds: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        self.scaling = dict.fromkeys(seeds, 1.0)
        self.active_adapters, self.merged_adapters = list(seeds)[:1], []
        self.disable_adapters = False
        for name, seed in seeds.items():
            torch.manual_seed(seed)
            self.lora_A[name] = torch.nn.Linear(base_layer.in_features, 2, bias=False)
            self.lora_B[name] = torch.nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            y = y + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return y


def with_lora(**seeds: int) -> tuple[PreTrainedModel, Lora]:
    """A model with adapters of these names, the first one active."""
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj = Lora(attention.k_proj, **seeds)
    model.peft_config = {name: SimpleNamespace(to_dict=lambda: {"r": 2, "revision": None}) for name in seeds}
    return model.eval(), attention.k_proj


def test_adapters_are_told_apart_by_content_not_by_name(connect: Connect) -> None:
    (plain, one, same, other) = (
        make_model("llama"),
        with_lora(a=1)[0],
        with_lora(x=5, b=1)[0],
        with_lora(a=2)[0],
    )
    same.model.layers[1].self_attn.k_proj.active_adapters = ["b"]
    spaces = [connect(model).space for model in (plain, one, same, other)]
    assert spaces[0].differences(spaces[1]) == ("adapter",)
    assert spaces[1] == spaces[2]
    assert spaces[1].differences(spaces[3]) == ("adapter",)
    assert hits(connect, one, other) == 0
    assert hits(connect, one, plain) == 0
    assert hits(connect, one, same) == 48


@pytest.fixture
def switched() -> tuple[PreTrainedModel, Lora]:
    return with_lora(a=1, b=2)


def test_switching_adapters_off_shares_with_the_plain_model(
    connect: Connect, llama: PreTrainedModel, switched: tuple[PreTrainedModel, Lora]
) -> None:
    model, layer = switched
    connector = connect(model)
    layer.disable_adapters = True
    assert connector.space == connect(llama).space


def test_switching_scaling_and_merging_adapters_changes_the_space(
    connect: Connect, switched: tuple[PreTrainedModel, Lora]
) -> None:
    model, layer = switched
    connector = connect(model)
    spaces = [connector.space]
    layer.active_adapters = ["b"]
    spaces.append(connector.space)
    layer.scaling["b"] = 0.5
    spaces.append(connector.space)
    # As PEFT merges: through .data, which counts no version.
    layer.base_layer.weight.data += layer.lora_B["b"].weight @ layer.lora_A["b"].weight
    layer.merged_adapters = ["b"]
    spaces.append(connector.space)
    assert len({space.digest() for space in spaces}) == 4
    assert spaces[3].adapter == ""
    assert spaces[3].weights != spaces[0].weights == spaces[1].weights


def test_adapters_that_act_beyond_their_tokens_are_refused(connect: Connect) -> None:
    for setting, reason in (
        ("is_prompt_learning", "virtual tokens"),
        ("alora_invocation_tokens", "activated"),
    ):
        model, _ = with_lora(a=1)
        setattr(model.peft_config["a"], setting, [1])
        with pytest.raises(Refused, match=reason):
            connect(model)
    model = make_model("llama")
    model.peft_config = {"a": SimpleNamespace()}
    with pytest.raises(Refused, match="no PEFT layers"):
        connect(model)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_peft_itself(connect: Connect, llama: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int, name: str) -> Any:
        model = make_model("llama")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config, adapter_name=name).eval()

    one, same, other = adapted(1, "first"), adapted(1, "second"), adapted(2, "first")
    space = connect(one).space
    assert connect(llama).space.differences(space) == ("adapter",)
    assert connect(same).space == space
    assert space.differences(connect(other).space) == ("adapter",)
    connector = connect(one)
    with one.disable_adapter():
        assert connector.space == connect(llama).space
    one.merge_adapter()
    assert connector.space.adapter == ""
    assert connector.space.weights != space.weights
