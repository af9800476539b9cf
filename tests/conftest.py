"""Eight CPU devices, errors for warnings, and the --device option."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # no test reads what an earlier run compiled

import jax
import pytest
from hypothesis import settings

# No deadline: the first example of each shape pays for a compilation.
settings.register_profile("jaxaccel", deadline=None, max_examples=10, print_blob=True)
settings.load_profile("jaxaccel")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="gpu: run tests/gpu alone; without a GPU they are reported as not measured",
    )


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "gpu":
        items[:] = [item for item in items if "gpu" in item.path.parts]
        if _has_gpu():
            return
    not_measured = pytest.mark.skip(reason="not measured: needs a GPU and --device gpu")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(not_measured)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory):
    """Whatever is kept between runs is kept for this one alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def getkey():
    """A function that gives a fresh random key at each call."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    return lambda: next(keys)


@pytest.fixture(scope="session")
def made():
    """A Linen network with batch norm and dropout, its parameters and a plan for half of it."""
    import jaxaccel as jx
    from tests.models import LINEN

    fn, params = LINEN.build()
    return fn, params, jx.prune.plan(fn, params, LINEN.images(), ratio=0.5)
