"""What is foretold is what is measured, from configs alone, and the command that says so."""

import gc
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import command
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from worldsim.apps.doctor import readable, room
from worldsim.apps.medium import MEDIUM, TINY
from worldsim.apps.medium import random_world as made
from worldsim.blueprint import world_of_file, world_of_folder
from worldsim.bundle import locate
from worldsim.folder import write_folder
from worldsim.forecast import forecast
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.models.tiny_decoder import TinyDecoder
from worldsim.models.umt5 import PromptEncoder
from worldsim.models.wan_vae import WanAutoencoder
from worldsim.models.weights import cast
from worldsim.presets import PRESETS
from worldsim.session import decode
from worldsim.state import Applied, Block
from worldsim.world import World

GENERATOR = Path(__file__).parent / "golden" / "model_sf.safetensors"
SIZE = {"height": 64, "width": 96}
BLOCKS = 4  # by then blocks were gathered, committed and decoded over a carry; latents do not fill


# --- the tracker ------------------------------------------------------------------------------
class Live(TorchDispatchMode):
    """Bytes of all tensors that operations hand out, for as long as they live."""

    def __init__(self, *before: torch.Tensor) -> None:
        super().__init__()
        self._ours: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before = {StorageWeakRef(x.untyped_storage()).cdata for x in before}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            # Packed weights have no storage to follow; they are counted in the end.
            if isinstance(x, torch.Tensor) and not x.is_mkldnn:
                ref = StorageWeakRef(x.untyped_storage())
                if ref.cdata not in self._before:
                    self._ours[ref.cdata] = (ref, x.untyped_storage().nbytes())
        self.most = max(self.most, self.now())
        return out

    def now(self) -> int:
        self._ours = {key: held for key, held in self._ours.items() if not held[0].expired()}
        return sum(size for _, size in self._ours.values())

    def during(self, act: Callable[[], object]) -> tuple[int, object]:
        """The most there is while ``act`` runs, and what it returns."""
        self.most = self.now()
        out = act()
        return self.most, out


def weights(world: World) -> list[torch.Tensor]:
    models = (world.transformer, world.autoencoder, world.text_encoder)
    return [x for m in models if m is not None for x in (*m.parameters(), *m.buffers())]


def packed(world: World) -> int:
    """Bytes of the packed copies that the transformer has by now."""
    copies = [getattr(module, "_copy", None) for module in world.transformer.modules()]
    return sum(torch.ops.mkldnn._nbytes(copy) for copy in copies if copy is not None)


def measured(world: World, cache: str | None = None, blocks: int = BLOCKS) -> tuple[int, int]:
    """What a session holds between blocks, and all together while it makes one beside another that
    is decoded: weights, what is held, and what each of the two takes on top of it."""
    gc.collect()
    making = decoding = held = 0
    with Live(*weights(world)) as live, world.session(cache=cache) as session:
        for _ in range(blocks):
            made, block = live.during(session.denoise)
            decoded, _ = live.during(lambda block=block: session.decode(block))
            making, decoding, held = max(making, made), max(decoding, decoded), live.now()
    return held, sum(x.nbytes for x in weights(world)) + packed(world) + making + decoding - held


