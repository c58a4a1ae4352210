"""Moving pictures in one file, encoded frame by frame: MP4 (H.264), GIF, WebP.

All three go through PyAV, because it encodes as frames come: memory holds no raw frames (writers
that want the whole clip at once hold all of them, enlarged, until close).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import av.filter
from av.bitstream import BitStreamFilterContext
from av.codec import Codec
from av.codec.codec import UnknownCodecError
from av.video.format import VideoFormat
from av.video.stream import VideoStream

from worldsim.streaming.sinks import Frames, FrameSink, check_writable

BT601, LIMITED_RANGE = 6, 1  # the codes of H.273; what swscale makes of RGB unless told otherwise


@dataclass(frozen=True)
class Format:
    """How one kind of file is written. `whole`: nothing of it plays before it is closed."""

    codec: str
    pixels: str
    max_fps: float = 1000
    whole: bool = True
    codec_options: dict[str, str] = field(default_factory=dict)
    file_options: dict[str, str] = field(default_factory=dict)


FORMATS = {
    ".mp4": Format(
        "libx264",
        "yuv420p",
        whole=False,
        # no B-frames: with the moov written first there is no edit list to take their delay back
        codec_options={"preset": "veryfast", "crf": "18", "bf": "0"},
        file_options={
            "movflags": "frag_keyframe+empty_moov+default_base_moof",
            "flush_packets": "1",
        },
    ),
    # players slow frames shorter than 20 ms down to 100 ms
    ".gif": Format("gif", "pal8", max_fps=50, file_options={"loop": "0"}),
    ".webp": Format(
        "libwebp_anim",
        "bgra",
        codec_options={"lossless": "1", "compression_level": "0"},
        file_options={"loop": "0"},
    ),
}


class VideoSink(FrameSink):
    """One .mp4, .gif or .webp file.

    An MP4 is fragmented, one keyframe and fragment per second or shorter, each handed to the system
    when complete: killed at any time, the file plays. A GIF or WebP is written beside its place
    under another name (`.name.part`) and renamed at close.
    """

    def __init__(self, path: Path, fps: float, scale: int = 1, keep: int = 0) -> None:
        self._format = FORMATS[path.suffix.lower()]
        if fps > self._format.max_fps:
            raise ValueError(f"{path.suffix} plays at most {self._format.max_fps} frames/s")
        try:
            Codec(self._format.codec, "w")
        except UnknownCodecError as error:
            need = f"{path.suffix} needs {self._format.codec}, which this PyAV was built without"
            raise ValueError(f"{need}: install the wheel of PyPI (pip install av)") from error
        self._path = path
        self._written = path.with_name(f".{path.name}.part") if self._format.whole else path
        self._rate = Fraction(fps).limit_denominator(1001)
        self._count = 0
        self._before = before_of(path) if keep else None
        self._keep = keep
        check_writable(self._written)
        super().__init__(str(path), scale)

    def _open(self, height: int, width: int) -> None:
        if self._format.pixels == "yuv420p" and (height % 2 or width % 2):
            raise ValueError(f"frames are {width}x{height}, H.264 needs even sizes: use scale=2")
        if self._before is None:
            before_of(self._path).unlink(missing_ok=True)
        elif not self._before.exists():
            self._path.rename(self._before)
        self._file = FragmentFile(self._written)
        self._container = av.open(
            self._file,
            "w",
            format=self._path.suffix[1:].lower(),
            options=self._format.file_options,
        )
        stream = self._container.add_stream(
            self._format.codec, rate=self._rate, options=self._format.codec_options
        )
        assert isinstance(stream, VideoStream)
        codec = stream.codec_context
        codec.width, codec.height, codec.pix_fmt = width, height, self._format.pixels
        codec.thread_count = 1  # frames are small: more threads are slower, and take cores away
        codec.gop_size = max(1, int(self._rate))
        if self._format.pixels == "yuv420p":
            codec.colorspace, codec.color_range = BT601, LIMITED_RANGE
        self._stream = stream
        if self._before is not None:
            self._copy(self._before)
        self._palette = None
        if self._format.pixels == "pal8":
            self._palette = palette_graph(height, width, 1 / self._rate)

    def _copy(self, before: Path) -> None:
        """Begin with the pictures that are to be kept, as they were encoded. They need no picture
        after them (there are no B-frames), and the next one is a keyframe."""
        self._container.start_encoding()  # so that the head of the file knows the encoder
        with av.open(str(before)) as old:
            source = old.streams.video[0]
            # As the encoder writes them, not as the file has them.
            plain = BitStreamFilterContext("h264_mp4toannexb", source)
            for packet in old.demux(source):
                if packet.size == 0 or self._count == self._keep:
                    break
                for part in plain.filter(packet):
                    part.stream = self._stream
                    part.time_base = 1 / self._rate
                    part.pts = part.dts = self._count
                    part.duration = 1
                    self._container.mux(part)
                self._count += 1

    def _add(self, frame: Frames) -> None:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = self._count, 1 / self._rate
        if self._palette is not None:
            self._palette.push(picture)
            picture = self._palette.vpull()
        self._container.mux(self._stream.encode(picture))
        self._count += 1

    def _flush(self) -> None:
        self._file.flush()

    def _finish(self, complete: bool) -> None:
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            if complete:
                self._file.flush()
                self._file.close()
                if self._format.whole:
                    self._written.replace(self._path)
                if self._before is not None:
                    self._before.unlink()
        finally:
            with suppress(OSError):  # an error has been told, or is being told: hide it not
                self._file.close()
            if self._format.whole:
                self._written.unlink(missing_ok=True)


def before_of(path: Path) -> Path:
    """Where a video waits whose beginning is kept."""
    return path.with_name(f".{path.name}.before")


def kept_pictures(path: Path) -> int:
    """How many pictures there are to keep of a video that may have been broken off."""
    there = before_of(path) if before_of(path).exists() else path
    if not there.exists():
        return 0
    try:
        with av.open(str(there)) as file:
            return sum(packet.size > 0 for packet in file.demux(file.streams.video[0]))
    except (av.error.FFmpegError, IndexError):
        return 0


class FragmentFile:
    """A file for PyAV that grows by whole fragments or not at all.

    - PyAV only fills memory; the disk is met in `flush`, outside it. An error inside its callbacks
      would be lost or, before PyAV 18, end in a segmentation fault.
    - The first 8 bytes of every flush (length and kind of a box) are written last. Until then they
      are zeros, where a reader stops: killed or full halfway, the file plays up to there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._size = 0
        self._pending = bytearray()

    def write(self, data: bytes) -> int:
        """Takes bytes from PyAV; never fails."""
        self._pending += data
        return len(data)

    def flush(self) -> None:
        """Hands to the system what PyAV has written; OSError if it will not take it."""
        for part in (slice(8, None), slice(0, 8)):
            self._file.seek(self._size + part.start)
            self._file.write(self._pending[part])
            self._file.flush()
        self._size += len(self._pending)
        self._pending.clear()

    def close(self) -> None:
        """Closes the file without what is pending."""
        self._file.close()


def palette_graph(height: int, width: int, time_base: Fraction) -> av.filter.Graph:
    """A filter from rgb24 to pal8 pictures of this size, each with the best 256 colours for it."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=VideoFormat("rgb24"), time_base=time_base
    )
    split = graph.add("split")
    choose = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    paint = graph.add("paletteuse", "new=1:dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(choose, 0, 0)
    split.link_to(paint, 1, 0)
    choose.link_to(paint, 0, 1)
    paint.link_to(sink)
    graph.configure()
    return graph
