"""Disks from recovery points, against the laboratory Azure."""

from __future__ import annotations

import asyncio
import base64
import itertools
from dataclasses import replace

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.azure.adapter import AzureSite

from .bench import MIB, Azure, Killed, Notes, World, settled, sha256_of


async def test_a_disk_holds_the_points_bytes_and_not_what_was_written_since(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    content = b"\xfa\x33" * 5000
    made = await site.create_disk(
        world.owner(), world.spec(), world.request(world.replica(content)), resume={}, checkpoint=Notes()
    )
    assert made.kind == "disk"
    assert cloud.control.disk_sha256(made.id) == sha256_of(content, 2 * MIB)


async def test_a_disk_carries_our_tags_and_the_boot_disk_its_system(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner = world.owner()
    boot = await site.create_disk(
        owner,
        world.spec(os="windows", firmware="bios", zone="2"),
        world.request(world.replica()),
        resume={},
        checkpoint=Notes(),
    )
    data = await site.create_disk(
        owner, world.spec(), world.request(world.replica(), 1), resume={}, checkpoint=Notes()
    )
    rg = cloud.settings.resource_group
    seen = await site._clients.compute.disks.get(rg, boot.name)
    assert seen.tags == {
        "farshore-plan": owner.plan,
        "farshore-run": owner.run,
        "farshore-machine": owner.machine,
        "farshore-purpose": "failover",
        "farshore-point": "p-0000000001-aabbccdd",
        "team": "crm",
    }
    assert (seen.properties.os_type, seen.properties.hyper_v_generation, seen.zones) == (
        "Windows",
        "V1",
        ["2"],
    )
    other = await site._clients.compute.disks.get(rg, data.name)
    assert (other.properties.os_type, other.zones) == (None, None)


async def test_the_staging_blob_is_gone_when_the_disk_is_there(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    await world.disk(site)
    assert cloud.staged(world.tag) == []


async def test_asking_again_makes_nothing_twice(site: AzureSite, cloud: Azure, world: World) -> None:
    handle, notes = world.replica(), Notes()
    one, two = [
        await site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=notes
        )
        for _ in range(2)
    ]
    assert one == two
    assert list(cloud.created(world.tag).values()) == [1]


async def test_two_at_once_make_one_disk(site: AzureSite, cloud: Azure, world: World) -> None:
    handle = world.replica()

    async def go() -> str:
        made = await settled(
            lambda: site.create_disk(
                world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=Notes()
            )
        )
        return made.id

    one, two = await asyncio.gather(go(), go())
    assert one == two
    assert list(cloud.created(world.tag).values()) == [1]


@pytest.mark.parametrize("keep_token", [True, False])
async def test_killed_between_put_and_poll_the_successor_makes_no_second_disk(
    cloud: Azure, world: World, keep_token: bool
) -> None:
    handle = world.replica()
    notes = Notes(kill_when=lambda note: bool(note.get("token")))
    cloud.control.time_scale(0.03)
    first = AzureSite(cloud.settings, snapshot_url=str)
    with pytest.raises(Killed):
        await first.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=notes
        )
    await first.close()
    second = AzureSite(cloud.settings, snapshot_url=str)
    mark = cloud.last_request()
    made = await second.create_disk(
        world.owner(),
        world.spec(),
        world.request(handle),
        resume=notes.last if keep_token else {},
        checkpoint=Notes(),
    )
    await second.close()
    assert list(cloud.created(world.tag).values()) == [1]
    assert cloud.states(world.tag) == {"Succeeded"}
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"boot" * 1024, 2 * MIB)
    assert cloud.asked("compute.Disks.create_or_update", after=mark, text=world.tag) == 0
    assert cloud.staged(world.tag) == []


