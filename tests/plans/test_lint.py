"""Every mistake is found at its place, in plain words, with what would be right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import farshore.plans
from farshore.plans.lint import ERROR, WARNING, LintFinding, lint
from farshore.plans.loader import load_text

EXAMPLES = Path(farshore.plans.__path__[0]) / "examples"
Spoil = Callable[[str, str], str]

GUEST = "      - script: smoke.sh\n        args: [crm]\n"
# what stands in crm.yaml, what it is spoilt to, severity, code, path, a piece of the message, a piece of the fix, and
# the piece of the spoilt text at which the finding points
CASES = [
    ("machines: [crm-db01]", "machines: [crm-db1]", ERROR, "unknown-machine", "boot[0].machines[0]", "Did you mean crm-db01?", "under `machines`", "crm-db1]"),
    ("machines: [crm-db01]", "machines: [crm-db01, crm-db01]", ERROR, "machine-twice", "boot[0].machines[1]", "in this group already", "once", "crm-db01]"),
    ("machines: [crm-app01]", "machines: [crm-app01, crm-db01]", ERROR, "machine-twice", "boot[1].machines[1]", "in boot[0] already", "one group", "crm-db01]\n  - group: web"),
    ("machines: [crm-web01]", "machines: []", ERROR, "machine-in-no-group", "machines.crm-web01", "nothing would ever start it", "Add it to", "crm-web01:\n"),
    ("group: application", "group: data", ERROR, "group-twice", "boot[1].group", "taken by boot[0]", "of its own", "data\n    machines: [crm-app01]"),
    ("  - group: application\n", "  - group: nothing\n  - group: application\n", WARNING, "empty-group", "boot[1]", "neither machines nor actions", "remove the group", "group: nothing"),
    ("10.20.2.10", "10.20.3.10", ERROR, "address-twice", "machines.crm-app01.target.address", "belongs to crm-db01 already", "another one", "10.20.3.10\n      tags: {application: crm, tier: app}"),
    ("10.20.2.10", "10.20.2.300", ERROR, "value", "machines.crm-app01.target.address", "not an IPv4 address", "10.20.3.10", "10.20.2.300"),
    ("      subnet: app\n", "      subnet: app\n      name: CRM-DB01\n", ERROR, "name-twice", "machines.crm-app01.target.name", "belongs to crm-db01", "another one", "CRM-DB01"),
    ("    description: Application server\n", "    source: crm-db01\n", ERROR, "source-twice", "machines.crm-app01.source", "belongs to crm-db01", "another one", "crm-db01\n    target"),
    ("test: isolated ", "test: DR-vnet ", ERROR, "test-in-production", "network.test", "network of the real failover", "isolated", "DR-vnet"),
    ("failover: dr-vnet", "failover: isolated", ERROR, "failover-isolated", "network.failover", "stays", "Name a network", "isolated\n"),
    ("target: westeurope", "target: east", ERROR, "same-site", "sites.target", "same site (east)", "takes over", "east}"),
    ("interval: 30s", "interval: 20m", WARNING, "rpo-threshold", "replication.rpo_threshold", "15m is shorter than the interval of 20m", "at least 20m", "15m"),
    ("interval: 30s", "interval: 8d", ERROR, "retention-short", "replication.retention", "kept for 7d", "several intervals", "retention:"),
    ("{within: 2h, keep: all}", "{within: 30h, keep: all}", ERROR, "retention-order", "replication.retention[1].within", "does not come after the 1d6h", "shortest first", "24h"),
    ("{within: 2h, keep: all}", "{within: 2h, keep: 3h}", WARNING, "retention-keep", "replication.retention[0].keep", "at most one", "more often", "3h}"),
    ("{within: 2h, keep: all}", "{within: 2h, keep: sometimes}", ERROR, "value", "replication.retention[0].keep", "or write all", "`keep: 1h`", "sometimes"),
    ("interval: 30s", "interval: 0s", ERROR, "value", "replication.interval", "longer than zero", "`interval: 30s`", "0s"),
    ("interval: 30s", "interval: soon", ERROR, "value", "replication.interval", "'soon' is not a duration; write 30s", "`interval: 30s`", "soon"),
    ("timeout: 8h", "timeout: -1", ERROR, "value", "boot[0].after[0].timeout", "negative", "`timeout: 8h`", "-1"),
    ("script: smoke.sh", "script: /bin/sh", ERROR, "script-path", "boot[2].after[0].script", "leads out", "smoke.sh", "/bin/sh"),
    ("script: smoke.sh", "script: a/../../x.sh", ERROR, "script-path", "boot[2].after[0].script", "leads out", "smoke.sh", "a/../../x.sh"),
    ("script: smoke.sh", r"script: C:\x.cmd", ERROR, "script-path", "boot[2].after[0].script", "leads out", "smoke.sh", "C:"),
    (GUEST, GUEST.replace("smoke.sh", "../x") + "        where: guest\n        machine: crm-db01\n", ERROR, "script-path", "boot[2].after[0].script", "leads out", "smoke.sh", "../x"),
    (GUEST, GUEST + "        where: guest\n", ERROR, "machine-missing", "boot[2].after[0]", "needs its `machine`", "crm-db01", "script: smoke.sh"),
    (GUEST, GUEST + "        where: guest\n        machine: crm-db9\n", ERROR, "unknown-machine", "boot[2].after[0].machine", "Did you mean crm-db01?", "crm-db01", "crm-db9"),
    (GUEST, GUEST + "        machine: crm-db01\n", WARNING, "machine-unused", "boot[2].after[0].machine", "on a worker", "where: guest", "machine: crm-db01\n        timeout"),
    ("  force: false\n", "  force: false\n  after: [{script: x, where: guest, machine: crm-db01}]\n", ERROR, "guest-too-early", "shutdown.after[0].machine", "has not been recovered yet", "Move the script", "crm-db01}"),
    ("  - group: web\n", "  - group: web\n    before: [{script: x, where: guest, machine: crm-web01}]\n", ERROR, "guest-too-early", "boot[2].before[0].machine", "has not been recovered yet", "Move", "crm-web01}"),
    ("on: [planned, unplanned]", "on: [planed]", ERROR, "value", "boot[0].after[0].on[0]", "'planed' is not possible", "Did you mean planned?", "planed]"),
    ("on: [planned, unplanned]", "on: []", WARNING, "never-runs", "boot[0].after[0].on", "never runs", "Name the kinds", "[]"),
    ("  force: false\n", "  force: false\n  before: [{script: x, on: [test]}]\n", WARNING, "never-runs", "shutdown.before[0].on", "does not shut anything down", "boot group", "[test]"),
    ("manual: Check", "manuel: Check", ERROR, "action-kind", "boot[0].after[0]", "`manual: what to do` or `script: file`", "- manual", "manuel"),
    ("on_failure: continue", "on_failure: retry", ERROR, "value", "boot[2].after[0].on_failure", "'retry' is not possible", "stop, continue", "retry"),
    ("on_failure: continue", "on_failur: stop", ERROR, "unknown-field", "boot[2].after[0].on_failur", "not a field", "Did you mean `on_failure`?", "on_failur:"),
    ("  interval: 30s", "  intervall: 30s", ERROR, "unknown-field", "replication.intervall", "not a field", "Did you mean `interval`?", "intervall"),
    ("farshore: 1\n", "farshore: 2\n", ERROR, "version", "farshore", "2 is not a known version", "farshore: 1", "2\n"),
    ("plan: crm\n", "plan: c/rm\n", ERROR, "name", "plan", "cannot be a name", "letters", "c/rm"),
    ("  crm-db01:\n", "  crm db01:\n", ERROR, "name", "machines.crm db01", "cannot be a name", "letters", "crm db01"),
    ("      size: Standard_B2s\n", "", ERROR, "missing", "machines.crm-web01.target.size", "`size` is missing", "`size: Standard_D4s_v5`", "target:\n      os: linux\n      firmware: efi\n      subnet: web"),
    ("order: reverse ", "order: backwards ", ERROR, "value", "shutdown.order", "not possible", "Possible: reverse, parallel", "backwards"),
    ("force: false", "force: maybe", ERROR, "type", "shutdown.force", "true or false", "`force`", "maybe"),
    ("machines: [crm-web01]", "machines: crm-web01", ERROR, "type", "boot[2].machines", "a list is wanted", "[crm-db01]", "crm-web01\n    after"),
    ("      subnet: web\n", "      subnet: web\n      subnet: web2\n", ERROR, "duplicate-key", "machines.crm-web01.target.subnet", "given twice (first in line", "Keep one", "subnet: web2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "severity", "code", "path", "message", "fix", "at"),
    CASES,
    ids=[f"{case[3]}-{i}" for i, case in enumerate(CASES)],
)
def test_a_mistake_is_found_at_its_place(
    spoil: Spoil, old: str, new: str, severity: str, code: str, path: str, message: str, fix: str, at: str
):
    text = spoil(old, new)
    found = [f for f in lint(text) if (f.code, f.path) == (code, path)]
    assert len(found) == 1, [f.text("crm.yaml") for f in lint(text)]
    finding = found[0]
    assert finding.severity == severity
    assert message in finding.message
    assert fix in finding.fix
    rest = "\n".join(text.splitlines()[finding.line - 1 :])[finding.column - 1 :]
    assert rest.startswith(at.rstrip("\n")), f"it points at {rest[:40]!r}"


def test_the_examples_are_without_findings(examples):
    for path in sorted(examples.glob("*.yaml")):
        assert lint(path.read_text()) == [], path.name


def test_one_mistake_gives_one_finding(spoil: Spoil):
    for old, new, _, code, *_ in CASES:
        if code in {"unknown-machine", "retention-short", "name"}:
            continue  # these truly bring a second one: the machine that was meant is in no group, for example
        assert len(lint(spoil(old, new))) == 1, (old, new, [f.text("p") for f in lint(spoil(old, new))])


def test_a_group_of_a_hundred_and_fifty_machines_is_fine(crm: str):
    names = [f"m{i}" for i in range(150)]
    text = (
        "farshore: 1\nplan: big\nsites: {source: a, target: b}\nnetwork: {failover: n}\nmachines:\n"
        + "".join(f"  {name}: {{target: {{size: S}}}}\n" for name in names)
        + f"boot: [{{group: all, machines: [{', '.join(names)}]}}]\n"
    )
    assert lint(text) == []


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("", 1, 1, "the file is empty"),
        ("# nothing but a comment\n", 1, 1, "the file is empty"),
        ("null\n", 1, 1, "the plan is empty"),
        ("- a\n- b\n", 1, 1, "a plan is a map"),
        ("farshore: 1\n\tplan: x\n", 2, 1, "a tab stands where only spaces may"),
        ("farshore: 1\nplan: a: b\n", 2, 8, "a colon stands where none may"),
        ("farshore: 1\nsites: {source: a\n", 3, 1, "is not closed"),
        ("farshore: 1\nplan: 'x\n", 3, 1, "the text ends in the middle"),
        ("farshore: 1\n---\nplan: x\n", 2, 1, "more than one document"),
        ("farshore: 1\nplan: *crm\n", 2, 7, "an alias without its anchor"),
        ("farshore: 1\nplan: x\x07\n", 2, 8, "a control character (code 7)"),
        ("farshore: 1\nboot: &b [*b]\n", 2, 7, "an anchor that holds itself"),
        ("farshore: 1\nplan: !!python/object:os.system x\n", 2, 7, "means nothing in a plan"),
        ("farshore: 1\n? [a, b]\n: 1\n", 2, 3, "a key that is a list"),
        ("[" * 600, 1, 1, "nested too deeply"),
        ("x" * 1_000_001, 1, 1, "more than the 1,000,000"),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_a_malformed_text_is_explained_at_its_place(text: str, line: int, column: int, message: str):
    finding = next((f for f in lint(text) if message in f.message), None)
    assert finding is not None, [f.text("p") for f in lint(text)]
    assert (finding.line, finding.column, finding.severity) == (line, column, ERROR)
    assert finding.fix.endswith(".")


def test_anchors_that_multiply_do_not_fill_the_memory():
    text = "a: &a [1,1,1,1,1,1,1,1,1]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    assert [f.code for f in lint(text)] == ["too-large"]


def test_every_duplicate_key_is_named_not_just_the_first(spoil: Spoil):
    text = spoil("farshore: 1\n", "farshore: 1\nfarshore: 1\nplan: a\n")
    assert [(f.line, f.code) for f in lint(text)] == [(3, "duplicate-key"), (5, "duplicate-key")]


def test_words_that_old_yaml_took_for_truth_values_are_words(spoil: Spoil):
    assert lint(spoil("description: Application server", "description: yes")) == []
    assert lint(spoil("description: Application server", "description: on")) == []


def test_machines_may_share_settings_by_anchor_and_merge(crm: str):
    text = """
