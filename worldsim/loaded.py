"""The models of a world: loaded, saved, moved, adapted and compiled; nothing of sessions.

A world folder holds ``world.json`` and three diffusers folders: ``transformer``, ``vae`` and
``text_encoder``; see `worldsim.folder`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from worldsim.bundle import auto_dtype, check_device, check_dtype, locate
from worldsim.config import WorldConfig
from worldsim.folder import DECODER, TEXT, TRANSFORMER, read_folder, write_folder
from worldsim.models.attention import NATIVE
from worldsim.models.autoencoder import Decoder
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.weights import cast
from worldsim.models.words import TextEncoder
from worldsim.quantize import check_quantization, is_quantized, quantize
from worldsim.rollout import compiled
from worldsim.share import WHOLE, Share

L = TypeVar("L", bound="Loaded")


class Loaded:
    """What `worldsim.world.World` stands on; see the module docstring.

    Attributes:
        source: what it was loaded from, as it was said.
        forward, commit: the transformer's passes, compiled or not.
        fused: both in one, see `CausalWanTransformer3DModel.fused`; None where it is not to be had.
    """

    def __init__(
        self,
        config: WorldConfig,
        transformer: CausalWanTransformer3DModel,
        autoencoder: Decoder | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.config = config
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.attention = NATIVE
        self.device = transformer.device
        self.dtype = transformer.proj_out.weight.dtype
        self.offloaded = False
        self.source = config.name
        self.forward: Callable[..., Any] = transformer
        self.commit: Callable[..., Any] = transformer.commit
        self.fused: Callable[..., Any] | None = transformer.fused

    # --- loading and saving -------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls: type[L],
        source: str | Path,
        torch_dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        preset: str | None = None,
        decoder: str | Path | None = None,
        quantization_config: Any = None,
        share: Share = WHOLE,
    ) -> L:
        """Load the bundled world (``"maze"``), a world folder, a diffusers folder of the Wan2.1
        family, or a hub id of either.

        Args:
            source: name, path or hub id.
            torch_dtype: a dtype, or ``"auto"``: bfloat16 where the device computes in it.
            device: where to put it.
            preset: how to run a folder that does not say so itself, see `worldsim.presets`.
            decoder: a tiny decoder's file (``taew2_1.pth``) in place of the folder's autoencoder.
            quantization_config: quantise the transformer's linears by it, see
                `worldsim.quantize.check_quantization`.
            share: what one of several ranks needs of it; the rest is not read.

        Raises:
            ValueError: an unknown name, an incomplete folder, damaged weights.
        """
        place = check_device(device)
        if quantization_config is not None:
            check_quantization(quantization_config)  # before anything large is read
        folder = locate(str(source))
        dtype = auto_dtype(place) if torch_dtype == "auto" else check_dtype(torch_dtype)
        world = cls(*read_folder(folder, dtype, preset, _path(decoder), share))
        world.source = str(source)
        return world._placed(place, quantization_config)

    @classmethod
    def from_single_file(
        cls: type[L],
        path: str | Path,
        preset: str = "self-forcing",
        base: str | Path | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        decoder: str | Path | None = None,
        quantization_config: Any = None,
    ) -> L:
        """Load a generator in its original layout, such as ``self_forcing_dmd.pt``.

        Args:
            path: ``.pt`` or ``.safetensors``.
            preset: how to run it, see `worldsim.presets`.
            base: a diffusers folder or hub id of Wan2.1, for its decoder and text encoder. Without
                one there are latents only, and prompts are given as embeddings.
            config: sizes of the model, where neither the file nor its shapes tell them.
            torch_dtype: None takes the file's own.
            device: where to put it.
            decoder: a tiny decoder's file, in place of the base's autoencoder.
            quantization_config: see `from_pretrained`.

        Raises:
            ValueError: a file that cannot be read or does not fit, an unknown preset.
        """
        from worldsim.single_file import read_single_file

        place = check_device(device)
        dtype = None if torch_dtype is None else check_dtype(torch_dtype)
        if quantization_config is not None:
            check_quantization(quantization_config)  # before anything large is read
        folder = None if base is None else locate(str(base))
        read = read_single_file(Path(path), preset, folder, config, dtype, _path(decoder))
        world = cls(*read)
        world.source = str(path)
        return world._placed(place, quantization_config)

    def _placed(self: L, place: torch.device, quantization_config: Any) -> L:
        """On its device, once it is loaded."""
        if quantization_config is not None:
            quantize(self.transformer, quantization_config, place)
        return self if place.type == "cpu" else self.to(place)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads, and diffusers too where it can.

        Raises:
            ValueError: for a world that is quantised or has a LoRA; nothing is written then.
        """
        if is_quantized(self.transformer):
            raise ValueError("quantised weights are not saved: save the world before quantising it")
        if getattr(self.transformer, "peft_config", None):
            raise ValueError("a world is saved without its LoRA: unload_lora() first")
        if self.autoencoder is not None and not hasattr(self.autoencoder, "save_pretrained"):
            raise ValueError("a tiny decoder is not saved: load the world without decoder= first")
        write_folder(Path(folder), self.config, self._models())

    def to(self: L, *targets: torch.device | str | torch.dtype) -> L:
        """Move and cast, as in ``world.to("cuda", torch.bfloat16)``; open sessions cannot go on.

        Raises:
            ValueError: where the device is not there, or for a dtype of a quantised world, or an
                offloaded world; nothing has changed then.
        """
        checked = [t if isinstance(t, torch.dtype) else check_device(t) for t in targets]
        if self.offloaded:
            raise ValueError(
                "an offloaded world stays where it is: load it anew to move or cast it"
            )
        if is_quantized(self.transformer) and any(
            isinstance(t, torch.dtype) and t != self.dtype for t in checked
        ):
            raise ValueError("quantised weights keep their dtype: load them with torch_dtype=")
        for target in checked:
            if isinstance(target, torch.dtype):
                self.dtype = target
            else:
                self.device = target
        for model in self._models().values():
            if not is_quantized(model):
                cast(model, self.dtype)
            torch.nn.Module.to(model, self.device)
        self._begin_anew()
        return self

    def _begin_anew(self) -> None:
        """Forget what older weights or devices left behind."""

    # --- adapting -----------------------------------------------------------------------------
    def load_lora(
        self, source: str | Path | Mapping[str, Any], scale: float = 1.0, name: str = "default"
    ) -> None:
        """Add a LoRA to the transformer, ``scale`` times, beside those it has; open sessions
        cannot go on, since their context and text were made without it.

        Args:
            source: a file or its tensors, see `worldsim.lora.read_lora`.
            name: to tell several apart.

        Raises:
            ValueError: a LoRA that does not fit this model, a name that is taken, or peft is
                missing; nothing has changed then.
        """
        from worldsim.lora import load_lora

        load_lora(self.transformer, source, scale, name)
        self._begin_anew()

    def unload_lora(self) -> None:
        """Take all LoRAs off; the weights are the very same again. Open sessions cannot go on.

        Raises:
            ValueError: there is none.
        """
        from worldsim.lora import unload_lora

        unload_lora(self.transformer)
        self._begin_anew()

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the models on the CPU; whichever is called is alone on the device.

        Each block moves the transformer and the decoder there and back, and neither works while
        the other does: for clips rather than for live streams. Open sessions cannot go on.

        Raises:
            ValueError: where the device is not there, or for a world that is compiled, or
                offloaded already.
        """
        from worldsim.offload import Turns

        place = self._offloadable(device)
        turns = Turns(place)
        for model in self._models().values():
            turns.take(model)
        self._offloaded_to(place)

    def enable_group_offload(
        self,
        device: torch.device | str = "cuda",
        num_blocks_per_group: int = 1,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Keep the transformer's layers on the CPU, and each group of them on the device only while
        it is computed; the text encoder is there only while it reads, the decoder always. Open
        sessions cannot go on.

        Args:
            num_blocks_per_group: layers that come and go together (diffusers calls them blocks).
            use_stream: bring the next layer while this one is computed (CUDA), one at a time.
            record_stream, low_cpu_mem_usage: see diffusers' `apply_group_offloading`.

        Raises:
            ValueError: as `enable_model_cpu_offload`, or for options that do not go together.
        """
        from worldsim.offload import Turns, offload_layers

        place = self._offloadable(device)
        if num_blocks_per_group < 1:
            raise ValueError(f"num_blocks_per_group must be 1 or more, got {num_blocks_per_group}")
        offload_layers(
            self.transformer, place, num_blocks_per_group=num_blocks_per_group,
            use_stream=use_stream, record_stream=record_stream,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )  # fmt: skip
        models = self._models()
        if TEXT in models:
            Turns(place).take(models[TEXT], stays=False)
        if DECODER in models:
            torch.nn.Module.to(models[DECODER], place)
        self._offloaded_to(place)

    def _offloadable(self, device: torch.device | str) -> torch.device:
        place = check_device(device)
        if self.offloaded:
            raise ValueError(
                "this world is offloaded already: load it anew to offload it otherwise"
            )
        if self.forward is not self.transformer:
            raise ValueError(
                "a compiled world is not offloaded: load it anew, and do not compile it"
            )
        return place

    def _offloaded_to(self, place: torch.device) -> None:
        self.offloaded = True
        self.device = place
        self.commit = self.transformer.commit  # the ones that are hooked
        self.fused = self.transformer.fused
        self._begin_anew()

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention kernel; ``native`` needs nothing. Open new sessions after it.

        Raises:
            ValueError: for a kernel that does not run here, naming those that exist.
        """
        self.transformer.set_attention_backend(name)
        self.attention = name

    def compile(self, **options: Any) -> None:
        """Compile the denoise and commit passes, each once; ``options`` go to `torch.compile`.

        Sessions with quantised pages run as before: see `worldsim.rollout.compiled`. There is no
        fused pass then: what it writes into a buffer changes from block to block.

        Raises:
            ValueError: for an offloaded world.
        """
        if self.offloaded:
            raise ValueError("an offloaded world is not compiled: its weights come and go")
        self.forward = compiled(self.transformer, **options)
        self.commit = compiled(self.transformer.commit, **options)
        self.fused = None

    def _models(self) -> Mapping[str, Any]:
        models = {TRANSFORMER: self.transformer, DECODER: self.autoencoder, TEXT: self.text_encoder}
        return {name: model for name, model in models.items() if model is not None}


def _path(source: str | Path | None) -> Path | None:
    return None if source is None else Path(source)