async def test_killed_while_the_copy_ran_the_successor_takes_the_copy_over(
    cloud: Azure, world: World
) -> None:
    handle = world.replica()
    cloud.copies(hold=True)
    notes = Notes(kill_when=lambda note: note.get("step") == "copy")
    first = AzureSite(cloud.settings, snapshot_url=str)
    with pytest.raises(Killed):
        await first.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=notes
        )
    await first.close()
    before = cloud.copy_starts()
    cloud.copies(hold=False)
    second = AzureSite(cloud.settings, snapshot_url=str)
    await second.create_disk(
        world.owner(), world.spec(), world.request(handle), resume=notes.last, checkpoint=Notes()
    )
    await second.close()
    assert cloud.copy_starts() == before
    assert list(cloud.created(world.tag).values()) == [1]


async def test_a_slow_copy_is_told_about_while_it_runs(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.copies(delay=0.3)
    notes = Notes()
    await site.create_disk(
        world.owner(), world.spec(), world.request(world.replica()), resume={}, checkpoint=notes
    )
    assert sum(note.get("step") == "copy" for note in notes.seen) >= 3


async def test_a_broken_copy_is_told_and_replaced_at_the_next_attempt(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    handle = world.replica()
    cloud.copies(fail='500 InternalError "the source went away"')
    with pytest.raises(FarshoreError, match="the source went away") as caught:
        await site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=Notes()
        )
    assert caught.value.code is Code.TARGET_OPERATION_FAILED
    assert caught.value.retryable
    cloud.copies(fail="")
    made = await site.create_disk(
        world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=Notes()
    )
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"boot" * 1024, 2 * MIB)


async def test_a_copy_of_another_point_is_not_imported(site: AzureSite, cloud: Azure, world: World) -> None:
    """The run was killed after the copy, then went on with another point."""
    notes = Notes(kill_when=lambda note: bool(note.get("token")))
    owner = world.owner()
    with pytest.raises(Killed):
        await site.create_disk(
            owner, world.spec(), world.request(world.replica(b"old" * 9)), resume={}, checkpoint=notes
        )
    cloud.control.delete_behind(cloud.there(world.tag)[0])
    assert cloud.staged(world.tag) == [names.staging_blob(owner, 0)]
    newer = world.request(world.replica(b"new" * 9), point="p-0000000002-ffffffff")
    made = await site.create_disk(owner, world.spec(), newer, resume={}, checkpoint=Notes())
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"new" * 9, 2 * MIB)


async def test_an_aborted_copy_is_replaced(site: AzureSite, cloud: Azure, world: World) -> None:
    handle, owner = world.replica(), world.owner()
    cloud.copies(hold=True)
    notes = Notes(kill_when=lambda note: note.get("step") == "copy")
    with pytest.raises(Killed):
        await site.create_disk(owner, world.spec(), world.request(handle), resume={}, checkpoint=notes)
    blob = cloud.container.get_blob_client(names.staging_blob(owner, 0))
    blob.abort_copy(blob.get_blob_properties().copy.id)
    cloud.copies(hold=False)
    made = await site.create_disk(owner, world.spec(), world.request(handle), resume={}, checkpoint=Notes())
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"boot" * 1024, 2 * MIB)


async def test_a_lost_answer_to_the_copy_starts_no_second_copy(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    cloud.blob_rule("reset-after", op="CopyBlob", blob=f"*{world.tag}*", count=1)
    handle = world.replica()
    made = await settled(
        lambda: site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=Notes()
        )
    )
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"boot" * 1024, 2 * MIB)
    # The HTTP library repeats a PUT on a connection that broke: the repeat is refused, being create-only.
    assert len([s for s in cloud.copies_of(world.tag) if s.status < 400]) == 1


async def test_an_answer_lost_once_is_healed_below_us(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.fault("drop_after", operation="compute.Disks.create_or_update", path=f"*{world.tag}*")
    handle = world.replica()
    await settled(
        lambda: site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=Notes()
        )
    )
    assert list(cloud.created(world.tag).values()) == [1]


async def test_a_lost_answer_to_the_put_makes_no_second_disk(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    cloud.control.fault(
        "drop_after", operation="compute.Disks.create_or_update", path=f"*{world.tag}*", count=2
    )
    handle = world.replica()
    with pytest.raises(FarshoreError) as caught:
        await site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=Notes()
        )
    assert caught.value.code is Code.TARGET_UNREACHABLE
    await settled(
        lambda: site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=Notes()
        )
    )
    assert list(cloud.created(world.tag).values()) == [1]