farshore: 1
plan: p
sites: {source: a, target: b}
network: {failover: n}
machines:
  one: {target: &common {size: S, subnet: web}}
  two:
    target:
      <<: *common
      subnet: db
      address: nonsense
boot: [{group: all, machines: [one, two]}]
"""
    assert [(f.line, f.path) for f in lint(text)] == [(12, "machines.two.target.address")]
    target = load_text(text.replace("nonsense", "10.0.0.4"), "p.yaml").plan.machines["two"].target
    assert (target.size, target.subnet, target.name) == ("S", "db", "two")


def test_a_finding_reads_like_a_compilers():
    finding = LintFinding(12, 7, ERROR, "x", "something is wrong", "Do it right.", "boot[0].machines[1]")
    assert finding.text("crm.yaml") == "crm.yaml:12:7: boot[0].machines[1]: something is wrong. Do it right."


CRM = (EXAMPLES / "crm.yaml").read_text()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, len(CRM)),
    st.integers(0, 12),
    st.text(max_size=6) | st.sampled_from([*"{}[]:-#&*!|>'\"%@`\t", ": ", "<<: "]),
)
def test_however_a_plan_is_spoilt_lint_answers_and_every_place_exists(start: int, length: int, piece: str):
    text = CRM[:start] + piece + CRM[start + length :]
    lines = re.split("\r\n|[\n\r]", text)
    lines_are_certain = not set(text) & set("\x85\u2028\u2029")  # old YAML ended lines here, editors differ
    for finding in lint(text):
        assert finding.line >= 1
        assert finding.column >= 1
        if lines_are_certain:
            assert finding.line <= len(lines)
            assert finding.column <= len(lines[finding.line - 1]) + 1
        assert finding.message
        assert finding.fix


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_PLACES = [
    "sites",
    "replication",
    "retention",
    "network",
    "machines",
    "crm-db01",
    "target",
    "shutdown",
    "boot",
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(_PLACES), _JSON)
def test_a_value_of_any_shape_in_any_place_is_explained_never_raised(place: str, value: object):
    data = YAML(typ="safe", pure=True).load(CRM)
    home = data
    if place == "retention":
        home = data["replication"]
    elif place == "crm-db01":
        home = data["machines"]
    elif place == "target":
        home = data["machines"]["crm-db01"]
    home[place] = value
    for finding in lint(json.dumps(data)):
        assert finding.fix


def test_a_list_whose_items_are_wrong_is_not_called_empty():
    text = "farshore: 1\nplan: p\nsites: {source: a, target: b}\nnetwork: {failover: n}\nmachines: {m: 3}\nboot: [3]\n"
    assert {(f.path, f.code) for f in lint(text)} == {
        ("machines.m", "type"),
        ("machines.m", "machine-in-no-group"),
        ("boot[0]", "type"),
    }
