"""Options that several commands have: what each is called, takes and says, told once."""

from pathlib import Path
from typing import Annotated

import typer

Seed = Annotated[int, typer.Option(help="Names the noise; the same seed gives the same world.")]
WorldName = Annotated[str, typer.Option(help="'maze', a world folder, or a hub id.")]
# What changes pixels: one value for a run, several for runs side by side.
STEPS = typer.Option(help="Denoising steps of a block.")
CACHE = typer.Option(
    help="What the context keeps, e.g. 'sink=3,mid=8:pool,recent=9:int8,positions=packed'."
)
SCHEDULE = typer.Option(
    help="Sampler, schedule or both, with or without steps: 'euler', 'tpp', "
    "'renoise+hiar:1000,750,500,250'. See 'worldsim schedule show'."
)
DTYPE = typer.Option(help="auto, float32, bfloat16 or float16.")
Steps = Annotated[int | None, STEPS]
Cache = Annotated[str | None, CACHE]
Schedule = Annotated[str | None, SCHEDULE]
Dtype = Annotated[str, DTYPE]
Preset = Annotated[
    str | None,
    typer.Option(help="How a folder is run that does not say so: self-forcing, longlive, …"),
]
Prompt = Annotated[
    str | None, typer.Option(help="Plain words; over time: 'red brick[4s] | night[4s]'.")
]
Controls = Annotated[
    str | None, typer.Option(help="Script of latent frames: 'W*12 WJ*4'; see `worldsim controls`.")
]
Seconds = Annotated[
    float | None,
    typer.Option(help="Length; default: the script, or the prompts' own, else 20 seconds."),
]
Scale = Annotated[int, typer.Option(help="Enlarge every pixel; default: up to 256 lines.")]
Json = Annotated[Path | None, typer.Option(help="Also write the figures here.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of one stage; default: half of the cores.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model first, which takes minutes."),
]
