"""Pretrained models in and out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distilljax import _hub
from distilljax._checks import check_type, fail
from distilljax.models.pretrained import _gguf, _safetensors
from distilljax.models.pretrained._convert import fill, tensors_of
from distilljax.models.pretrained._encoders import ENCODERS
from distilljax.models.pretrained._families import DECODERS
from distilljax.models.pretrained._kinds import Kind, config_json, read_config
from distilljax.models.pretrained._tables import Table
from distilljax.models.pretrained._vision import RESNETS, VITS

CONFIG = "config.json"
KINDS = (DECODERS, ENCODERS, RESNETS, VITS)


def load_pretrained(
    path_or_id: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> nnx.Module:
    """A model with the weights of files: Hugging Face directories, and GGUF files.

    Each process reads the pieces that its own devices hold, and casts them on the way:
    no array is ever whole on a host unless a device has it whole.

    Args:
      path_or_id: A directory with config.json and one or many safetensors files; a
        GGUF file (F32, F16, Q8_0, Q4_0, Q6_K, ...); or the name of a model on the hub,
        "owner/name", which is fetched if `huggingface_hub` is installed.
      dtype: Type of the parameters; None is that of the file (GGUF: float32).
        Batch statistics are float32 in any case.
      mesh: Where to put them, by the model's rules (`DECODER_RULES`, `VIT_RULES`);
        None is one device.
      **options: Fields of the config that say how it is run, of a `DecoderConfig`
        `scan`, `remat`, `attention`, `compute_dtype`; of an `EncoderConfig` also
        `pooler`, which is left out where no classifier needs it.

    Returns:
      The module, a `Decoder`, `Encoder`, `ResNet` or `ViT`, in inference mode.

    Example:
      >>> import tempfile
      >>> from distilljax.models import DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4,
      ...                        num_kv_heads=2, head_dim=8, ffn_width=48)
      >>> with tempfile.TemporaryDirectory() as path:
      ...     save_pretrained(config(nnx.Rngs(0)), path)
      ...     model = load_pretrained(path, dtype=jnp.bfloat16, scan=True)
      >>> model.config.num_layers, model.layers.mlp.gate.kernel.shape
      (2, (2, 32, 48))
    """
    kind, config, source, table = _opened(path_or_id, dtype, options)
    model = nnx.eval_shape(lambda: config(nnx.Rngs(0)))
    fill(model, source, table, rules=kind.rules, mesh=mesh, dtype=dtype)
    model.eval()
    return model


def pretrained_config(
    path_or_id: str | Path, *, dtype: Any = None, **options: Any
) -> Any:
    """The config of the model that `load_pretrained` would load; no weight is read.

    Args:
      path_or_id: As there.
      dtype: As there.
      **options: As there.

    Example:
      >>> import tempfile
      >>> from distilljax.models import DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4,
      ...                        num_kv_heads=2, head_dim=8, ffn_width=48)
      >>> with tempfile.TemporaryDirectory() as path:
      ...     save_pretrained(config(nnx.Rngs(0)), path)
      ...     pretrained_config(path).width
      32
    """
    return _opened(path_or_id, dtype, options)[1]


def _opened(
    path_or_id: str | Path, dtype: Any, options: Mapping[str, Any]
) -> tuple[Kind, Any, Any, Any]:
    """What kind of model it is, its config, where its weights are, and their names."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        fail(
            "load_pretrained",
            "dtype",
            "be a floating-point type",
            repr(dtype),
            "For few bits load it so, and call students.quantize_weights.",
        )
    path = Path(path_or_id)
    if not path.exists():
        path = _hub.fetch("load_pretrained", str(path_or_id))
    if path.is_dir() and not (path / CONFIG).exists():
        path = _only_gguf(path)
    if path.is_dir():
        where = path / CONFIG
        kind, config = read_config(KINDS, _json(where), str(where))
        config = _with_options(kind, config, options)
        table = kind.table(config)
        source = _safetensors.SafetensorsSource(path, table.ignored)
        if getattr(config, "tied", False):
            _check_tied(path)
    else:
        source = _gguf.GgufSource(path)
        kind, table = DECODERS, source.table()
        config = _with_options(kind, source.config(), options)
    if hasattr(config, "param_dtype"):
        found = next(dtype for _, dtype in source.tensors().values())
        config = dataclasses.replace(config, param_dtype=jnp.dtype(dtype or found))
    return kind, config, source, table


