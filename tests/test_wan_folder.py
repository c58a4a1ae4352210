"""A complete folder of the family, tiny and of random weights: ours, diffusers', and both ways."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import command
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

from worldsim.apps.convert import run as convert
from worldsim.folder import DECODER, TEXT, write_folder
from worldsim.models.umt5 import PromptEncoder
from worldsim.models.wan_vae import WanAutoencoder
from worldsim.presets import PRESETS
from worldsim.world import World

GENERATOR = Path(__file__).parent / "golden" / "model_sf.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, umt5: PromptEncoder) -> Path:
    """Wan2.1 without its transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    folder = tmp_path_factory.mktemp("family") / "base"
    models = {DECODER: WanAutoencoder(vae.eval()), TEXT: umt5}
    write_folder(folder, PRESETS["self-forcing"], models)
    return folder


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """What `worldsim convert` makes of a generator and a base."""
    out = base.parent / "converted"
    size = ("--height", 64, "--width", 96)
    done = command("convert", GENERATOR, out, "--base", base, *size)
    assert done.code == 0, done.err
    return out


def pictures_of(path: Path) -> Sequence[np.ndarray]:
    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def test_a_converted_folder_streams_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "walk.mp4"
    done = command(
        "stream", out, "--world", folder, "--prompt", "a red maze", "--seconds", 1, "--scale", 1
    )
    assert done.code == 0, done.err
    made = pictures_of(out)
    assert len(made) == 16 and made[0].shape == (64, 96, 3)


