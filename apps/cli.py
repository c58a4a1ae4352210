"""The command line. Each command lives in its own module and is loaded when it is called."""

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from worldsim.apps.out_of_memory import advice
from worldsim.streaming.faults import RankFailed

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="worldsim: a block-diffusion video model as a live, controllable world.",
)

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


@app.command(
    epilog="Examples:  worldsim stream maze.mp4 --controls 'W*12 L*5 W*20' --prompt 'green hedges'"
    "  ·  worldsim stream - | ffplay -f rawvideo -pixel_format rgb24 -video_size 64x64 -"
)
def stream(
    out: Annotated[
        str, typer.Argument(help=".mp4, .gif, .webp, frames/ (PNG), or - for raw RGB to a pipe.")
    ],
    world: WorldName = "maze",
    prompt: Prompt = None,
    controls: Controls = None,
    seconds: Seconds = None,
    image: Annotated[
        Path | None, typer.Option(help="First picture, of the world's own size.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = None,
    cache: Cache = None,
    schedule: Schedule = None,
    fps: Annotated[
        float | None, typer.Option(help="Playing speed; default: the world's own.")
    ] = None,
    scale: Scale = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    compile: Compile = False,
    threads: Threads = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Chrome trace (.json) of eight blocks, once the context is full (or from the "
            "middle of a short stream), and a summary of where their time went."
        ),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Replay file (.wsrun) of the run, for 'worldsim replay'.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="Processes that share the work, under --schedule tpp, hiar or ring."),
    ] = None,
    save_every: Annotated[
        int, typer.Option(help="Blocks after which ranks save their state beside the file.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an .mp4 that was broken off.")
    ] = False,
) -> None:
    """Walk through a world and write what one sees, as it is made."""
    with _loading():
        from worldsim.apps.setting import Setting
        from worldsim.apps.stream import StreamOptions, run

    run(
        StreamOptions(
            out, Setting(world, steps, cache, schedule, dtype), prompt, controls, seconds, seed,
            fps, scale, device, threads, profile, image, guidance, negative_prompt,
            compile=compile, record=record, ranks=ranks,
            save_every=save_every, resume=resume,
        )
    )  # fmt: skip