async def test_a_late_failure_is_told_once_and_the_failed_disk_is_made_again(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    cloud.control.fault(
        "lro_fail", operation="compute.Disks.create_or_update", path=f"*{world.tag}*", code="InternalOperationError",
        message="The disk could not be written.",
    )  # fmt: skip
    handle, notes = world.replica(), Notes()
    with pytest.raises(FarshoreError, match="could not be written") as caught:
        await site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=notes
        )
    assert caught.value.code is Code.TARGET_OPERATION_FAILED
    assert "token" not in notes.last
    # Also from a heartbeat that was lost on the way: the old token leads to the failed operation.
    made = await site.create_disk(
        world.owner(), world.spec(), world.request(handle), resume=notes.with_token()[-1], checkpoint=Notes()
    )
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"boot" * 1024, 2 * MIB)
    assert list(cloud.created(world.tag).values()) == [2]  # the failed one was deleted
    assert len(cloud.there(world.tag)) == 1


async def test_a_damaged_token_is_no_obstacle(site: AzureSite, cloud: Azure, world: World) -> None:
    handle = world.replica()
    made = await site.create_disk(
        world.owner(),
        world.spec(),
        world.request(handle),
        resume={"step": "disk0", "token": "bm9uc2Vuc2U="},
        checkpoint=Notes(),
    )
    assert cloud.control.disk_sha256(made.id)


async def test_an_operation_azure_does_not_show_yet_is_met_by_the_next_attempt(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    handle, notes = world.replica(), Notes()
    cloud.control.consistency(operations=0.8)
    with pytest.raises(FarshoreError) as caught:
        await site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=notes
        )
    assert caught.value.code is Code.TARGET_NOT_VISIBLE_YET
    assert caught.value.retryable
    assert notes.last["token"]
    await settled(
        lambda: site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume=notes.last, checkpoint=Notes()
        )
    )
    assert list(cloud.created(world.tag).values()) == [1]