# --- what is measured -------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_tiny_world(dtype: torch.dtype) -> None:
    world = made(TINY, dtype, "cpu")
    told, (held, together) = forecast(world), measured(world, blocks=TINY.window + 2)
    assert told.session == held
    assert told.total == pytest.approx(together, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_medium_world(dtype: torch.dtype) -> None:
    world = made(replace(MEDIUM, steps=1), dtype, "cpu")
    told, (held, together) = forecast(world), measured(world)
    assert told.session == pytest.approx(held, rel=0.01)
    assert told.total == pytest.approx(together, rel=0.1)
    assert told.packed == pytest.approx(packed(world), rel=0.01)
    assert forecast(world, device="cuda").packed == 0 < told.packed


@pytest.mark.parametrize(
    "line",
    [
        "recent=6",
        "sink=2,recent=4,positions=packed",
        "sink=1,mid=2:pool,recent=4,positions=packed",
        "sink=1,mid=2:topk,bank=4,recent=4",
        "sink=3:int8,recent=6:int8,positions=packed",
        "sink=3:int4h,recent=6:int4h",
    ],
)
def test_caches_of_a_larger_context(line: str) -> None:
    """Here pages and what is made of them are most of it."""
    sizes = replace(MEDIUM, height=64, width=64, steps=1, layers=3, widths=(16, 16, 16))
    world = made(sizes, torch.bfloat16, "cpu")
    told, (held, together) = forecast(world, line), measured(world, line)
    assert told.session == pytest.approx(held, rel=0.01)
    assert told.total == pytest.approx(together, rel=0.1)


def test_guidance_takes_a_second_row() -> None:
    world = made(replace(MEDIUM, height=64, width=64, steps=1, layers=3), torch.bfloat16, "cpu")
    one = forecast(world)
    world.config = replace(world.config, guidance=3.0)
    two, (held, together) = forecast(world), measured(world)
    assert two.kept.context == 2 * one.kept.context
    assert two.session == pytest.approx(held, rel=0.01)
    assert two.total == pytest.approx(together, rel=0.1)


def wan_vae() -> WanAutoencoder:
    """Of Wan2.1's shape, narrow."""
    vae = AutoencoderKLWan(base_dim=16, z_dim=16, num_res_blocks=2)
    return WanAutoencoder(cast(vae.eval().requires_grad_(False), torch.bfloat16))


@pytest.mark.parametrize(
    "kind",
    [
        lambda: CausalAutoencoder(16, (64, 32, 16)),
        lambda: TinyDecoder(16, (32, 16, 16, 16)),
        lambda: AutoencoderKLWan(base_dim=16, z_dim=16, num_res_blocks=2),
    ],
    ids=["causal", "tiny", "wan"],
)
def test_decoders(kind: Callable[[], torch.nn.Module]) -> None:
    decoder = cast(kind().eval().requires_grad_(False), torch.bfloat16)
    if isinstance(decoder, AutoencoderKLWan):
        decoder = WanAutoencoder(decoder)
    sizes = replace(TINY, latent_channels=16, height=64, width=96, block_frames=3)
    world = made(sizes, torch.bfloat16, "cpu")
    world = World(world.config, world.transformer, decoder)
    told, carry = forecast(world), None
    with Live(*weights(world)) as live:
        for index in range(3):
            block = Block(index, 3 * index, torch.zeros(world.latent_shape), Applied((), ""))
            before = live.now()
            most, carry = live.during(partial(decode, decoder, block, carry))
    assert told.pictures == block.frames.nbytes
    assert 0.85 < told.passes["decode"] / (most - before) < 1.3  # rather too much than too little


# --- from configs alone -----------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_weights_are_needed(tmp_path: Path, world_folder: Path, dtype: torch.dtype) -> None:
    loaded = World.from_pretrained(world_folder, dtype)
    for config in world_folder.rglob("*.json"):
        copy = tmp_path / config.relative_to(world_folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(config.read_text())
    empty = world_of_folder(tmp_path, dtype)
    assert all(x.is_meta for x in weights(empty))
    for line in (None, "recent=5:int8"):
        assert forecast(empty, line) == forecast(loaded, line)
    told = forecast(empty)
    assert told.world - told.packed == told.kept.weights == sum(x.nbytes for x in weights(loaded))
    assert [(x.dtype, x.shape) for x in weights(empty)] == [
        (x.dtype, x.shape) for x in weights(loaded)
    ]


def test_the_bundled_world() -> None:
    told = forecast(world_of_folder(locate("maze"), torch.bfloat16))
    assert told == forecast(World.from_pretrained("maze", torch.bfloat16))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, umt5: PromptEncoder) -> Path:
    """A folder of the Wan2.1 family."""
    folder = tmp_path_factory.mktemp("worlds") / "family"
    models = {
        "transformer": World.from_single_file(GENERATOR).transformer,
        "vae": WanAutoencoder(AutoencoderKLWan(base_dim=8, num_res_blocks=1)),
        "text_encoder": umt5,
    }
    write_folder(folder, replace(PRESETS["longlive"], **SIZE, text_length=12), models)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_folder_of_the_wan_family(family: Path, dtype: torch.dtype) -> None:
    empty, loaded = world_of_folder(family, dtype), World.from_pretrained(family, dtype)
    assert all(x.is_meta for x in weights(empty))
    assert forecast(empty) == forecast(loaded)


@pytest.mark.filterwarnings("ignore:causvid wins over")
def test_a_folder_that_only_diffusers_knows(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family, tmp_path / "plain")
    (folder / "world.json").unlink()
    told = forecast(world_of_folder(folder, torch.bfloat16, "causvid"), size=(64, 96))
    assert told == forecast(World.from_pretrained(folder, preset="causvid"), size=(64, 96))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_generator_alone(dtype: torch.dtype | None) -> None:
    loaded = World.from_single_file(GENERATOR, "longlive", torch_dtype=dtype)
    empty = world_of_file(GENERATOR, "longlive", dtype)
    told = forecast(empty, size=(64, 96))
    assert told == forecast(loaded, size=(64, 96))
    assert list(told.weights) == ["transformer"] and told.passes["decode"] == 0


def test_a_generator_with_a_base_and_a_tiny_decoder(family: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    save_file(TinyDecoder(16, (16, 8, 8, 8)).state_dict(), file)
    for tiny in (None, file):
        loaded = World.from_single_file(GENERATOR, base=family, decoder=tiny)
        empty = world_of_file(GENERATOR, "self-forcing", None, family, tiny)
        told = forecast(empty, size=(64, 96))
        assert told == forecast(loaded, size=(64, 96))
        assert list(told.weights) == ["transformer", "decoder", "text encoder"]
        folder = world_of_folder(family, torch.float32, tiny=tiny)
        assert forecast(folder).weights == told.weights


def test_only_configs_are_fetched(family: Path, tmp_path: Path, monkeypatch) -> None:
    """Of a hub id: no weights and no tokenizer, neither for a world nor for a base."""
    asked = []

    def snapshot_download(hub_id: str, allow_patterns: list[str] | None) -> str:
        asked.append(hub_id)
        there = tmp_path / hub_id.replace("/", "-")
        for file in family.rglob("*"):
            name = file.relative_to(family)
            if file.is_file() and any(fnmatch(str(name), wanted) for wanted in allow_patterns):
                (there / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, there / name)
        return str(there)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    size = ("--height", "64", "--width", "96")
    hub = command("doctor", "--world", "some/world", *size)
    based = command("doctor", "--world", GENERATOR, "--base", "some/base", *size)
    assert "weights: decoder" in hub.out and "weights: decoder" in based.out
    assert asked == ["some/world", "some/base"]
    fetched = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert fetched == {"world.json", "model_index.json", "config.json", "scheduler_config.json"}


# --- the command ------------------------------------------------------------------------------
def test_it_fits(tmp_path: Path, world_folder: Path) -> None:
    target = tmp_path / "figures.json"
    options = ("--world", world_folder, "--dtype", "float32", "--cache", "recent=4")
    code, out, err = command("doctor", *options, "--json", target)
    assert code == 0 and "all together" in out and err == ""
    figures = json.loads(target.read_text())
    told = forecast(World.from_pretrained(world_folder, torch.float32), "recent=4")
    assert figures["forecast"] == told.figures()
    assert figures["fits"] and figures["remedies"] == []
    assert figures["there"] > figures["forecast"]["total"]


def test_it_does_not_fit(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    options = ("--world", "medium", "--dtype", "float32", "--memory", "280MiB", "--json", target)
    code, _, err = command("doctor", *options)
    first, second = err.splitlines()
    assert code == 1
    assert first == "worldsim: does not fit: 293.34 MiB needed, 280.00 MiB there"
    assert second.startswith("what saves most: --dtype bfloat16 (")
    figures = json.loads(target.read_text())
    saves = [remedy["saves"] for remedy in figures["remedies"]]
    assert not figures["fits"] and saves == sorted(saves, reverse=True)
    changes = [remedy["change"] for remedy in figures["remedies"]]
    # What is said is what is done: the better one of the two that take a cache line fits.
    line = next(change for change in changes if "int4" in change)
    code, _, err = command("doctor", *options[:-2], *shlex.split(line))
    assert code == 0 and "does not fit" not in err


def test_what_would_help_a_large_world(family: Path) -> None:
    options = ("--world", family, "--dtype", "bfloat16", "--memory", "100KiB")
    code, _, err = command("doctor", *options)
    assert code == 1 and "taew2_1.pth" not in err, "this one is smaller"
    code, _, err = command("doctor", *options, "--device", "cuda")
    assert code == 1 and "world.enable_group_offload()" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--world", "nowhere"), "no world 'nowhere'"),
        (("--world", "nowhere.pt"), "there is no file nowhere.pt"),
        (("--world", "."), "is not a world folder"),
        (("--preset", "fast"), "unknown preset 'fast': choose self-forcing"),
        (("--world", str(GENERATOR), "--preset", "fast"), "unknown preset 'fast'"),
        (("--world", "medium", "--preset", "longlive"), "leave out --preset"),
        (("--world", "medium", "--decoder", "taew2_1.pth"), "leave out --decoder"),
        (("--base", "maze"), "--base is for a generator's file"),
        (("--world", str(GENERATOR), "--base", "nowhere"), "no world 'nowhere'"),
        (("--decoder", "nowhere.pth"), "there is no file nowhere.pth"),
        (("--height", "63"), "picture size 63×64 must be a multiple of 8"),
        (("--width", "0"), "picture size 64×0 must be a multiple of 8"),
        (("--width", "72"), "latent size 8×9 is not a multiple of patch"),
        (("--cache", "size=3"), "cannot read 'size=3'"),
        (("--dtype", "float8"), "unknown dtype 'float8'"),
        (("--device", "toaster"), "unknown device 'toaster'"),
        (("--device", "toaster", "--memory", "1GiB"), "unknown device 'toaster'"),
        (("--memory", "24"), "--memory is a size such as 24GiB"),
        (("--memory", "0GiB"), "--memory is a size such as 24GiB"),
        (("--memory", "-1GiB"), "--memory is a size such as 24GiB"),
        (("--json", "missing/figures.json"), "there is no folder missing"),
    ],
    ids=lambda given: "".join(given).encode("ascii", "replace").decode(),
)
def test_what_cannot_be(options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command("doctor", *options)
    assert code == 2 and out == "" and err.startswith("worldsim: ") and err.count("\n") == 1
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_room_and_sizes() -> None:
    assert room("1.5GiB", "cpu") == room("1536MiB", "cuda:3") == 3 * 2**29
    assert room("2 GB", "cpu") == 2 * 10**9
    assert 2**20 < room(None, "cpu") < 2**50
    assert readable(3 * 2**29) == "1.50 GiB"
    assert readable(512) == "0.50 KiB"
