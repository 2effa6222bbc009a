"""Models of timm in PyTorch, which `hybrid_flax.benchmark` times beside ours.

PyTorch and timm are imported only when they are asked for.
"""

import difflib
import functools
import importlib.util
import os
from typing import Any

import jax

from hybrid_flax.costs import chips
from hybrid_flax.costs.subjects import CLASSES, LEARNING_RATE, SMOOTHING, WEIGHT_DECAY
from hybrid_flax.errors import InputError


class TimmSubject:
    """A model of timm as PyTorch runs it best, eager and compiled, on the device that JAX uses.

    Autocast to bfloat16 where the dtype says so, channels last, fused attention and optimizer,
    cuDNN's own choice of algorithms.

    Args:
      drop_path: rate of the last block, the same as ours.
      compile_mode: of `torch.compile`.

    Raises:
      InputError: PyTorch or timm is not installed, PyTorch cannot use the device, or timm has no
        such model.
    """

    label = "timm"

    def __init__(self, name: str, *, image_size: int, dtype: str, drop_path: float, compile_mode):
        missing = [x for x in ("torch", "timm") if importlib.util.find_spec(x) is None]
        if missing:
            raise InputError(
                f"--against=torch:timm/{name} needs {' and '.join(missing)}: pip install torch timm"
            )
        os.environ["TIMM_FUSED_ATTN"] = "2"  # read when timm is imported
        import timm
        import torch

        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=3)
            raise InputError(
                f"--against=torch:timm/{name}: timm {timm.__version__} has no model of this name. "
                f"Did you mean {', '.join(close) or 'one of timm.list_models()'}?"
            )
        here = {"cuda": "cuda", "cpu": "cpu"}.get(chips.platform_name())
        if here is None or (here == "cuda" and not torch.cuda.is_available()):
            raise InputError(
                f"--against=torch:timm/{name}: JAX runs on {jax.devices()[0].device_kind}, where "
                f"PyTorch {torch.__version__} does not; install PyTorch for this device"
            )
        self._device = here
        self._autocast = functools.partial(
            torch.autocast, here, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        self._compile = functools.partial(torch.compile, mode=compile_mode, dynamic=False)
        configured = timm.get_pretrained_cfg(name)
        usual = configured.input_size[-1] if configured else None
        resized = {} if image_size == usual else {"img_size": image_size}
        self._create = functools.partial(
            timm.create_model, name, num_classes=CLASSES, drop_path_rate=drop_path, **resized
        )
        self.side = image_size
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, as XLA

    def builders(self, batch: int, pass_: str, repeats: int, memory: dict[str, int]):
        """Does as `subjects.Subject.builders`; memory is noted on GPUs."""
        return {
            f"{self.label} {how}": functools.partial(
                self._build, f"{self.label} {how}", how == "compiled", batch, pass_, repeats, memory
            )
            for how in ("eager", "compiled")
        }

    def _build(self, label, compiled: bool, batch, pass_, repeats, memory):
        import torch

        if compiled:
            torch._dynamo.reset()
        on_gpu = self._device == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        layout: dict[str, Any] = {"device": self._device, "memory_format": torch.channels_last}
        model = self._create().to(**layout).train(pass_ == "training")
        images = torch.randn(batch, 3, self.side, self.side).to(**layout)
        labels = torch.randint(CLASSES, (batch,), device=self._device)
        optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        loss_of = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
        forward = self._compile(model) if compiled else model

        def infer():
            with torch.inference_mode(), self._autocast():
                forward(images)

        def train():
            with self._autocast():
                loss = loss_of(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step = train if pass_ == "training" else infer

        def run():
            for _ in range(repeats):
                step()
            if on_gpu:
                torch.cuda.synchronize()

        if on_gpu:
            run()
            memory[label] = torch.cuda.max_memory_allocated() - before
        return run
