"""Loading a plan from a text and from a folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.plans.catalog import plan_names, read_plan
from farshore.plans.loader import load_text
from farshore.plans.source import Position


def test_a_loaded_plan_carries_its_hash_and_the_places_of_its_values(crm: str):
    loaded = load_text(crm, "crm.yaml")
    assert loaded.sha256 == hashlib.sha256(crm.encode()).hexdigest()
    assert loaded.positions["plan",] == Position(3, 7)
    line = crm.splitlines()[loaded.positions["boot", 0, "machines", 0].line - 1]
    assert "machines: [crm-db01]" in line
    assert loaded.warnings == ()


def test_any_edit_changes_the_hash(crm: str):
    assert load_text(crm + "# edited\n", "crm.yaml").sha256 != load_text(crm, "crm.yaml").sha256


def test_the_error_has_all_findings_with_their_places(spoil):
    text = spoil("machines: [crm-db01]", "machines: [crm-db01, crm-web9]").replace(
        "interval: 30s", "interval: often"
    )
    with pytest.raises(FarshoreError) as caught:
        load_text(text, "crm.yaml")
    assert caught.value.code is Code.PLAN_INVALID
    lines = str(caught.value).splitlines()
    assert lines[0] == "crm.yaml has 2 errors:"
    assert lines[1].startswith("crm.yaml:8:13: replication.interval: 'often' is not a duration")
    row = text.splitlines().index("    machines: [crm-db01, crm-web9]") + 1
    assert lines[2].startswith(
        f"crm.yaml:{row}:26: boot[0].machines[1]: 'crm-web9' is not a machine of this plan."
    )
    assert [f["line"] for f in caught.value.info.details["findings"]] == [8, row]
    assert not caught.value.retryable


def test_malformed_yaml_is_an_invalid_plan_with_line_and_column():
    with pytest.raises(FarshoreError, match=r"crm.yaml:2:8: not valid YAML: a colon") as caught:
        load_text("farshore: 1\nplan: a: b\n", "crm.yaml")
    assert caught.value.code is Code.PLAN_INVALID


def test_a_warning_does_not_stop_a_plan(spoil):
    loaded = load_text(spoil("on: [planned, unplanned]", "on: []"), "crm.yaml")
    assert [w.code for w in loaded.warnings] == ["never-runs"]


def test_hundreds_of_findings_are_counted_not_printed(crm: str):
    text = crm.replace(
        "machines: [crm-db01]", f"machines: [crm-db01, {', '.join(f'x{i}' for i in range(300))}]"
    )
    with pytest.raises(FarshoreError) as caught:
        load_text(text, "crm.yaml")
    assert str(caught.value).endswith("… and 260 more")
    assert len(str(caught.value)) < 20_000
    assert len(caught.value.info.details["findings"]) == 300


# ---- a folder of plans ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, crm: str) -> Path:
    plans = tmp_path / "plans"
    plans.mkdir()
    (plans / "crm.yaml").write_text(crm)
    (plans / "hr.yml").write_text(crm.replace("plan: crm\n", "plan: hr\n"))
    (plans / "notes.txt").write_text("no plan")
    (tmp_path / "outside.yaml").write_text(crm.replace("plan: crm\n", "plan: outside\n"))
    return plans


def test_plans_are_found_by_name_with_either_suffix(folder: Path):
    assert plan_names(folder) == ["crm", "hr"]
    assert read_plan(folder, "crm").name == "crm.yaml"
    assert read_plan(folder, "hr").plan.plan == "hr"


def test_the_examples_can_be_read(examples: Path):
    assert plan_names(examples) == ["crm", "minimal"]
    for name in plan_names(examples):
        assert read_plan(examples, name).plan.plan == name
    assert os.access(examples / "scripts" / "smoke.sh", os.X_OK)


def test_a_misspelt_name_gets_near_matches_and_the_list(folder: Path):
    with pytest.raises(
        FarshoreError, match=r"There is no plan 'crn'. Did you mean crm\? Plans: crm, hr."
    ) as caught:
        read_plan(folder, "crn")
    assert caught.value.code is Code.PLAN_NOT_FOUND


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..",
        ".",
        "",
        "/etc/passwd",
        "crm/../crm",
        "crm.yaml/",
        "a\x00b",
        "crm\n",
        "~",
        "x" * 200,
    ],
)
def test_a_name_never_leads_out_of_the_folder(folder: Path, name: str):
    with pytest.raises(FarshoreError, match="cannot be the name of a plan") as caught:
        read_plan(folder, name)
    assert caught.value.code is Code.PLAN_NOT_FOUND


def test_a_link_out_of_the_folder_is_no_plan(folder: Path):
    (folder / "outside.yaml").symlink_to(folder.parent / "outside.yaml")
    with pytest.raises(FarshoreError) as caught:
        read_plan(folder, "outside")
    assert caught.value.code is Code.PLAN_NOT_FOUND


def test_a_folder_that_is_not_there_has_no_plans(tmp_path: Path):
    with pytest.raises(FarshoreError, match="There are no plans"):
        read_plan(tmp_path / "nowhere", "crm")


def test_a_plan_that_calls_itself_otherwise_is_refused_at_its_line(folder: Path):
    (folder / "copy.yaml").write_text((folder / "crm.yaml").read_text())
    with pytest.raises(FarshoreError, match=r"copy.yaml:3:7: plan: the plan calls itself 'crm'"):
        read_plan(folder, "copy")


def test_two_files_of_one_name_are_refused(folder: Path):
    (folder / "crm.yml").write_text("")
    with pytest.raises(FarshoreError, match=r"crm.yml is a plan of the same name"):
        read_plan(folder, "crm")


def test_a_file_that_is_not_utf_8_is_refused_at_its_byte(folder: Path):
    (folder / "latin.yaml").write_bytes("farshore: 1\nplan: latin\ndescription: Büro\n".encode("latin-1"))
    with pytest.raises(FarshoreError, match=r"latin.yaml:3:15: the byte 0xfc is not UTF-8"):
        read_plan(folder, "latin")


def test_a_byte_order_mark_is_no_error(folder: Path, crm: str):
    (folder / "crm.yaml").write_bytes(b"\xef\xbb\xbf" + crm.encode())
    assert read_plan(folder, "crm").plan.plan == "crm"
