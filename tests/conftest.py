"""Eight virtual devices, strict ranks, a compilation cache for the session."""

import importlib.metadata
import json
import os
import pathlib

# Compiling is what takes the time here: unoptimised code takes half as long to make, and without
# fusion emitters, which later versions always use, half as long again.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    # Eight devices on two busy cores wait for each other longer than XLA's 40 seconds.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


DURATIONS = pathlib.Path(__file__).parent / "durations.json"  # {test file: seconds}


def pytest_addoption(parser):
    parser.addoption("--record-durations", action="store_true", help=f"write {DURATIONS.name} anew")


def pytest_collection_modifyitems(items):
    """The longest files first, so that two processes end at about the same time."""
    seconds = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--record-durations"):
        return
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.partition("::")[0]
                seconds[file] = seconds.get(file, 0) + report.duration
    content = {file: round(seconds[file]) for file in sorted(seconds) if seconds[file] >= 1}
    DURATIONS.write_text(json.dumps(content, indent=1) + "\n")


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
def compilation_cache(tmp_path_factory, worker_id):
    """Equal programs compile once, in whichever process of the session, programs it starts too."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "jax-cache"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
