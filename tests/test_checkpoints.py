"""Checkpoints: every wrapping of a generator gives the same model, and what does not is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context
from worldsim.cache.pool import PagePool, PageShape
from worldsim.models.checkpoints import (
    load_generator,
    load_transformer,
    read_generator,
    save_transformer,
)
from worldsim.models.files import CONFIG, INDEX, WEIGHTS
from worldsim.models.transformer import CausalWanTransformer3DModel, Conditioning
from worldsim.models.view import ContextView

GOLDEN = Path(__file__).parent / "golden"
ORIGINAL = GOLDEN / "model_sf.safetensors"
SIZES = {"num_heads": 2}  # all that the golden model's shapes do not tell
GRID = (4, 6)

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def original() -> Tensors:
    return load_file(ORIGINAL)


@pytest.fixture(scope="module")
def wanted() -> Tensors:
    return load_file(GOLDEN / "d_model_diffusers.safetensors")


def random_model(**config: Any) -> CausalWanTransformer3DModel:
    """A tiny model in which no weight is trivial."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 20, "ffn_dim": 72, "num_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = CausalWanTransformer3DModel(**(sizes | {"text_dim": 24} | config))
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def assert_holds(model: CausalWanTransformer3DModel, tensors: Tensors) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# --- the original layout ----------------------------------------------------------------------
def test_golden_names_and_config(wanted: Tensors) -> None:
    generator = read_generator(ORIGINAL)
    names = json.loads((GOLDEN / "key_map_sf_to_diffusers.json").read_text())
    assert generator.tensors.keys() == set(names.values())
    assert generator.text_len == 16
    model = load_generator(ORIGINAL)
    assert_holds(model, wanted)
    golden = json.loads((GOLDEN / "d_config.json").read_text())
    for name in golden.keys() - {"_class_name", "_diffusers_version"}:
        assert model.config[name] == golden[name], name


def inner(name: str) -> str:
    """As FSDP and activation checkpoints name what is inside a layer that they wrap."""
    return re.sub(r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {
            "generator": {"junk": torch.zeros(1)},
            "generator_ema": {f"model._fsdp_wrapped_module.{name}": t[name] for name in t},
            "step": 3,
        },
        lambda t: {"generator_ema": None, "generator": {f"model.{name}": t[name] for name in t}},
        lambda t: {"model": {"state_dict": {f"module.net.{name}": t[name] for name in t}}},
        lambda t: {f"_orig_mod.generator.model.{inner(name)}": t[name] for name in t},
        lambda t: {name: t[name] for name in reversed(list(t))},
    ],
)  # fmt: skip
def test_wrappings_of_training_runs(
    tmp_path: Path, original: Tensors, wanted: Tensors, wrap: Callable[[Tensors], Any]
) -> None:
    assert_holds(load_generator(saved(tmp_path / "run.pt", wrap(original)), SIZES), wanted)


def test_names_of_diffusers_pass(tmp_path: Path, wanted: Tensors) -> None:
    assert_holds(load_generator(saved(tmp_path / "names.ckpt", wanted), SIZES), wanted)


def test_dtypes_are_those_of_cast(tmp_path: Path, original: Tensors) -> None:
    half = {name: tensor.bfloat16() for name, tensor in original.items()}
    path = saved(tmp_path / "half.pth", {"generator": half})
    model = load_generator(path, SIZES, torch.bfloat16)
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == torch.float32
    assert_holds(load_generator(path, SIZES, None), model.state_dict())
    whole = {name: t.float() for name, t in read_generator(path).tensors.items()}
    assert_holds(load_generator(path, SIZES), whole)


def test_a_loaded_model_outlives_its_file(
    tmp_path: Path, original: Tensors, wanted: Tensors
) -> None:
    path = saved(tmp_path / "run.pt", original)
    model = load_generator(path, SIZES)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_holds(model, wanted)


# --- configs ----------------------------------------------------------------------------------
def test_config_from_a_file_or_a_folder(tmp_path: Path, original: Tensors) -> None:
    path = saved(tmp_path / "run.pt", original)
    assert read_generator(path).config is None
    with pytest.raises(ValueError, match="give a config"):
        load_generator(path)
    (tmp_path / CONFIG).write_text('{"num_heads": 4, "dim": 64, "text_len": 512, "eps": 1e-5}')
    for given in (tmp_path, str(tmp_path / CONFIG)):
        generator = read_generator(path, given)
        assert generator.text_len == 512
        assert generator.config is not None
        assert generator.config["attention_head_dim"] == 16
        assert generator.config["eps"] == 1e-5
        assert load_generator(path, given).config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"num_heads": 3}, "3 heads"),
        ({"num_heads": 2, "dim": 128}, "width 64"),
        ({"num_heads": 2, "num_layers": 4}, "missing: blocks.3"),
        ({"num_heads": 2, "ffn_dim": "big"}, "does not fit"),
        ({"num_heads": 2, "qk_norm": False}, "qk_norm"),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, original: Tensors, config: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        load_generator(saved(tmp_path / "run.pt", original), config)


