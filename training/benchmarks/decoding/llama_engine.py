"""llama.cpp through llama-cpp-python, with random weights in GPT-2's shape; needs neither torch nor this package."""

import ctypes
import gc
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from training.benchmarks.decoding import gguf_files
from training.benchmarks.decoding.worker import resident_bytes, serve, timed


# Tokens of a context that do not come from the prompt of the longest one.
SPARE = 128
BATCH = 512
SEQUENCE = 0


class Context:
    """
    A context of llama.cpp at batch 1, whose cache is given a length by reading random tokens or forgetting some.

    Args:
        library: the module `llama_cpp`.
        model: of `llama_model_load_from_file`.
        length (`int`): most tokens that it holds.
        threads (`int`): of both decoding and reading a prompt.
    """

    def __init__(self, library: Any, model: Any, length: int, threads: int):
        self.library = library
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = length, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = 0  # off: on a CPU the default is a third slower at 512 tokens
        self.handle = library.llama_init_from_model(model, settings)
        if not self.handle:
            raise RuntimeError(f"llama.cpp made no context of {length} tokens")
        self.memory = library.llama_get_memory(self.handle)
        self.batch = library.llama_batch_init(BATCH, 0, 1)
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self.generator = np.random.default_rng(0)
        self.position = 0

    def read(self, count: int) -> None:
        """Read so many random tokens; logits are made of the last one."""
        while count > 0:
            size = min(count, BATCH)
            for index, token in enumerate(self.generator.integers(3, self.vocabulary, size)):
                self.batch.token[index], self.batch.pos[index] = int(token), self.position + index
                self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, SEQUENCE
                self.batch.logits[index] = index == size - 1
            self.batch.n_tokens = size
            code = self.library.llama_decode(self.handle, self.batch)
            if code:
                raise RuntimeError(f"llama_decode failed with {code} at position {self.position}")
            self.library.llama_synchronize(self.handle)
            self.position += size
            count -= size

    def reset(self, context: int) -> None:
        """Let the cache hold so many tokens."""
        if self.position > context:
            self.library.llama_memory_seq_rm(self.memory, SEQUENCE, context, -1)
            self.position = context
        self.read(context - self.position)

    def close(self) -> None:
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.handle)


class LlamaEngine:
    """Methods of a worker process, as [`~training.benchmarks.decoding.worker.Worker.ask`] calls them."""

    def __init__(self) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        self.models: dict[str, Any] = {}
        self.contexts: dict[str, Context] = {}
        self.threads = 1
        # Kept, since llama.cpp calls it as long as it lives.
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()

    def start(self, threads: int) -> dict[str, Any]:
        """Set the number of threads, and say which versions these are and what they were compiled for."""
        self.threads = threads
        names = ("llama-cpp-python", "gguf")
        said = self.library.llama_print_system_info().decode()
        return {"versions": {name: version(name) for name in names}, "system_info": said}

    def _file(self, folder: Path, shape: gguf_files.Shape, form: str) -> Path:
        """The file of a shape in a format, written where it is not there."""
        path = folder / f"{shape.name}-{form}.gguf"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"{shape.name}-F16.gguf"
        if not source.exists():
            gguf_files.write(source, shape)
        if form != "F16":
            settings = self.library.llama_model_quantize_default_params()
            settings.nthread, settings.ftype = self.threads, getattr(self.library, f"LLAMA_FTYPE_MOSTLY_{form}")
            temporary = path.with_suffix(".tmp")
            code = self.library.llama_model_quantize(str(source).encode(), str(temporary).encode(), settings)
            if code:
                raise RuntimeError(f"llama_model_quantize failed with {code} for {form}")
            temporary.rename(path)
        return path

    def load(self, name: str, form: str, shape: dict[str, int], length: int, folder: str) -> dict[str, Any]:
        """Load a model, written first where it is not there, and say what it takes and reads."""
        sizes = gguf_files.Shape(**shape)
        path = self._file(Path(folder), sizes, form)
        gc.collect()
        before = resident_bytes()
        settings = self.library.llama_model_default_params()
        settings.n_gpu_layers, settings.use_extra_bufts = 0, True  # repacked for this processor
        model = self.library.llama_model_load_from_file(str(path).encode(), settings)
        if not model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.models[name] = model
        self.contexts[name] = Context(self.library, model, length + SPARE, self.threads)
        self.decode(name, 2, 2)
        kinds = gguf_files.kinds_in(path)
        return {
            "resident_bytes": resident_bytes() - before,
            "file_bytes": path.stat().st_size,
            "bytes_read": gguf_files.bytes_read(kinds),
            "bytes_of_a_position": 2 * 2 * sizes.layers * sizes.width,  # float16
            "parameters": sum(int(np.prod(size)) for size, _ in kinds.values()),
            "formats": sorted({kind for _, kind in kinds.values()}),
        }

    def decode(self, name: str, context: int, count: int) -> dict[str, list[float]]:
        """The seconds of each of so many tokens, after a context."""
        one = self.contexts[name]
        one.reset(context)
        return timed(lambda: one.read(1), count)

    def prompt(self, name: str, length: int) -> dict[str, list[float]]:
        """The seconds until the logits after a prompt of so many tokens are there."""
        one = self.contexts[name]
        one.reset(0)
        return timed(lambda: one.read(length), 1)

    def free(self) -> None:
        """Let go of all models."""
        for context in self.contexts.values():
            context.close()
        for model in self.models.values():
            self.library.llama_model_free(model)
        self.contexts.clear()
        self.models.clear()


if __name__ == "__main__":
    serve(LlamaEngine())
