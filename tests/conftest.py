"""Eight virtual devices, strict ranks, a compilation cache for the session."""

import importlib.metadata
import os

# Compiling is what takes the time here: unoptimised code takes half as long to make, and without
# fusion emitters, which later versions always use, half as long again.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """The longest files first, so that two processes end at about the same time."""
    longest = (
        "test_train",
        "test_processes",
        "test_chaos",
        "test_resume_with_workers",
        "test_every_config",
        "test_meshes",
        "test_parity",
        "test_trajectory",
        "test_model_shapes",
        "test_torch_loop",
        "test_attention_paths",
        "test_unified",
    )
    items.sort(key=lambda item: item.module.__name__.rpartition(".")[2] not in longest)


@pytest.fixture(scope="module")
def strict_dtypes():
    """No operation may mix dtypes silently. Optax does, and Flax's norms: for our own code."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one file are not kept for the next: they would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Runs of the same tiny model compile once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax-cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