def test_a_config_that_contradicts_the_file() -> None:
    load_generator(ORIGINAL, {"num_heads": 2, "patch_size": (1, 2, 2)})
    with pytest.raises(ValueError, match="num_attention_heads = 2, the config says 4"):
        load_generator(ORIGINAL, {"num_heads": 4})


@pytest.mark.parametrize(
    ("heads", "ffn", "layers"), [(12, 8960, 30), (40, 13824, 40), (12, 8960, 29)]
)
def test_released_sizes_need_no_config(tmp_path: Path, heads: int, ffn: int, layers: int) -> None:
    with torch.device("meta"):
        model = CausalWanTransformer3DModel(
            num_attention_heads=heads, ffn_dim=ffn, num_layers=layers
        )
    # One number for each tensor, so the file is small.
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    path = saved(
        tmp_path / "big.pt", {name: torch.zeros(1).expand(shapes[name]) for name in shapes}
    )
    config = read_generator(path).config
    if layers == 29:
        assert config is None
    else:
        assert config is not None
        for name, value in config.items():
            assert list(_listed(model.config[name])) == list(_listed(value)), name


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


# --- diffusers folders ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 3, "attention_head_dim": 20, "ffn_dim": 88, "num_layers": 1},
        {"num_attention_heads": 2, "attention_head_dim": 28, "cross_attn_norm": False},
        {"num_attention_heads": 1, "attention_head_dim": 24, "num_layers": 3, "text_dim": 40},
    ],
)
@torch.inference_mode()
def test_diffusers_reads_what_we_save(tmp_path: Path, sizes: dict[str, Any]) -> None:
    model = random_model(**sizes)
    save_transformer(model, tmp_path / "new" / "wan")
    theirs, problems = WanTransformer3DModel.from_pretrained(
        tmp_path / "new" / "wan", output_loading_info=True
    )
    assert not any(problems.values())
    written = json.loads((tmp_path / "new" / "wan" / CONFIG).read_text())
    assert written["_class_name"] == "WanTransformer3DModel"
    assert not {"action_dim", "ray_dim"} & written.keys()
    assert_holds(load_transformer(tmp_path / "new" / "wan"), model.state_dict())

    draw = torch.Generator().manual_seed(3)
    clip = torch.randn(1, 16, 3, 2 * GRID[0], 2 * GRID[1], generator=draw)
    prompt = torch.randn(1, 7, model.config.text_dim, generator=draw)
    config = model.config
    shape = PageShape(
        config.num_layers, config.num_attention_heads, GRID, config.attention_head_dim
    )
    view = ContextView(
        Context(PagePool(shape, torch.float32, torch.device("cpu")), CacheConfig()), 3
    )
    view.prepare(0, 3)
    ours = model(
        clip, torch.full((1, 3), 937.5), Conditioning(*model.encode_prompt(prompt)), [view]
    )
    flow = theirs(clip, torch.tensor([937.5]), prompt).sample
    assert flow.std() > 0.1
    assert (ours - flow).abs().max() <= 1e-4