@app.command(
    epilog="Examples:  worldsim stream maze.mp4 --record run.wsrun  ·  worldsim replay run.wsrun "
    "--verify  ·  worldsim replay run.wsrun --out again.mp4"
)
def replay(
    run: Annotated[Path, typer.Argument(help="Replay file: of 'stream --record' or of the page.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every block; exit code 1 where one differs.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Video of it; what was rewound is not in it.")
    ] = None,
    branch: Annotated[int, typer.Option(help="Whose video: 0, or the number of a fork.")] = 0,
    world: Annotated[
        str | None, typer.Option(help="Where the world is; default: as it was recorded.")
    ] = None,
    scale: Scale = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Make a recorded run again, and compare it block by block."""
    with _loading():
        from worldsim.apps.replay import ReplayOptions, run_again

    run_again(ReplayOptions(run, verify, out, branch, world, scale, device, threads))


@app.command(epilog="Examples:  worldsim controls  ·  worldsim controls --world path/to/folder")
def controls(world: WorldName = "maze") -> None:
    """Tell what one can do in a world: its keys, their letters in scripts, an example."""
    with _loading():
        from worldsim.apps.controls import run

    run(world)


@app.command(
    epilog="Examples:  worldsim play  ·  worldsim play --world ./sf --device cuda --idle-minutes 5"
    "  ·  worldsim play --host 0.0.0.0 --auth ada:secret --allow-origin https://play.example.org"
)
def play(
    world: WorldName = "maze",
    host: Annotated[
        str, typer.Option(help="Where to listen; any but loopback needs --auth or --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.")] = 7860,
    auth: Annotated[str | None, typer.Option(help="user:password that is asked for.")] = None,
    token: Annotated[
        str | None, typer.Option(help="What ?token= must be; 'new' makes and prints one.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Another address of the page, e.g. a proxy's; may be repeated."),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="The path below which a proxy serves it, e.g. /play.")
    ] = "",
    max_sessions: Annotated[
        int, typer.Option(help="Players at a time, if there is memory for so many.")
    ] = 8,
    idle_minutes: Annotated[
        float, typer.Option(help="A player who does nothing for so long makes room.")
    ] = 15.0,
    seed: Seed = 0,
    steps: Steps = None,
    cache: Cache = None,
    schedule: Schedule = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    no_late_latching: Annotated[
        bool, typer.Option("--no-late-latching", help="Begin every block as soon as one may.")
    ] = False,
) -> None:
    """Walk around in a world, in the browser."""
    with _loading():
        from worldsim.apps.play import PlayOptions, run
        from worldsim.apps.setting import Setting

    run(
        PlayOptions(
            Setting(world, steps, cache, schedule, dtype), host, port, auth, token,
            tuple(allow_origin or ()), root_path, max_sessions, idle_minutes, device, threads, seed,
            not no_late_latching,
        )
    )  # fmt: skip


@app.command(epilog="Example:  worldsim fuzz 100000")
def fuzz(
    messages: Annotated[int, typer.Argument(help="How many to send.")] = 100_000,
    world: WorldName = "maze",
    seed: Seed = 0,
) -> None:
    """Throw random and mutated messages at a server while somebody plays on it."""
    with _loading():
        from worldsim.apps.fuzz import run
        from worldsim.apps.play import PlayOptions
        from worldsim.apps.setting import Setting

    run(messages, PlayOptions(Setting(world)), seed)


@app.command(
    epilog="Examples:  worldsim bench --json bench.json  ·  worldsim bench --model medium"
    "  ·  worldsim bench --play"
)
def bench(
    model: Annotated[
        str,
        typer.Option(
            help="'maze', 'medium' or 'tiny' (random weights), a world folder, or a hub id."
        ),
    ] = "maze",
    blocks: Annotated[int, typer.Option(help="Blocks to time, after the warm-up.")] = 60,
    steps: Steps = None,
    cache: Cache = None,
    schedule: Schedule = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    compile: Compile = False,
    threads: Threads = None,
    play: Annotated[
        bool,
        typer.Option(
            "--play",
            help="Measure `worldsim play` in headless Chromium instead: from a key to the picture "
            "that shows it, as many keys as --blocks.",
        ),
    ] = False,
    json: Json = None,
) -> None:
    """Time a world by part, beside its matrix products alone; speed, first frame, memory."""
    with _loading():
        from worldsim.apps.setting import Setting

    setting = Setting(model, steps, cache, schedule, dtype)
    if play:
        from worldsim.apps.bench_play import BenchPlayOptions
        from worldsim.apps.bench_play import run as run_play
        from worldsim.apps.play import PlayOptions

        options = PlayOptions(setting, device=device, threads=threads)
        run_play(BenchPlayOptions(options, blocks, json))
        return
    from worldsim.apps.bench import BenchOptions, run

    run(BenchOptions(setting, blocks, device, threads, json, compile=compile))


@app.command(
    epilog="Examples:  worldsim train maze --ranks 2  ·  worldsim train maze --device cuda"
)
def train(
    what: Annotated[str, typer.Argument(help="The recipe: maze, maze-short or maze-tpp.")],
    out: Annotated[
        Path | None, typer.Option(help="Weights, curves, sheets; default: runs/RECIPE.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="cpu, gpu or tiny; default: by the device.")
    ] = None,
    device: Device = "cpu",
    ranks: Annotated[int, typer.Option(help="Processes of one thread each (CPU).")] = 1,
) -> None:
    """Train a world from nothing; run again to resume."""
    with _loading():
        from worldsim.apps.train import run

    run(what, out, preset, device, ranks)


@app.command(
    epilog="Examples:  worldsim evaluate --steps 1 --steps 2 --cache recent=11"
    "  ·  worldsim evaluate --table caches --markdown table.md  ·  worldsim evaluate --self-test"
)
def evaluate(
    world: Annotated[
        list[str] | None, typer.Option(help="'maze', 'maze-short' or a maze's folder.")
    ] = None,
    steps: Annotated[list[int] | None, STEPS] = None,
    cache: Annotated[list[str] | None, CACHE] = None,
    schedule: Annotated[list[str] | None, SCHEDULE] = None,
    dtype: Annotated[list[str] | None, DTYPE] = None,
    table: Annotated[
        str | None,
        typer.Option(help="A table's settings: settings, steps, caches, schedules."),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Score the simulator, whole and with known faults.")
    ] = False,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="Of rollout, forks, returning, prompts, minute; default: all."),
    ] = None,
    states: Annotated[int, typer.Option(help="Held-out walks for each measure.")] = 100,
    processes: Annotated[
        int | None, typer.Option(help="Walks scored at a time; default: one a core.")
    ] = None,
    device: Device = "cpu",
    sheet: Annotated[Path | None, typer.Option(help="Contact sheet, true above generated.")] = None,
    json: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a table for people.")] = None,
) -> None:
    """Score a maze world against its simulator, on maps that training never saw.

    --world, --steps, --cache, --schedule, --dtype may be given several times: one row for each
    combination.
    """
    with _loading():
        from worldsim.apps.evaluate import EvaluateOptions, run
        from worldsim.apps.setting import every
        from worldsim.apps.tables import table as rows_of

    measures = tuple(name.strip() for said in measure or () for name in said.split(","))
    worlds = world or ["maze"]
    if table is None:
        settings = every(
            worlds, steps or [None], cache or [None], schedule or [None], dtype or ["auto"]
        )
    elif any((steps, cache, schedule, dtype)):
        raise ValueError("--table brings its own settings: leave out all others but --world")
    else:
        settings = [row for name in worlds for row in rows_of(table, name)]
    run(
        EvaluateOptions(
            tuple(settings), measures, states, device, processes, self_test, sheet,
            json, markdown,
        )
    )  # fmt: skip


@app.command(
    epilog="Example:  worldsim compare steps=2 'steps=6 cache=recent=11' --controls 'W*12 L*5'"
    " --seconds 20 --out side.mp4"
)
def compare(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A setting: 'default', or any of world=, steps=, cache=, schedule=, dtype=.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The setting to hold against it.")],
    prompt: Prompt = None,
    controls: Controls = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    out: Annotated[str | None, typer.Option(help="Video of both, side by side.")] = None,
    scale: Scale = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Run two settings on one seed and one script: likeness by second, drift, speed, memory."""
    with _loading():
        from worldsim.apps.compare import CompareOptions, run

    run(CompareOptions(a, b, prompt, controls, seconds, seed, out, scale, device, threads, json))


@app.command(
    epilog="Examples:  worldsim soak  ·  worldsim soak --cache 'sink=3,recent=9:int4' --blocks 3000"
)
def soak(
    blocks: Annotated[int, typer.Option(help="Blocks to stream.")] = 10_000,
    world: Annotated[
        str, typer.Option(help="'tiny' (random weights), 'maze', a world folder, or a hub id.")
    ] = "tiny",
    cache: Cache = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Stream for long, and fail if memory grows or pages move."""
    with _loading():
        from worldsim.apps.setting import Setting
        from worldsim.apps.soak import SoakOptions, run

    run(SoakOptions(Setting(world, cache=cache, dtype=dtype), blocks, device, json))


@app.command(
    epilog="Example:  worldsim convert self_forcing_dmd.pt sf --preset self-forcing "
    "--base Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
)
def convert(
    source: Annotated[Path, typer.Argument(help="A generator: .pt or .safetensors.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    preset: Annotated[
        str, typer.Option(help="How it is run: self-forcing, causvid, longlive, …")
    ] = "self-forcing",
    base: Annotated[
        str | None, typer.Option(help="Wan2.1 folder or hub id, for decoder and text encoder.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON of the model's sizes, where the file has none.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: as they are.")] = None,
    height: Annotated[int | None, typer.Option(help="Picture height; default: preset's.")] = None,
    width: Annotated[int | None, typer.Option(help="Picture width; default: preset's.")] = None,
) -> None:
    """Make a folder of a generator, which worldsim and diffusers read."""
    with _loading():
        from worldsim.apps.convert import run

    run(source, out, preset, base, config, dtype, (height, width))


@app.command(
    epilog="Examples:  worldsim doctor  ·  worldsim doctor --world self_forcing_dmd.pt "
    "--preset longlive --device cuda --memory 24GiB"
)
def doctor(
    world: Annotated[
        str,
        typer.Option(
            help="'maze', 'medium' or 'tiny', a world folder, a hub id, or a generator's file."
        ),
    ] = "maze",
    height: Annotated[int | None, typer.Option(help="Picture height; default: its own.")] = None,
    width: Annotated[int | None, typer.Option(help="Picture width; default: its own.")] = None,
    cache: Cache = None,
    dtype: Dtype = "auto",
    preset: Annotated[
        str | None, typer.Option(help="How it is run, where it does not say: self-forcing, …")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Of a generator's file: Wan2.1 folder or hub id, as in convert."),
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="A tiny decoder's file, in place of the world's own.")
    ] = None,
    device: Device = "cpu",
    memory: Annotated[
        str | None, typer.Option(help="That there is, e.g. 24GiB; default: what is free here.")
    ] = None,
    json: Json = None,
) -> None:
    """Foretell what a world will take, before it is loaded; exit code 1 where it does not fit."""
    with _loading():
        from worldsim.apps.doctor import DoctorOptions, run

    run(
        DoctorOptions(
            world, cache, (height, width), dtype, preset, device, memory, json, base, decoder
        )
    )


@app.command(epilog="Example:  worldsim sheet maze.png --seed 3")
def sheet(
    out: Annotated[Path, typer.Argument(help="PNG file.")],
    seed: Seed = 0,
    rows: Annotated[int, typer.Option(help="Walks to show.")] = 12,
    seconds: Annotated[float, typer.Option(help="Length of each walk.")] = 12.0,
    height: Annotated[int, typer.Option(help="Picture height.")] = 64,
    width: Annotated[int, typer.Option(help="Picture width.")] = 64,
) -> None:
    """Look at the maze simulator itself: one walk a row, one theme each."""
    with _loading():
        from worldsim.apps.sheet import run

    run(out, seed, rows, seconds, height, width)


schedules = typer.Typer(no_args_is_help=True, help="Look at schedules before they run.")
app.add_typer(schedules, name="schedule")


@schedules.command(
    epilog="Examples:  worldsim schedule show tpp --ranks 4  ·  worldsim schedule show hiar "
    "--blocks 8 --steps 4 --out grid.png"
)
def show(
    name: Annotated[
        str,
        typer.Argument(
            help="serial, fused, reuse, diagonal, disa, tpp, batch, ring, hiar, rolling, lag1, …"
        ),
    ],
    blocks: Annotated[int, typer.Option(help="Blocks to show.")] = 8,
    steps: Annotated[int, typer.Option(help="Denoising steps of a block.")] = 4,
    ranks: Annotated[int | None, typer.Option(help="Default: one for each step.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also draw it as this .png.")] = None,
) -> None:
    """Which cell runs when and on which rank; bubbles, the longest chain, delay of a control."""
    with _loading():
        from worldsim.apps.schedule_show import ShowOptions, run

    run(ShowOptions(name, blocks, steps, ranks, out))


@schedules.command(
    epilog="Example:  worldsim schedule simulate tpp --ranks 5 --stage-ms 40 --decode-ms 30 "
    "--link-gbps 100 --latency-us 20"
)
def simulate(
    name: Annotated[str, typer.Argument(help="As for 'worldsim schedule show'.")],
    stage_ms: Annotated[float, typer.Option(help="One pass of one block through all layers.")],
    commit_ms: Annotated[float | None, typer.Option(help="A context pass; default: alike.")] = None,
    decode_ms: Annotated[float, typer.Option(help="Decoding a block.")] = 0.0,
    world: WorldName = "maze",
    steps: Steps = None,
    cache: Cache = None,
    ranks: Annotated[int | None, typer.Option(help="Default: one for each step.")] = None,
    link_gbps: Annotated[float, typer.Option(help="Of a link, Gbit a second.")] = 100.0,
    latency_us: Annotated[float, typer.Option(help="Of a link.")] = 20.0,
    message_us: Annotated[float, typer.Option(help="Packing a message, on each side.")] = 300.0,
    batch: Annotated[
        float, typer.Option(help="What a further row of a batch costs, of the first one's time.")
    ] = 1.0,
) -> None:
    """Foretell speed, first frame, delay of a control and memory of each rank."""
    with _loading():
        from worldsim.apps.schedule_simulate import SimulateOptions, run

    run(
        SimulateOptions(
            name, world, stage_ms, commit_ms, decode_ms, steps, ranks, link_gbps, latency_us,
            message_us, batch, cache,
        )
    )  # fmt: skip


@schedules.command(
    "bench",
    epilog="Examples:  worldsim schedule bench tpp --ranks 2  ·  worldsim schedule bench hiar "
    "--ranks 4 --sleep-ms 50",
)
def bench_ranks(
    name: Annotated[str, typer.Argument(help="tpp, hiar or ring.")],
    world: WorldName = "maze",
    ranks: Annotated[int, typer.Option(help="Processes, of one thread each.")] = 2,
    steps: Steps = 4,
    cache: Cache = None,
    blocks: Annotated[int, typer.Option(help="Blocks to make.")] = 60,
    dtype: Dtype = "float32",
    decoding: Annotated[bool, typer.Option(help="Make pictures, too.")] = True,
    sleep_ms: Annotated[
        float | None, typer.Option(help="Have each pass sleep so long instead of computing.")
    ] = None,
    json: Json = None,
) -> None:
    """Time a schedule over ranks beside the same on one, and compare what they make."""
    with _loading():
        from worldsim.apps.schedule_bench import RanksBenchOptions, run

    run(
        RanksBenchOptions(name, world, ranks, steps, cache, blocks, dtype, decoding, sleep_ms, json)
    )


@contextmanager
def _loading() -> Iterator[None]:
    """Import without collecting garbage: what torch makes while it loads stays for good, and
    walking through it again and again is a sixth of the time until the first picture.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"worldsim: {message}", file=sys.stderr)


def main() -> None:
    """Console entry: errors of the user are one line and exit code 2, any other failure 1."""
    warnings.showwarning = _warn  # one line, without a source path
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"worldsim: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        line = advice(error)
        if line is None:
            raise
        print(f"worldsim: {line}", file=sys.stderr)
        sys.exit(2)
    except RankFailed as error:
        if str(error):  # else another rank has said it
            print(f"worldsim: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
