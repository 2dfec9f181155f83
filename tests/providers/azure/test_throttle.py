"""After the subscription's throttling nobody asks again before the time is over."""

from __future__ import annotations

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.throttle import Pause
from farshore.providers.ports import TargetNic

from .bench import Azure, World


def throttled(code: str = "TooManyRequests", seconds: float | None = 10) -> FarshoreError:
    return FarshoreError(Code.TARGET_THROTTLED, "x", retry_after=seconds, details={"azure_code": code})


def test_it_is_closed_for_as_long_as_azure_asked() -> None:
    now = 100.0
    pause = Pause(clock=lambda: now)
    pause.check()
    pause.heed(throttled())
    with pytest.raises(FarshoreError) as caught:
        pause.check()
    assert caught.value.code is Code.TARGET_THROTTLED
    assert caught.value.retry_after is not None
    assert 10 <= caught.value.retry_after <= 12
    pause.heed(throttled(seconds=2))  # a shorter one does not open it
    now = 109.9
    with pytest.raises(FarshoreError):
        pause.check()
    now = 110.1
    pause.check()


@pytest.mark.parametrize(
    "error",
    [
        throttled("OperationNotAllowed"),  # one machine's bucket
        throttled("ServerBusy"),  # one storage account
        throttled(seconds=None),
        FarshoreError(
            Code.TARGET_BUSY, "x", retry_after=10, details={"azure_code": "AnotherOperationInProgress"}
        ),
    ],
)
def test_what_concerns_one_resource_does_not_stop_the_others(error: FarshoreError) -> None:
    pause = Pause()
    pause.heed(error)
    pause.check()


async def test_no_request_is_sent_before_the_time(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.throttle(reads=(0.5, 2))
    nic = TargetNic("dr-vnet", "web")

    async def several() -> None:
        for n in range(5):
            await site.create_nic(world.owner(f"m{n}"), world.spec(f"m{n}"), 0, nic)

    with pytest.raises(FarshoreError) as caught:
        await several()
    assert caught.value.code is Code.TARGET_THROTTLED
    mark = cloud.last_request()
    for _ in range(3):
        with pytest.raises(FarshoreError) as again:
            await site.create_nic(world.owner(), world.spec(), 0, nic)
        assert again.value.code is Code.TARGET_THROTTLED
    assert cloud.control.requests(mark) == []