async def test_retry_after_of_an_operation_is_honoured(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.turn(retry_after=1.0, time_scale=0.05)  # 15 s of work are 0.75 s here
    mark = cloud.last_request()
    await world.disk(site)
    polls = [r for r in cloud.control.requests(mark) if r.operation == "lro.status"]
    assert 1 <= len(polls) <= 4
    assert all(b.at - a.at >= 0.9 for a, b in itertools.pairwise(polls))


async def test_a_long_import_is_told_about_with_its_token(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    cloud.control.time_scale(0.03)
    notes = Notes()
    await site.create_disk(
        world.owner(), world.spec(), world.request(world.replica()), resume={}, checkpoint=notes
    )
    assert len(notes.with_token()) >= 3


async def test_a_request_that_hangs_does_not_silence_the_step(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    cloud.control.fault(
        "slow", operation="compute.Disks.create_or_update", path=f"*{world.tag}*", seconds=0.4
    )
    notes = Notes()
    before = {"step": "disk0", "hint": "what the predecessor knew"}
    await site.create_disk(
        world.owner(), world.spec(), world.request(world.replica()), resume=before, checkpoint=notes
    )
    assert len([n for n in notes.seen if not n.get("token")]) >= 4


async def test_notes_hold_no_secret(site: AzureSite, cloud: Azure, world: World) -> None:
    notes = Notes()
    await site.create_disk(
        world.owner(), world.spec(), world.request(world.replica()), resume={}, checkpoint=notes
    )
    text = str(notes.seen)
    for note in notes.with_token():
        text += base64.b64decode(str(note["token"]) + "==").decode(errors="replace")
    s = cloud.settings
    assert "bearer" not in text.lower()
    for secret in (s.client_secret, s.storage_key, "sig=", "Authorization"):
        assert secret not in text


async def test_a_foreign_disk_of_that_name_is_left_alone(site: AzureSite, cloud: Azure, world: World) -> None:
    disk = await world.disk(site)
    cloud.control.change_behind(disk.id, {"tags": {"owner": "somebody"}})
    with pytest.raises(FarshoreError, match="not made by Farshore") as caught:
        await world.disk(site)
    assert caught.value.code is Code.NAME_TAKEN
    assert not caught.value.retryable
    assert len(cloud.there(world.tag)) == 1


async def test_another_point_in_the_same_run_replaces_the_disk(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    await world.disk(site)
    again = world.request(world.replica(b"newer" * 100), point="p-0000000002-ffffffff")
    made = await site.create_disk(world.owner(), world.spec(), again, resume={}, checkpoint=Notes())
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"newer" * 100, 2 * MIB)
    assert len(cloud.there(world.tag)) == 1


async def test_a_disk_in_use_is_not_replaced_by_another_point(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    _, disk, _ = await world.machine(site)
    before = cloud.control.disk_sha256(disk.id)
    with pytest.raises(FarshoreError, match="a machine uses it already") as caught:
        await site.create_disk(
            world.owner(),
            world.spec(),
            world.request(world.replica(), point="p-0000000002-ffffffff"),
            resume={},
            checkpoint=Notes(),
        )
    assert caught.value.code is Code.NAME_TAKEN
    assert cloud.control.disk_sha256(disk.id) == before


async def test_a_point_whose_snapshot_is_gone_has_expired(site: AzureSite, world: World) -> None:
    handle = world.replica()
    gone = handle.split("?", 1)[0] + "?snapshot=2020-01-01T00:00:00.0000000Z"
    with pytest.raises(FarshoreError) as caught:
        await site.create_disk(
            world.owner(), world.spec(), world.request(gone), resume={}, checkpoint=Notes()
        )
    assert caught.value.code is Code.POINT_EXPIRED


async def test_throttling_is_told_with_the_time_to_wait(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.fault(
        "status",
        operation="compute.Disks.create_or_update",
        path=f"*{world.tag}*",
        status=429,
        code="TooManyRequests",
        retry_after=17,
    )
    with pytest.raises(FarshoreError) as caught:
        await world.disk(site)
    assert (caught.value.code, caught.value.retry_after) == (Code.TARGET_THROTTLED, 17)


async def test_a_throttled_poll_keeps_the_token(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.fault("status", operation="lro.status", status=429, code="TooManyRequests", retry_after=1)
    handle, notes = world.replica(), Notes()
    with pytest.raises(FarshoreError) as caught:
        await site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume={}, checkpoint=notes
        )
    assert (caught.value.code, caught.value.retry_after) == (Code.TARGET_THROTTLED, 1)
    await settled(
        lambda: site.create_disk(
            world.owner(), world.spec(), world.request(handle), resume=notes.last, checkpoint=Notes()
        )
    )
    assert list(cloud.created(world.tag).values()) == [1]
    assert cloud.asked("compute.Disks.create_or_update", text=world.tag) == 1


async def test_a_snapshot_can_be_imported_without_a_copy(cloud: Azure, world: World) -> None:
    direct = AzureSite(replace(cloud.settings, copy_before_import=False), snapshot_url=str)
    before = cloud.copy_starts()
    made = await world.disk(direct)
    await direct.close()
    assert cloud.control.disk_sha256(made.id) == sha256_of(b"boot" * 1024, 2 * MIB)
    assert cloud.copy_starts() == before


async def test_a_bad_vhd_is_refused_late_with_azures_words(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    blob = cloud.container.get_blob_client(f"replica-bad-{world.tag}")
    blob.create_page_blob(2 * MIB + 512)
    stamp = blob.create_snapshot()["snapshot"]
    with pytest.raises(FarshoreError) as caught:
        await site.create_disk(
            world.owner(),
            world.spec(),
            world.request(f"{blob.url}?snapshot={stamp}"),
            resume={},
            checkpoint=Notes(),
        )
    assert caught.value.info.details["azure_code"] == "InvalidVhd"
    assert caught.value.code is Code.REPLICA_DAMAGED
    assert not caught.value.retryable