def test_it_begins_with_a_picture(folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    out = tmp_path / "walk.mp4"
    done = command(
        "stream", out, "--world", folder, "--image", tmp_path / "first.png", "--seconds", 1,
        "--scale", 1, "--prompt", "a maze",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(pictures_of(out)) == 16
    Image.fromarray(pixels[:32]).save(tmp_path / "small.png")
    done = command(
        "stream", out, "--world", folder, "--image", tmp_path / "small.png", "--prompt", "a maze"
    )
    assert done.code == 2 and "the picture is 96×32, this world shows 96×64" in done.err
    assert done.err.count("\n") == 1


def test_image_to_video_is_the_encoded_picture_and_then_blocks(folder: Path) -> None:
    world = World.from_pretrained(folder, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    blocks = list(world.stream("a red maze", seed=1, blocks=3, pictures=pixels))
    assert [block.latents.shape[2] for block in blocks] == [1, 3, 3]
    assert [len(block.frames) for block in blocks] == [1, 12, 12]
    assert torch.equal(blocks[0].latents, world.encoded(torch.from_numpy(pixels)[None]))
    again = world("a red maze", num_frames=25, seed=1, image=pixels, output_type="latent").frames
    assert torch.equal(again, torch.cat([block.latents for block in blocks], 2))


def test_a_video_goes_on(folder: Path) -> None:
    world = World.from_pretrained(folder, torch.float32)
    first = list(world.stream("a red maze", seed=2, blocks=3))
    pictures = np.concatenate([block.frames for block in first[:2]])
    assert len(pictures) == 21
    with world.session("night", seed=3, pictures=pictures) as session:
        assert [block.latents.shape[2] for block in session.given] == [3, 3]
        block = session.step()
    assert (block.index, block.start, len(block.frames)) == (2, 6, 12)


def test_streamed_pictures_are_those_of_the_whole_clip(folder: Path) -> None:
    world = World.from_pretrained(folder, torch.float32)
    blocks = list(world.stream("a red maze", seed=1, blocks=3))
    assert [len(block.frames) for block in blocks] == [9, 12, 12]
    assert isinstance(world.autoencoder, WanAutoencoder)
    latents = world.autoencoder.denormalised(torch.cat([b.latents for b in blocks], 2))
    with torch.inference_mode():
        whole = world.autoencoder.vae.decode(latents).sample[0].clamp(-1, 1)
    pixels = ((whole + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert np.array_equal(pixels, np.concatenate([block.frames for block in blocks]))


def test_diffusers_reads_it_and_gives_the_same_first_block(folder: Path) -> None:
    theirs = WanPipeline.from_pretrained(folder)
    world = World.from_pretrained(folder, torch.float32)
    with torch.inference_mode():
        embeds, _ = theirs.encode_prompt(
            "a red maze", do_classifier_free_guidance=False, max_sequence_length=16
        )
    assert world.text_encoder is not None and world.text_encoder.length == 16
    assert torch.equal(embeds, world.text_encoder.encode("a red maze"))
    with world.session("a red maze", seed=4, cache="recent=all") as session:
        noise = session._fresh(0, 0, session.latent_shape)
        ours = session.step().latents
    x = noise
    for cell in world.config.schedule().cells(0):
        with torch.inference_mode():
            flow = theirs.transformer(x, torch.tensor([cell.timestep]), embeds).sample
        x0 = (x.double() - cell.sigma * flow.double()).float()
        with world.session("a red maze", seed=4) as twin:
            fresh = twin._fresh(0, cell.level + 1, tuple(x.shape))
        x = (1 - cell.next_sigma) * x0 + cell.next_sigma * fresh if cell.next_sigma else x0
    assert (x - ours).abs().max() <= 1e-4  # diffusers' sinusoid is of single precision


def test_a_plain_diffusers_folder_takes_a_preset(folder: Path, tmp_path: Path) -> None:
    WanPipeline.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match=r"causvid wins over .*shift=8.0 \(not 5.0\)"):
        world = World.from_pretrained(tmp_path / "plain", torch.float32, preset="causvid")
    assert world.config.name == "causvid" and world.config.shift == 8.0
    assert World.from_pretrained(tmp_path / "plain", torch.float32).config.shift == 5.0
    assert world.config.grid == "plain" and (world.config.height, world.config.width) == (480, 832)
    with pytest.raises(ValueError, match="unknown preset 'sora': choose self-forcing"):
        World.from_pretrained(tmp_path / "plain", preset="sora")


def test_a_preset_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    stream = ("stream", tmp_path / "walk.gif", "--prompt", "a red maze", "--seconds", 0.5)
    done = command(*stream, "--world", folder, "--preset", "longlive")
    assert done.code == 0 and "wins over longlive: height=64 (not" in done.err
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "world.json").unlink()
    done = command(*stream, "--world", plain, "--preset", "sora")
    assert done.code == 2 and "unknown preset 'sora': choose self-forcing" in done.err


def test_a_worlds_own_settings_win_over_a_preset(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"wins over longlive: .*cache=window=21 \(not"):
        world = World.from_pretrained(folder, torch.float32, preset="longlive")
    assert world.config.name == "self-forcing"


def test_saving_and_loading_change_nothing(folder: Path, tmp_path: Path) -> None:
    world = World.from_pretrained(folder, torch.float32)
    world.save_pretrained(tmp_path / "again")
    again = World.from_pretrained(tmp_path / "again", torch.float32)
    ours, theirs = (next(w.stream("a maze", seed=1, blocks=1)) for w in (world, again))
    assert torch.equal(ours.latents, theirs.latents) and np.array_equal(ours.frames, theirs.frames)
    assert WanPipeline.from_pretrained(tmp_path / "again").transformer is not None


def test_saving_leaves_strangers_files_alone(folder: Path, tmp_path: Path) -> None:
    world = World.from_pretrained(folder, torch.float32)
    world.save_pretrained(tmp_path / "again")
    strange = tmp_path / "again" / "transformer" / "notes.txt"
    strange.write_text("mine")
    (strange.parent / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    world.save_pretrained(tmp_path / "again")
    assert strange.read_text() == "mine"
    World.from_pretrained(tmp_path / "again", torch.float32)


def test_a_generator_alone_has_latents_only(tmp_path: Path) -> None:
    out = tmp_path / "alone"
    done = command("convert", GENERATOR, out, "--height", 64, "--width", 96)
    assert done.code == 0 and "latents only" in done.err
    world = World.from_pretrained(out, torch.float32)
    with world.session(prompt_embeds=torch.zeros(1, 4, 32)) as session:
        block = session.step()
    assert block.frames.size == 0 and block.latents.shape == (1, 16, 3, 8, 12)
    done = command("stream", tmp_path / "x.mp4", "--world", out)
    assert done.code == 2 and "no decoder" in done.err and not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing.pt", "out"), "there is no file nothing.pt"),
        ((GENERATOR, "out", "--preset", "sora"), "unknown preset 'sora'"),
        ((GENERATOR, "out", "--dtype", "int3"), "unknown dtype 'int3'"),
        ((GENERATOR, "out", "--height", 60), "multiple of 8"),
        ((GENERATOR, "."), "is there already"),
        ((GENERATOR, "out", "--base", "no/such/base"), "no world 'no/such/base'"),
    ],
)
def test_what_cannot_be_converted(
    arguments: tuple[object, ...], said: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("convert", *arguments)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_does_not_fit_writes_nothing(base: Path, tmp_path: Path) -> None:
    lacking = shutil.copytree(base, tmp_path / "lacking")
    next((lacking / "vae").glob("*.safetensors")).unlink()
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "text_encoder" / "config.json").read_text())
    (other / "text_encoder" / "config.json").write_text(json.dumps({**config, "d_model": 48}))
    for folder, said in (
        (lacking, r"has no vae/\*.safetensors"),
        (other, "width of a word is 48, but the models take 32"),
    ):
        with pytest.raises(ValueError, match=said):
            convert(GENERATOR, tmp_path / "out", "self-forcing", str(folder), None, None, (64, 96))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lacking", "other"]
