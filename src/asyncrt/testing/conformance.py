"""What every backend must do, as a class that its tests inherit."""

from __future__ import annotations

import sys

try:
    import pytest
except ModuleNotFoundError as missing:
    raise ImportError(
        "asyncrt.testing.BackendConformance needs pytest: pip install 'asyncrt[test]'"
    ) from missing

for _name in ("base", "inputs", "calls", "failures", "cancelling", "observing", "faults"):
    if f"asyncrt.testing.conformance{_name}" not in sys.modules:
        pytest.register_assert_rewrite(f"asyncrt.testing.conformance{_name}")

from asyncrt.testing.conformancecalls import CallConformance  # noqa: E402 - rewritten from here on
from asyncrt.testing.conformancecancelling import CancellingConformance  # noqa: E402
from asyncrt.testing.conformancefailures import FailureConformance  # noqa: E402
from asyncrt.testing.conformancefaults import FaultConformance  # noqa: E402
from asyncrt.testing.conformanceinputs import InputConformance  # noqa: E402
from asyncrt.testing.conformanceobserving import ObservingConformance  # noqa: E402


@pytest.mark.anyio
class BackendConformance(
    CallConformance,
    InputConformance,
    FailureConformance,
    CancellingConformance,
    ObservingConformance,
    FaultConformance,
):
    """Inherit it, override ``make_backend`` and ``leftovers``, and set the flags that do not hold.

        class TestMyBackend(BackendConformance):
            limits_memory = False

            def make_backend(self) -> Backend:
                return MyBackend()

            def leftovers(self) -> list[str]:
                return [job.name for job in list_jobs()]

    The tests are coroutines for anyio's pytest plugin: the module needs an ``anyio_backend``
    fixture that returns ``"asyncio"``. After each test nothing may be left. See
    ``ConformanceBase`` for all hooks and flags.
    """
