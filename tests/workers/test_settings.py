"""Settings that people get wrong are refused in words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from farshore.domain.errors import Code, FarshoreError
from farshore.workers.settings import PhysicalSite, WorkerTuning, key
from farshore.workers.worker import _bandwidth


def test_a_key_is_64_hexadecimal_digits(tmp_path):
    file = tmp_path / "key"
    file.write_text("ab" * 32 + "\n")
    assert key(f"file:{file}", "k") == b"\xab" * 32


@pytest.mark.parametrize("text", ["ab" * 31, "not hexadecimal", "ab" * 33])
def test_anything_else_is_no_key_and_is_not_repeated(tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(FarshoreError) as caught:
        key(f"file:{file}", "sites.west.encryption_key")
    assert caught.value.code is Code.SECRET_UNAVAILABLE
    assert text not in caught.value.info.text()
    assert "openssl rand" in caught.value.info.text()


def test_bandwidth_is_one_bucket_by_time_of_day():
    tuning = WorkerTuning.model_validate(
        {"bandwidth": [{"at": "08:00", "mbytes": 20}, {"at": "18:30", "mbytes": 200}]}
    )
    assert [rate.minute for rate in tuning.bandwidth] == [480, 1110]
    assert _bandwidth(tuning) is not None
    assert _bandwidth(WorkerTuning()) is None


@pytest.mark.parametrize(
    "wrong", [{"at": "24:00", "mbytes": 1}, {"at": "8", "mbytes": 1}, {"at": "08:00", "mbytes": 0}]
)
def test_a_wrong_rate_is_refused(wrong):
    with pytest.raises(ValidationError):
        WorkerTuning.model_validate({"bandwidth": [wrong]})


def test_a_physical_site_needs_servers():
    with pytest.raises(ValidationError):
        PhysicalSite(provider="physical", ca_file="a", certificate_file="b", key_file="c", servers={})
