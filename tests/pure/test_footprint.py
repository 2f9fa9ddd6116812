"""Plans from headers: sizes, parts, pages, and the headers that must be refused."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.errors import CheckpointError
from ganglion.plan.capacity import fit, longest
from ganglion.plan.footprint import (
    KvGroupPlan,
    Part,
    part_of,
    read_shape,
    weigh,
    with_head_apart,
)
from ganglion.plan.headers import TensorHeader, read_config, read_folder, read_header
from ganglion.plan.policy import forecast, policy_cost
from ganglion.plan.roofline import Rates, Wall, decode, experts_touched, prefill
from ganglion.units import GIB, MIB

ASSETS = Path(__file__).parents[2] / "src" / "ganglion" / "assets" / "policies"
DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 16,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1024,
    "tie_word_embeddings": False,
}
RATES = Rates(
    dtype="bfloat16",
    num_threads=1,
    read_bytes_per_s=16e9,
    flops_per_s={1: 16e9, 8: 110e9, 32: 400e9, 512: 1.4e12},
    call_us=1.7,
)


def write_weights(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """A safetensors file of zeros: name -> dtype, shape, bytes."""
    header, end = {}, 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    write_raw(path, json.dumps(header).encode(), bytes(end))


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def dense_tensors(num_layers: int = 2) -> dict[str, tuple[str, list[int], int]]:
    """A small Llama-like model in bfloat16."""
    names = {
        "model.embed_tokens.weight": [100, 64],
        "model.norm.weight": [64],
        "lm_head.weight": [100, 64],
    }
    for at in range(num_layers):
        names |= {
            f"model.layers.{at}.self_attn.q_proj.weight": [64, 64],
            f"model.layers.{at}.self_attn.k_norm.weight": [16],
            f"model.layers.{at}.mlp.gate_proj.weight": [96, 64],
        }
    sized = {}
    for name, shape in names.items():
        num_values = shape[0] * (shape[1] if len(shape) > 1 else 1)
        sized[name] = ("BF16", shape, 2 * num_values)
    return sized


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.mlp.gate.weight", Part.ROUTER),
        ("model.layers.3.mlp.gate.e_score_correction_bias", Part.ROUTER),
        ("model.layers.3.block_sparse_moe.gate.weight", Part.ROUTER),
        ("model.layers.3.mlp.router.bias", Part.ROUTER),
        ("model.layers.3.mlp.gate_proj.weight", Part.FEED_FORWARD),
        ("model.layers.3.mlp.experts.7.down_proj.weight", Part.EXPERTS),
        ("model.layers.3.mlp.experts.gate_up_proj_blocks", Part.EXPERTS),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", Part.EXPERTS),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", Part.SHARED_EXPERTS),
        ("model.layers.3.mlp.shared_expert_gate.weight", Part.SHARED_EXPERTS),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", Part.ATTENTION),
        ("model.layers.3.self_attn.sinks", Part.ATTENTION),
        ("model.layers.3.post_attention_layernorm.weight", Part.NORMS),
        ("model.embed_tokens.weight", Part.EMBEDDING),
        ("lm_head.weight", Part.HEAD),
        ("model.visual.blocks.0.attn.qkv.weight", Part.VISION),
    ],
)
def test_every_weight_has_its_part(name: str, part: Part) -> None:
    assert part_of(name) is part


def test_one_file_and_shards_weigh_the_same(tmp_path: Path) -> None:
    tensors = dense_tensors()
    (tmp_path / "one").mkdir()
    write_weights(tmp_path / "one" / "model.safetensors", tensors)
    folder = tmp_path / "many"
    folder.mkdir()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, inside in shards.items():
        write_weights(folder / file, {name: tensors[name] for name in inside})
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    one, many = read_folder(tmp_path / "one"), read_folder(folder)
    assert one == many
    weights = weigh(one, dtype="float32")
    assert weights.values_of(Part.ATTENTION) == 2 * 64 * 64
    assert weights.values_of(Part.NORMS) == 64 + 2 * 16
    assert weights.file_bytes == sum(size for _, _, size in tensors.values())
    assert weights.served_bytes == 2 * weights.file_bytes


def test_four_bit_blocks_are_two_parameters_a_byte(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts."
    write_weights(
        tmp_path / "model.safetensors",
        {
            f"{experts}down_proj_blocks": ("U8", [4, 8, 2, 16], 1024),
            f"{experts}down_proj_scales": ("U8", [4, 8, 2], 64),
        },
    )
    weights = weigh(read_folder(tmp_path), dtype="bfloat16")
    assert (weights.num_values, weights.file_bytes, weights.served_bytes) == (2048, 1088, 4096)


def test_a_tied_head_is_a_second_copy() -> None:
    weights = weights_of(DENSE)
    apart = with_head_apart(weights)
    assert apart.num_values == weights.num_values
    assert apart.served_bytes == weights.served_bytes + 2 * 32000 * 1024
    shape = read_shape(DENSE, where="x")
    both = [
        decode(shape, each, RATES, num_rows=1, context=1).read_bytes for each in (weights, apart)
    ]
    assert both[0] == both[1]


def entry(**changes: Any) -> bytes:
    return json.dumps(
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}
    ).encode()


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        (b"{}" + b" " * 10, b"1234", "describes 0 bytes of data, the file has 4"),
        (b"[1, 2]", b"", "expected an object, got list"),
        (b"{" * 100_000, b"", "not a readable safetensors"),
        (b"[" * 100_000, b"", "not a readable safetensors"),
        (b'{"x": \xff\xfe}', b"", "not a readable safetensors"),
        (b'{"x": 1, "x": 2}', b"", "a key stands twice"),
        (b'{"x": 7}', b"", "x: dtype"),
        (entry(dtype="F99"), bytes(8), "x: dtype: expected one of"),
        (entry(dtype=["F32"]), bytes(8), "x: dtype: expected one of"),
        (entry(shape=[-2]), bytes(8), "expected whole numbers"),
        (entry(shape=[True, 2]), bytes(8), "expected whole numbers"),
        (entry(shape=[2**62, 2**62]), bytes(8), "does not fill bytes"),
        (entry(data_offsets=[0, 4]), bytes(8), "does not fill bytes"),
        (entry(data_offsets=[8, 0]), bytes(8), "does not fill bytes"),
        (entry(data_offsets=[4, 12]), bytes(12), "starts at byte 4, expected 0"),
        (entry(data_offsets=[0]), bytes(8), "expected whole numbers"),
        (entry(), bytes(7), "describes 8 bytes of data, the file has 7"),
    ],
)
def test_hostile_headers_are_refused(
    tmp_path: Path, header: bytes, data: bytes, match: str
) -> None:
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=match):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567", (2**40).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_its_file_is_never_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="header of"):
        read_folder(tmp_path)


@given(content=st.binary(max_size=200), length=st.integers(0, 2**64 - 1))
def test_any_bytes_end_in_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    for head in (length.to_bytes(8, "little"), len(content).to_bytes(8, "little")):
        path.write_bytes(head + content)
        with contextlib.suppress(CheckpointError):
            assert read_header(path) == ()  # "{}" is a file of no tensors


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({}, "weight_map: expected an object"),
        ([], "expected an object, got list"),
        ({"weight_map": {"x": "../../etc/passwd"}}, "a .safetensors file beside it"),
        ({"weight_map": {"x": "/tmp/x.safetensors"}}, "a .safetensors file beside it"),
        ({"weight_map": {"x": 3}}, "a .safetensors file beside it"),
        ({"weight_map": {"x": "b.safetensors"}}, "b.safetensors is missing"),
        ({"weight_map": {"y": "a.safetensors"}}, "x is in a.safetensors, the index says None"),
        ({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}, "lacks y"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: Any, match: str) -> None:
    write_weights(tmp_path / "a.safetensors", {"x": ("F32", [2], 8)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=match):
        read_folder(tmp_path)


def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected model\.safetensors or .*, found neither"
    ) as caught:
        read_folder(tmp_path)
    assert "download" in caught.value.advice
    with pytest.raises(CheckpointError, match=r"config\.json: not readable JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("bad", [0, -1, "28", 2.5, True, None, 1 << 40])
def test_sizes_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(CheckpointError, match="x: num_hidden_layers: expected a whole number"):
        read_shape(DENSE | {"num_hidden_layers": bad}, where="x")


def test_pages_of_a_dense_model() -> None:
    (group,) = read_shape(DENSE, where="x").kv_groups("bfloat16")
    assert group.token_bytes == 28 * 2 * 8 * 128 * 2
    assert group.slots == 8  # 16 would be 1.75 MiB
    assert group.page_bytes == 8 * group.token_bytes
    assert group.num_pages(17) == 3
    # one page of 896 KiB is cut out of a large one of 1 MiB
    assert group.row_bytes(2048, MIB) == 256 * MIB


def test_pages_of_windows_and_latents() -> None:
    gemma = DENSE | {"model_type": "gemma3_text", "sliding_window": 512, "num_hidden_layers": 12}
    full, window = read_shape(gemma, where="x").kv_groups("bfloat16")
    assert (full.num_layers, window.num_layers, window.window) == (2, 10, 512)
    assert window.held_tokens(100) == 100
    assert window.row_bytes(100_000, MIB) == window.row_bytes(600, MIB)
    mla = DENSE | {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    (latent,) = read_shape(mla, where="x").kv_groups("bfloat16")
    assert (latent.name, latent.layer_bytes) == ("latent", 576 * 2)
    listed = DENSE | {
        "num_hidden_layers": 2,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert read_shape(listed, where="x").windowed == (0,)
    assert read_shape(DENSE | {"sliding_window": 128}, where="x").windowed == ()
    with pytest.raises(CheckpointError, match="expected 28 entries, got 1"):
        read_shape(DENSE | {"sliding_window": 1, "layer_types": ["full_attention"]}, where="x")


def test_layers_too_large_for_one_page_are_split() -> None:
    group = KvGroupPlan(name="kv", num_layers=80, layer_bytes=32 * 1024, window=0)
    assert (group.layers_per_page, group.slots) == (32, 1)
    assert group.num_pages(10) == 30


@given(
    num_layers=st.integers(1, 100),
    layer_bytes=st.integers(64, 1 << 16),
    window=st.sampled_from([0, 64, 4096]),
    tokens=st.integers(1, 100_000),
)
def test_pages_hold_what_they_promise(
    num_layers: int, layer_bytes: int, window: int, tokens: int
) -> None:
    group = KvGroupPlan(name="kv", num_layers=num_layers, layer_bytes=layer_bytes, window=window)
    assert group.page_bytes <= MIB
    assert 1 <= group.slots <= 16
    held = group.held_tokens(tokens)
    assert group.num_pages(tokens) * group.page_bytes >= held * group.token_bytes
    arena = 256 * MIB
    most = longest([group], arena, MIB, at_most=1 << 20)
    assert group.row_bytes(most, MIB) <= arena
    assert most == 1 << 20 or group.row_bytes(most + 1, MIB) > arena


def weights_of(config: dict[str, Any]) -> Any:
    """Weights as the config says, as headers only see them."""
    layers, width, inner = config["num_hidden_layers"], 1024, config["intermediate_size"]
    tensors = [TensorHeader(name="model.embed_tokens.weight", dtype="BF16", shape=(32000, width))]
    for at in range(layers):
        where = f"model.layers.{at}."
        tensors.append(
            TensorHeader(name=f"{where}self_attn.qkv", dtype="BF16", shape=(6144, width))
        )
        if "num_experts" in config:
            shape = (config["num_experts"], 3 * config["moe_intermediate_size"], width)
            tensors.append(TensorHeader(name=f"{where}mlp.experts.all", dtype="BF16", shape=shape))
        else:
            tensors.append(
                TensorHeader(name=f"{where}mlp.all", dtype="BF16", shape=(3 * inner, width))
            )
    return weigh(tensors, dtype="bfloat16")


def test_one_row_meets_bandwidth_a_prompt_meets_compute() -> None:
    shape, weights = read_shape(DENSE, where="x"), weights_of(DENSE)
    alone = decode(shape, weights, RATES, num_rows=1, context=128)
    assert alone.wall is Wall.BANDWIDTH
    # every weight and the context's pages are read once: 946 MB and 15 MB at 16 GB/s
    read = weights.served_bytes + 128 * 28 * 4096
    assert alone.read_bytes == pytest.approx(read)
    assert alone.bound_per_s == pytest.approx(16e9 / read, rel=1e-3)
    assert alone.tokens_per_s < alone.bound_per_s
    many = decode(shape, weights, RATES, num_rows=32, context=128)
    assert alone.tokens_per_s < many.tokens_per_s < many.bound_per_s
    assert many.intensity > alone.intensity
    prompt = prefill(shape, weights, RATES, num_tokens=512)
    assert prompt.wall is Wall.COMPUTE
    assert prompt.tokens_per_s > many.tokens_per_s
    assert sum(prompt.shares.values()) == pytest.approx(1.0)


def test_a_token_reads_only_its_experts() -> None:
    shape, weights = read_shape(MOE, where="x"), weights_of(MOE)
    assert experts_touched(shape, 1) == pytest.approx(4)
    assert experts_touched(shape, 8) == pytest.approx(21, abs=0.1)  # of 32, as peers' bounds assume
    assert experts_touched(shape, 10_000) == pytest.approx(32)
    alone = decode(shape, weights, RATES, num_rows=1, context=1)
    experts = weights.values_of(Part.EXPERTS)
    assert alone.read_bytes == pytest.approx(
        2 * (weights.num_values - experts + experts / 8), rel=1e-3
    )


def test_small_models_meet_the_calls(tmp_path: Path) -> None:
    tiny = DENSE | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "head_dim": 16}
    write_weights(tmp_path / "model.safetensors", dense_tensors())
    weights = weigh(read_folder(tmp_path), dtype="bfloat16")
    assert (
        decode(read_shape(tiny, where="x"), weights, RATES, num_rows=1, context=8).wall
        is Wall.CALLS
    )


def test_what_fits() -> None:
    shape, weights = read_shape(DENSE, where="x"), weights_of(DENSE)

    def capacity(available_bytes: int, arena_bytes: int) -> Any:
        return fit(
            shape,
            weights,
            dtype="bfloat16",
            available_bytes=available_bytes,
            arena_bytes=arena_bytes,
            large_page_bytes=MIB,
            context=2048,
            num_rows=8,
            chunk_tokens=512,
        )

    roomy = capacity(16 * GIB, 1024 * MIB)
    assert roomy.is_loadable
    assert roomy.num_rows_in_arena == 4
    assert roomy.num_tokens_in_arena == 4 * 2048
    assert roomy.needed_arena_bytes == 2 * GIB
    tight = capacity(1 * GIB, 256 * MIB)
    assert not tight.is_loadable
    assert tight.largest_arena_bytes == 0


@pytest.mark.parametrize("name", ["metaworld-ten", "metaworld-ten-large", "metaworld-hidden"])
def test_shipped_policies_have_a_plan(name: str) -> None:
    cost = policy_cost(ASSETS / name, dtype="bfloat16")
    alone, eight = (forecast(cost, RATES, num_rows=rows) for rows in (1, 8))
    assert alone.chunk_ms < eight.chunk_ms < 8 * alone.chunk_ms
    assert sum(alone.stages_ms.values()) == pytest.approx(alone.chunk_ms)
    assert cost.num_flow_steps == 5


def test_a_policy_weighs_what_its_file_holds() -> None:
    cost = policy_cost(ASSETS / "metaworld-ten", dtype="bfloat16")
    stored = sum(tensor.num_values for tensor in read_folder(ASSETS / "metaworld-ten"))
    assert cost.num_weights == pytest.approx(stored, rel=0.05)  # but for biases, norms, positions
    # 16 text and 51 observation tokens of 4 layers, features of two views, a chunk of 48 x 4
    kv, features, state = 67 * 4 * 2 * 256 * 2, 50 * 256 * 2, 48 * 4 * 4
    assert cost.context_bytes == kv + features + state


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"type": "act"}, "type: expected one of ganglion_flow"),
        ({"horizon": 0}, "horizon: expected a whole number"),
        ({"conv_channels": "32"}, "conv_channels: expected whole numbers"),
        ({"view_keys": []}, "view_keys: expected names"),
    ],
)
def test_a_policy_config_that_is_none_is_refused(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    config = json.loads((ASSETS / "metaworld-ten" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=match):
        policy_cost(tmp_path, dtype="bfloat16")