def _check_tied(directory: Path) -> None:
    """A head in the files of a tied model is its embedding, as the first rows show.

    Some writers leave the copy in; another head is that of another config.
    """
    source = _safetensors.SafetensorsSource(directory)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    tensors = source.tensors()
    if any(name not in tensors for name in names):
        return
    shapes = {tuple(tensors[name][0]) for name in names}
    first = (slice(0, min([256, *(shape[0] for shape in shapes)])), slice(None))
    head, embedding = (source.read(name, first) for name in names)
    if len(shapes) > 1 or (head != embedding).any():
        fail(
            "load_pretrained",
            f"tie_word_embeddings in {directory / CONFIG}",
            "be false for weights with a head of their own",
            "true, and lm_head.weight is not the embedding",
            "Check that the config and the weights are of the same model.",
        )


def save_pretrained(
    model: nnx.Module,
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    max_file_bytes: int = 4 * 2**30,
) -> None:
    """Write a model as a directory that `transformers` and `load_pretrained` load.

    The family is the first one that can say what the model is: a Llama if a decoder can
    be one. Tensors are fetched one after another; at most one file is held in memory.

    Args:
      model: A `Decoder`, `Encoder`, `ResNet` or `ViT`.
      path: The directory, which is made; one that has a config.json is refused.
      config: Further entries of config.json, such as `eos_token_id`.
      max_file_bytes: Size of a file, at most, unless one tensor is larger.

    Example:
      >>> import os, tempfile
      >>> from distilljax.models import DecoderConfig
      >>> config = DecoderConfig(vocab_size=64, width=32, num_layers=2, num_heads=4,
      ...                        num_kv_heads=2, head_dim=8, ffn_width=48, qk_norm=True)
      >>> with tempfile.TemporaryDirectory() as path:
      ...     save_pretrained(config(nnx.Rngs(0)), path)
      ...     sorted(os.listdir(path)), _json(Path(path) / "config.json")["model_type"]
      (['config.json', 'model.safetensors'], 'qwen3')
    """
    kind = next((kind for kind in KINDS if isinstance(model, kind.module)), None)
    if kind is None:
        fail(
            "save_pretrained",
            "model",
            f"be one of {', '.join(kind.module.__name__ for kind in KINDS)}",
            f"a {type(model).__name__}",
            "Merge adapters into it, or save it with distilljax.checkpoints.",
            TypeError,
        )
    directory = Path(path)
    if directory.is_dir() and any(
        path.name == CONFIG or ".safetensors" in path.name
        for path in directory.iterdir()
    ):
        fail(
            "save_pretrained",
            "path",
            "be a directory without a model",
            f"{directory}, which has a {CONFIG} or weights",
            "Remove it, or write elsewhere.",
        )
    described: Any = model
    written, table = config_json(kind, described.config), kind.table(described.config)
    first = jax.tree.leaves(nnx.state(model, nnx.Param))[0]
    # the older name, which every version reads
    written["torch_dtype"] = str(first.dtype)
    tensors = _fetched(model, table)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        _safetensors.write(directory, tensors, max_file_bytes)
        text = json.dumps({**written, **(config or {})}, indent=2)
        # last, so that a directory with a config is whole
        (directory / CONFIG).write_text(text + "\n")
    else:
        for _ in tensors:  # every process takes part in fetching
            pass


def _fetched(model: nnx.Module, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each tensor of a file, one at a time."""
    for name, array, transform in tensors_of(model, table):
        if not array.is_fully_addressable:
            from jax.experimental import multihost_utils

            array = multihost_utils.process_allgather(array, tiled=True)
        yield name, np.ascontiguousarray(transform.back(np.asarray(array)))
        norm, _, last = name.rpartition(".")
        if last == "running_var":
            # what torch counts beside them, and reports where it is missing
            yield f"{norm}.num_batches_tracked", np.zeros((), np.int64)


def _with_options(kind: Kind, config: Any, options: Mapping[str, Any]) -> Any:
    if unknown := sorted(set(options) - set(kind.options)):
        fail(
            "load_pretrained",
            "options",
            f"be among {', '.join(kind.options) or 'none'} for this model",
            ", ".join(unknown),
            "What the model is, its files say.",
            TypeError,
        )
    return dataclasses.replace(config, **options)


def _only_gguf(directory: Path) -> Path:
    """The GGUF file of a directory without a config.json."""
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        fail(
            "load_pretrained",
            "path_or_id",
            f"be a directory with a {CONFIG}, or with one GGUF file",
            f"{directory} with {', '.join(f.name for f in files) or 'neither'}",
            "Give the path of the GGUF file itself, or fetch what is missing.",
        )
    return files[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        check_type("load_pretrained", str(path), found, dict, "Fetch it again.")
        return found
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        fail(
            "load_pretrained",
            str(path),
            "be JSON",
            str(error),
            "It may have been cut short: fetch it again.",
        )
