"""What a place can look like: four attributes, their words and their colours, as plain data.

A theme is wall x floor x time x weather. This file knows the words of the text encoder
(`VOCABULARY`, `IGNORED`) and the palettes; it draws nothing (see textures.py).
"""

from dataclasses import dataclass
from itertools import product

Colour = tuple[float, float, float]
"""Red, green, blue in 0..1."""

WALLS = ("brick", "hedge", "stone", "sand")
FLOORS = ("grass", "tiles", "dirt")
TIMES = ("day", "dusk", "night")
WEATHERS = ("clear", "fog")
ATTRIBUTES = (WALLS, FLOORS, TIMES, WEATHERS)


@dataclass(frozen=True)
class Theme:
    """The look of one picture; each field is one of the words of its table."""

    wall: str = "brick"
    floor: str = "grass"
    time: str = "day"
    weather: str = "clear"

    def __post_init__(self) -> None:
        for word, words in zip(self.words(), ATTRIBUTES, strict=True):
            if word not in words:
                raise ValueError(f"unknown theme word {word!r}: choose one of {', '.join(words)}")

    def words(self) -> tuple[str, str, str, str]:
        """The four canonical words: wall, floor, time, weather."""
        return self.wall, self.floor, self.time, self.weather

    def indices(self) -> tuple[int, int, int, int]:
        """Position of each word in WALLS, FLOORS, TIMES and WEATHERS."""
        wall, floor, time, weather = self.words()
        return WALLS.index(wall), FLOORS.index(floor), TIMES.index(time), WEATHERS.index(weather)

    @classmethod
    def from_indices(cls, indices: tuple[int, int, int, int]) -> "Theme":
        """The theme at these positions; raises ValueError when one is out of range."""
        if len(indices) != 4:
            raise ValueError(f"a theme has 4 indices, not {len(indices)}")
        for index, words in zip(indices, ATTRIBUTES, strict=True):
            if not 0 <= index < len(words):
                raise ValueError(f"theme index {index} is not in 0..{len(words) - 1}")
        return cls(*(words[index] for index, words in zip(indices, ATTRIBUTES, strict=True)))

    def prompt(self) -> str:
        """Canonical plain words, such as 'red brick walls, grass floor, night, fog'."""
        surfaces = f"{WALL_PHRASES[self.wall]}, {FLOOR_PHRASES[self.floor]}"
        return f"{surfaces}, {self.time}, {self.weather}"


WALL_PHRASES = {
    "brick": "red brick walls",
    "hedge": "green hedge walls",
    "stone": "blue stone walls",
    "sand": "yellow sand walls",
}
FLOOR_PHRASES = {"grass": "grass floor", "tiles": "tiles floor", "dirt": "dirt floor"}

ALL_THEMES = tuple(Theme(*words) for words in product(*ATTRIBUTES))

# One row per canonical word: every word that means it. No word stands in two rows.
SYNONYMS = {
    "brick": "brick bricks red bricked brickwork",
    "hedge": "hedge hedges green leafy leaf leaves bush bushes ivy garden",
    "stone": "stone stones stony blue grey gray rock rocks rocky granite castle",
    "sand": "sand sandy sandstone yellow golden desert",
    "grass": "grass grassy lawn meadow",
    "tiles": "tiles tile tiled checkered chequered checkerboard marble",
    "dirt": "dirt dirty earth earthen soil mud muddy brown",
    "day": "day daytime daylight sunny noon midday sun sunshine bright morning",
    "dusk": "dusk sunset evening twilight sundown orange",
    "night": "night nighttime dark midnight moon moonlit moonlight stars starry",
    "clear": "clear cloudless clean",
    "fog": "fog foggy mist misty haze hazy",
}
VOCABULARY: dict[str, str] = {
    word: canonical for canonical, words in SYNONYMS.items() for word in words.split()
}
FILLERS = (
    "a an the maze labyrinth world place at with and or walls wall walled floor floors floored "
    "ground in on of under by to is are it its from into through sky weather light time made "
    "covered paved very"
)
IGNORED = frozenset(FILLERS.split())

# --- colours: painted textures -------------------------------------------------------------------
WALL_PAINT: dict[str, tuple[Colour, Colour, Colour]] = {  # main, variation, trim
    "brick": ((0.80, 0.24, 0.16), (0.60, 0.14, 0.12), (0.93, 0.78, 0.66)),
    "hedge": ((0.20, 0.60, 0.20), (0.10, 0.40, 0.17), (0.50, 0.82, 0.30)),
    "stone": ((0.50, 0.60, 0.76), (0.36, 0.45, 0.63), (0.22, 0.28, 0.42)),
    "sand": ((0.96, 0.80, 0.38), (0.84, 0.62, 0.24), (0.60, 0.38, 0.16)),
}
FLOOR_PAINT: dict[str, tuple[Colour, Colour]] = {  # main, variation
    "grass": ((0.50, 0.74, 0.26), (0.33, 0.58, 0.20)),
    "tiles": ((0.93, 0.89, 0.82), (0.34, 0.40, 0.50)),
    "dirt": ((0.62, 0.44, 0.29), (0.45, 0.29, 0.19)),
}
EMBLEM_COLOURS: tuple[Colour, ...] = (
    (0.97, 0.97, 0.94),  # white
    (1.00, 0.84, 0.05),  # gold
    (0.10, 0.22, 0.92),  # blue
    (0.93, 0.15, 0.72),  # magenta
    (0.05, 0.86, 0.86),  # turquoise
    (0.13, 0.06, 0.17),  # near black
)
EMBLEM_SHAPES = ("disc", "diamond", "band", "ring", "cross", "belt")


# --- colours: light and air ----------------------------------------------------------------------
@dataclass(frozen=True)
class Sky:
    """Colours of one time of day; `light` multiplies textures and `glow` emblems."""

    light: Colour
    glow: Colour
    zenith: Colour
    horizon: Colour
    far_hills: Colour
    near_hills: Colour
    orb: Colour
    halo: float
    fog: Colour
    stars: bool = False


SKIES = {
    "day": Sky(
        light=(1.0, 1.0, 1.0),
        glow=(1.0, 1.0, 1.0),
        zenith=(0.16, 0.45, 0.92),
        horizon=(0.72, 0.88, 0.98),
        far_hills=(0.46, 0.55, 0.76),
        near_hills=(0.20, 0.38, 0.36),
        orb=(1.0, 0.95, 0.55),
        halo=0.35,
        fog=(0.83, 0.86, 0.88),
    ),
    "dusk": Sky(
        light=(1.0, 0.70, 0.58),
        glow=(1.0, 0.80, 0.72),
        zenith=(0.33, 0.20, 0.52),
        horizon=(1.0, 0.60, 0.30),
        far_hills=(0.52, 0.26, 0.42),
        near_hills=(0.26, 0.12, 0.26),
        orb=(1.0, 0.86, 0.42),
        halo=0.75,
        fog=(0.82, 0.58, 0.52),
    ),
    "night": Sky(
        light=(0.42, 0.50, 0.82),
        glow=(0.66, 0.68, 0.88),
        zenith=(0.03, 0.04, 0.18),
        horizon=(0.16, 0.23, 0.50),
        far_hills=(0.11, 0.15, 0.33),
        near_hills=(0.04, 0.07, 0.16),
        orb=(0.94, 0.96, 1.0),
        halo=0.25,
        fog=(0.22, 0.28, 0.42),
        stars=True,
    ),
}
AIR = {  # weather: (distance in cells at which a wall is half faded, share of the sky veiled)
    "clear": (11.0, 0.0),
    "fog": (2.2, 0.72),
}