def test_folders_with_our_own_inputs(tmp_path: Path) -> None:
    model = random_model(action_dim=5, ray_dim=4)
    save_transformer(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["_class_name"] == (
        "CausalWanTransformer3DModel"
    )
    assert_holds(load_transformer(tmp_path / "ours"), model.state_dict())


def test_sharded_folders(tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert_holds(load_transformer(tmp_path), model.state_dict())

    index = json.loads((tmp_path / INDEX).read_text())
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="damaged"):
        load_transformer(tmp_path)
    save_file(load_file(shards[1]), shards[0])
    with pytest.raises(ValueError, match="another file"):
        load_transformer(tmp_path)
    shards[0].unlink()
    with pytest.raises(ValueError, match="incomplete"):
        load_transformer(tmp_path)
    shards[0].write_bytes(whole)
    (tmp_path / WEIGHTS).write_bytes(whole)
    with pytest.raises(ValueError, match="holds both"):
        load_transformer(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    # An index leads nowhere but into its own folder.
    index["weight_map"] = dict.fromkeys(("a", "b"), f"../{tmp_path.name}/{shards[0].name}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="incomplete"):
        load_transformer(tmp_path)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
        load_transformer(tmp_path / "none")
    save_transformer(random_model(), tmp_path)  # an empty folder may be there
    config = json.loads((tmp_path / CONFIG).read_text())
    for change, line in (
        ({"_class_name": "WanVACETransformer3DModel"}, "holds a WanVACE"),
        ({"image_dim": 1280}, "image cross-attention"),
        ({"in_channels": 36}, "takes 36 channels"),
        ({"num_layers": 1}, "unexpected: blocks.1"),
        ({"text_dim": 25}, "wrong shape: condition_embedder"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=line):
            load_transformer(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        load_transformer(tmp_path)


def test_saving_replaces_nothing_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    save_transformer(model, tmp_path / "wan")
    assert (tmp_path / "wan").stat().st_mode & 0o777 == (_new_folder(tmp_path / "like")) & 0o777
    with pytest.raises(ValueError, match="there already"):
        save_transformer(model, tmp_path / "wan")
    with pytest.raises(ValueError, match="there already"):
        save_transformer(model, tmp_path / "wan" / CONFIG)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("worldsim.models.checkpoints.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_transformer(model, tmp_path / "more")
    assert {path.name for path in tmp_path.iterdir()} == {"wan", "like"}


def _new_folder(path: Path) -> int:
    path.mkdir()
    return path.stat().st_mode


# --- refusals ---------------------------------------------------------------------------------
class Custom:
    """Unpickling this would run code of its own."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("proof-that-code-ran"),))


def test_code_in_a_pickle_does_not_run(
    tmp_path: Path, original: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "run.pt", {"generator": original, "args": Custom()})
    with pytest.raises(ValueError, match="convert it to safetensors"):
        load_generator(path, SIZES)
    assert not Path("proof-that-code-ran").exists()


@pytest.mark.parametrize("name", ["run.pt", "run.safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_truncated_files(tmp_path: Path, original: Tensors, name: str, kept: float) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        saved(path, original)
    else:
        save_file(original, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match="is damaged"):
        load_generator(path, SIZES)


def test_files_of_another_kind(tmp_path: Path, original: Tensors) -> None:
    for path, line in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.pt", "no file"),
        (saved(tmp_path / "run.bin", original), "must end in"),
        (saved(tmp_path / "old.pt", [1, 2]), "no dictionary"),
        (saved(tmp_path / "empty.pt", {}), "no dictionary"),
        (saved(tmp_path / "critic.pt", {"critic": original}), "'critic', which is no tensor"),
        (saved(tmp_path / "lora.pt", {"a.lora_A": torch.zeros(1)}), "no whole Wan2.1 generator"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            load_generator(path, SIZES)
        assert "\n" not in str(error.value)
    torch.save(original, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"torch 1\.6"):
        load_generator(tmp_path / "old.pth", SIZES)


NAME = "blocks.1.self_attn.q.weight"
TINY = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({NAME: torch.zeros(64, 64, dtype=torch.float8_e4m3fn)}, "float8_e4m3fn.*bf16 or fp32"),
        ({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "float8_e4m3fn"),
        ({NAME: torch.zeros(64, 64, dtype=torch.int8)}, "is quantised"),
        (
            {NAME: torch.zeros(64, 32)},
            r"wrong shape: blocks\.1\.attn1\.to_q\.weight \[64, 32\] for",
        ),
        ({NAME: torch.full((64, 64), torch.nan)}, r"not finite: blocks\.1\.attn1\.to_q\.weight"),
        ({NAME: None}, r"missing: blocks\.1\.attn1\.to_q\.weight"),
        ({"patch_embedding.weight": None}, "no patch_embedding.weight"),
        ({"extra": TINY}, "unexpected: extra"),
        ({f"module.{NAME}": TINY}, "twice"),
        ({"blocks.0.cross_attn.k_img.weight": TINY}, "image-to-video"),
        ({"img_emb.proj.0.weight": TINY}, "image-to-video"),
        ({"patch_embedding.weight": torch.zeros(64, 36, 1, 2, 2)}, "takes 36 channels"),
        ({"vace_blocks.0.before_proj.weight": TINY}, "VACE"),
    ],
)
def test_weights_that_are_refused(
    tmp_path: Path, original: Tensors, change: dict[str, Tensor | None], line: str
) -> None:
    tensors = {name: t for name, t in (original | change).items() if t is not None}
    save_file(tensors, tmp_path / "run.safetensors")
    for path in (tmp_path / "run.safetensors", saved(tmp_path / "run.pt", tensors)):
        with pytest.raises(ValueError, match=line) as error:
            load_generator(path, SIZES)
        assert "\n" not in str(error.value)
