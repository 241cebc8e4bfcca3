"""The alert rules use metrics and labels that exist, and each is shown to fire and to keep quiet.

That promtool agrees is checked by `make check`, where it is installed.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from documents import declared_metrics, read

RULES: dict[str, Any] = {
    rule["alert"]: rule
    for group in yaml.safe_load(read("config/prometheus/alerts.yaml"))["groups"]
    for rule in group["rules"]
}
CASES = yaml.safe_load(read("config/prometheus/alerts_test.yaml"))["tests"]


@pytest.mark.parametrize("name", RULES)
def test_an_alert_uses_only_what_exists(name: str) -> None:
    """Every metric of a rule is declared, and every label it prints is one of theirs or Prometheus' own."""
    rule, known = RULES[name], declared_metrics()
    used = set(re.findall(r"streammerge_[a-z_]+", rule["expr"]))
    assert used <= set(known)
    labels = {"job", "instance"}.union(*(known[metric][1] for metric in used))
    assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= labels
    assert set(re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\s*\"", rule["expr"])) <= labels


@pytest.mark.parametrize("name", RULES)
def test_an_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    """Every rule has a severity, a summary and a description."""
    assert RULES[name]["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(RULES[name]["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("name", RULES)
def test_an_alert_is_shown_to_fire_and_to_keep_quiet(name: str) -> None:
    """alerts_test.yaml has a moment at which each rule fires and one at which it does not."""
    checks = [check for case in CASES for check in case["alert_rule_test"] if check["alertname"] == name]
    assert {bool(check["exp_alerts"]) for check in checks} == {True, False}


def test_no_alert_is_tested_that_is_not_there() -> None:
    """alerts_test.yaml knows no rule that alerts.yaml does not have."""
    assert {check["alertname"] for case in CASES for check in case["alert_rule_test"]} == set(RULES)
